"""The vision domain's network: a small pre-LN vision transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfmerge_accuracy.zoo import Params


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, on tokens `(batch, tokens, dim)`."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        normed = nn.LayerNorm(name="norm_attention")(x)
        q, v = (self._split(nn.Dense(dim, name=name)(normed)) for name in ("q", "v"))
        k = self._split(nn.Dense(dim, use_bias=False, name="k")(normed))  # a bias would cancel in the softmax
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (dim / self.heads) ** -0.5)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + nn.Dense(dim, name="out")(mixed)
        hidden = nn.gelu(nn.Dense(4 * dim, name="mlp_in")(nn.LayerNorm(name="norm_mlp")(x)))
        return x + nn.Dense(dim, name="mlp_out")(hidden)

    def _split(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, dim)` to `(batch, tokens, heads, dim / heads)`."""
        return x.reshape(*x.shape[:2], self.heads, -1)


class Vit(nn.Module):
    """Images `(batch, 28, 28)` uint8 to features `(batch, dim)` of length 1.

    Attributes:
        side: images are enlarged to `(side, side)` where that is not 28.
        patch: the side of a patch; there are `(side / patch) ** 2` tokens.
    """

    side: int = 28
    patch: int = 7
    dim: int = 128
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Dense(self.dim, name="patch_embedding")(self._patches(normalised(images)))
        x = x + self.param("position_embedding", nn.initializers.normal(0.02), x.shape[1:])
        for index in range(self.depth):
            x = Block(self.heads, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)

    def _patches(self, images: jax.Array) -> jax.Array:
        """`(batch, 28, 28)` to `(batch, tokens, patch * patch)`."""
        if self.side != images.shape[1]:
            images = jax.image.resize(images, (len(images), self.side, self.side), "bilinear")
        count = self.side // self.patch
        cut = images.reshape(-1, count, self.patch, count, self.patch)
        return cut.swapaxes(2, 3).reshape(-1, count * count, self.patch * self.patch)


def normalised(images: jax.Array) -> jax.Array:
    """uint8 `(batch, 28, 28)` to float32, each image of mean 0 and deviation about 1."""
    x = images.astype(jnp.float32) / 255
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    return centred / (x.std(axis=(1, 2), keepdims=True) + 0.05)


def init(model: Vit, key: jax.Array) -> Params:
    """Random parameters."""
    params: Params = jax.jit(model.init)(key, jnp.zeros((1, 28, 28), jnp.uint8))["params"]
    return jax.device_get(params)


@partial(jax.jit, static_argnames=("model",))
def features(model: Vit, params: Params, images: jax.Array) -> jax.Array:
    """`(batch, 28, 28)` uint8 to `(batch, dim)`."""
    result: Any = model.apply({"params": params}, images)
    return jnp.asarray(result)
