"""The demo's network: a residual MLP in which a layer norm stands before every dense layer of the blocks.

The heads are drawn once and frozen, so that the trunk is all that is trained and merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Params = Mapping[str, Any]
LOGIT_SCALE = 16.0


class Block(nn.Module):
    """`x + out(norm(gelu(in(norm(x)))))` on features `(batch, dim)`.

    The norm before `mlp_out` takes away the large mean that the activation leaves in its inputs. A data-free
    estimate of the input covariance does not see that mean (gradients cancel along it).
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.hidden, name="mlp_in")(nn.LayerNorm(name="norm_in")(x)))
        return x + nn.Dense(x.shape[-1], name="mlp_out")(nn.LayerNorm(name="norm_out")(hidden))


class Trunk(nn.Module):
    """Images `(batch, 28, 28)` in 0..1 to features `(batch, dim)` of norm 1."""

    dim: int = 256
    hidden: int = 512
    depth: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = (x - x.mean(axis=-1, keepdims=True)) / (x.std(axis=-1, keepdims=True) + 0.05)
        x = nn.Dense(self.dim, name="image_embedding")(x)
        for index in range(self.depth):
            x = Block(self.hidden, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def init_trunk(trunk: Trunk, key: jax.Array) -> Params:
    """Random parameters of the trunk."""
    params: Params = jax.jit(trunk.init)(key, jnp.zeros((1, 28, 28)))["params"]
    return params


def init_head(key: jax.Array, classes: int, dim: int) -> np.ndarray:
    """A frozen head `(classes, dim)`: random orthonormal rows times the logit scale."""
    rows = jax.random.orthogonal(key, dim)[:classes]
    return np.asarray(LOGIT_SCALE * rows, np.float32)


def flatten(params: Params) -> dict[str, np.ndarray]:
    """`{"block_0.mlp_in.kernel": array, ...}`: how the parameters are named on disk."""
    return {name: np.asarray(value) for name, value in flatten_dict(params, sep=".").items()}


def unflatten(tensors: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `flatten`."""
    params: Params = unflatten_dict(dict(tensors), sep=".")
    return params
