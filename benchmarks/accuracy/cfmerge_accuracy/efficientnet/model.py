"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation and with ReLU6), as ImageNet's weights have it.

    block(x) = x + project(depthwise(expand(x)))        each a convolution and a batch norm; ReLU6 but behind project

`x` is added where its shape is the result's; the first stage has no `expand`. Products run as matrix products and as
sums over a window's positions, which XLA's CPU compiles to far faster code than its own convolutions.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-3  # of the batch norms


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    repeats: int
    window: int
    stride: int
    expand: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Pointwise(nn.Module):
    """A 1 x 1 convolution without bias; its kernel is `(1, 1, in, width)`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, 1, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], self.width)


class Depthwise(nn.Module):
    """A convolution of every channel with a window of its own; its kernel is `(window, window, 1, channels)`."""

    window: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.window, self.window, 1, x.shape[-1]))
        return depthwise(x, kernel[:, :, 0], self.stride)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`y[i, j] = sum_ab kernel[a, b] x[stride i + a, stride j + b]`, with zeros around as for TensorFlow's "SAME"."""
    window = len(kernel)
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    missing = [max(0, (n - 1) * stride + window - size) for n, size in zip(sizes, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *((each // 2, each - each // 2) for each in missing), (0, 0)))
    rows, columns = sizes
    total = jnp.zeros((len(x), rows, columns, x.shape[-1]), x.dtype)
    for a in range(window):
        for b in range(window):
            part = padded[:, a : a + (rows - 1) * stride + 1 : stride, b : b + (columns - 1) * stride + 1 : stride]
            total = total + part * kernel[a, b]
    return total


class Block(nn.Module):
    stage: Stage
    stride: int
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, epsilon=EPSILON, name=name)(x)

        y, width = x, self.stage.expand * x.shape[-1]
        if self.stage.expand > 1:
            y = nn.relu6(norm("norm_expand", Pointwise(width, name="expand")(y)))
        y = nn.relu6(norm("norm_depthwise", Depthwise(self.stage.window, self.stride, name="depthwise")(y)))
        y = norm("norm_project", Pointwise(self.stage.width, name="project")(y))
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """Grey images `(batch, 28, 28)` uint8 to features `(batch, dim)` of length 1.

    Its variables are `{"params": ..., "batch_stats": ...}`.

    Attributes:
        side: images are enlarged to `(side, side)`.
        stages: of the blocks.
        stem, dim: channels of the first and of the last convolution.
        momentum: share of the running statistics that a training step keeps.
    """

    side: int = 48
    stages: tuple[Stage, ...] = STAGES
    stem: int = 32
    dim: int = 1280
    momentum: float = 0.9

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = self.pooled(coloured(images, self.side), train)
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)

    @nn.compact
    def pooled(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Pixels `(batch, side, side, 3)` in -1..1 to what ImageNet's classifier sees, `(batch, dim)`."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, epsilon=EPSILON, name=name)(x)

        x = nn.Conv(self.stem, (3, 3), (2, 2), use_bias=False, name="stem")(x)
        x = nn.relu6(norm("norm_stem", x))
        number = 0
        for stage in self.stages:
            for repeat in range(stage.repeats):
                stride = 1 if repeat else stage.stride
                x = Block(stage, stride, self.momentum, name=f"block_{number}")(x, train)
                number += 1
        x = nn.relu6(norm("norm_top", Pointwise(self.dim, name="top")(x)))
        return x.mean(axis=(1, 2))


def coloured(images: jax.Array, side: int) -> jax.Array:
    """Grey `(batch, 28, 28)` uint8 to `(batch, side, side, 3)` in -1..1, as ImageNet's images were given."""
    x = (images.astype(jnp.float32) - 127) / 128
    x = jax.image.resize(x, (len(x), side, side), "bilinear")
    return jnp.broadcast_to(x[..., None], (*x.shape, 3))
