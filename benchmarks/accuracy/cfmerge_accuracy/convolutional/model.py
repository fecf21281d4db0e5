"""The convolutional suite's network: strided 3 x 3 convolutions, each with a batch norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfmerge_accuracy.vision.model import normalised
from cfmerge_accuracy.zoo import Params


class ConvNet(nn.Module):
    """Images `(batch, 28, 28)` uint8 to features `(batch, dim)` of length 1.

    Its variables are `{"params": ..., "batch_stats": ...}`: what is trained, and every channel's mean and variance.

    Attributes:
        widths, strides: of the convolutions.
        dim: of the features.
        momentum: share of the running statistics that a training step keeps.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    strides: tuple[int, ...] = (2, 2, 2, 1)
    dim: int = 64
    momentum: float = 0.95

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = normalised(images)[..., None]
        for index, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = nn.Conv(width, (3, 3), (stride, stride), use_bias=False, name=f"conv_{index}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name=f"norm_{index}")(x)
            x = nn.relu(x)
        x = nn.Dense(self.dim, name="features")(x.mean(axis=(1, 2)))
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def init(model: ConvNet, key: jax.Array) -> Params:
    """Random parameters, and running statistics that leave the channels as they are."""
    variables: Params = jax.jit(model.init)(key, jnp.zeros((1, 28, 28), jnp.uint8))
    return jax.device_get(variables)


@partial(jax.jit, static_argnames=("model",))
def features(model: ConvNet, variables: Params, images: jax.Array) -> jax.Array:
    """`(batch, 28, 28)` uint8 to `(batch, dim)`, with the running statistics."""
    result: Any = model.apply(variables, images)
    return jnp.asarray(result)


@partial(jax.jit, static_argnames=("model",))
def reestimated(model: ConvNet, variables: Params, images: jax.Array) -> Params:
    """The same parameters with the statistics that these images, `(N, 28, 28)`, have in every layer.

    One pass in training mode: each layer's inputs are normalised by the new statistics of the layers before it.
    """
    fresh = model.clone(momentum=0.0)
    _, changed = fresh.apply(variables, images, train=True, mutable=["batch_stats"])
    return {"params": variables["params"], "batch_stats": changed["batch_stats"]}
