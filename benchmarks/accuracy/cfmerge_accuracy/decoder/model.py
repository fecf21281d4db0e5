"""The network: a small decoder of LLaMA's shape, with root mean square norms, rotary positions and a gated MLP.

ids (batch, tokens)  ->  embeddings  ->  blocks  ->  norm  ->  the same embeddings read out (batch, tokens, words)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfmerge_accuracy.zoo import Params


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, on tokens `(batch, tokens, dim)`, each sees those before."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, use_bias=False)
        normed = nn.RMSNorm(name="input_norm")(x)
        q, k, v = (dense(x.shape[-1], name=name)(normed) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = rotated(self._split(q)), rotated(self._split(k)), self._split(v)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = nn.softmax(jnp.where(past, scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(x.shape[-1], name="o_proj")(mixed)
        normed = nn.RMSNorm(name="post_attention_norm")(x)
        gate, up = (dense(self.hidden, name=name)(normed) for name in ("gate_proj", "up_proj"))
        return x + dense(x.shape[-1], name="down_proj")(nn.silu(gate) * up)

    def _split(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, dim)` to `(batch, tokens, heads, dim / heads)`."""
        return x.reshape(*x.shape[:2], self.heads, -1)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions: the two halves of each head's numbers are turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)


class Decoder(nn.Module):
    """Token ids `(batch, tokens)` to logits of the next token `(batch, tokens, words)`."""

    words: int = 2048
    dim: int = 128
    depth: int = 3
    heads: int = 4
    hidden: int = 352

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = nn.Embed(self.words, self.dim, embedding_init=nn.initializers.normal(0.02), name="embed_tokens")
        x = table(ids)
        for index in range(self.depth):
            x = Block(self.heads, self.hidden, name=f"layers_{index}")(x)
        return table.attend(nn.RMSNorm(name="norm")(x))


def init(model: Decoder, key: jax.Array) -> Params:
    """Random parameters."""
    params: Params = jax.jit(model.init)(key, jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.device_get(params)


@partial(jax.jit, static_argnames=("model",))
def logits(model: Decoder, params: Params, ids: jax.Array) -> jax.Array:
    """`(batch, tokens)` to `(batch, tokens, words)`."""
    result: Any = model.apply({"params": params}, ids)
    return jnp.asarray(result)
