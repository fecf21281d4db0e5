"""LLaMA 3, Qwen2 and Qwen3 in Flax NNX under tunix's names, on converted weights.

    cfmerge convert MODEL CONVERTED --names llama3              # or qwen2, qwen3
    python examples/nnx_llama.py CONVERTED 128000 791 6864

It prints the most likely token after each of them. A merged model is converted in the same way.
"""

import argparse
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from nnx_layers import ACTIVATIONS, RMSNorm, Tree, load


class Einsum(nnx.Module):
    """A weight of several axes, and the product that it stands in."""

    def __init__(self, product: str, *shape: int):
        self.product, self.w = product, nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.product, x, self.w[...])


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """Queries or keys `(batch, tokens, heads, size)`, the halves of each turned by an angle of their position."""
    size = x.shape[-1]
    angles = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(0, size, 2) / size)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, c: SimpleNamespace):
        d, n, k = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
        h = getattr(c, "head_dim", None) or d // n
        self.q_proj = Einsum("btd,dnh->btnh", d, n, h)
        self.k_proj, self.v_proj = Einsum("btd,dkh->btkh", d, k, h), Einsum("btd,dkh->btkh", d, k, h)
        self.o_proj = Einsum("btnh,nhd->btd", n, h, d)
        self.biased, self.normed = c.model_type == "qwen2", c.model_type == "qwen3"
        self.theta = c.rope_parameters.rope_theta if hasattr(c, "rope_parameters") else c.rope_theta
        if self.biased:
            for name, heads in (("q_bias", n), ("k_bias", k), ("v_bias", k)):
                setattr(self, name, nnx.Param(jnp.zeros(heads * h)))
        if self.normed:
            self.q_norm, self.k_norm = (RMSNorm(h, c.rms_norm_eps, "w") for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.biased:
            query, key, value = (
                each + bias[...].reshape(each.shape[2:])
                for each, bias in ((query, self.q_bias), (key, self.k_bias), (value, self.v_bias))
            )
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotated(query, self.theta), rotated(key, self.theta)
        return self.o_proj(jax.nn.dot_product_attention(query, key, value, is_causal=True))


class Layer(nnx.Module):
    """Attention and a gated feed-forward network, a norm in front of each."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, f = c.hidden_size, c.intermediate_size
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(d, c.rms_norm_eps, "w") for _ in range(2))
        self.attn = Attention(c)
        sizes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        self.mlp = Tree(**{name: nnx.Linear(*size, use_bias=False, rngs=rngs) for name, size in sizes.items()})
        self.activation = c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.input_layernorm(x))
        inner = self.post_attention_layernorm(x)
        gate = ACTIVATIONS[self.activation](self.mlp.gate_proj(inner))
        return x + self.mlp.down_proj(gate * self.mlp.up_proj(inner))


class Llama(nnx.Module):
    """Logits `(batch, tokens, vocabulary)`."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.embedder = Tree(input_embedding=nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size))))
        self.layers = nnx.List(Layer(c, rngs) for _ in range(c.num_hidden_layers))
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, "w")
        self.tied = c.tie_word_embeddings
        if not self.tied:
            self.lm_head = Einsum("btd,dv->btv", c.hidden_size, c.vocab_size)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.embedder.input_embedding[...]
        x = table[tokens]
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        return x @ table.T if self.tied else self.lm_head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("tokens", type=int, nargs="+")
    asked = parser.parse_args()
    logits = load(Llama, asked.directory)(jnp.array([asked.tokens]))
    print("most likely:", *logits[0].argmax(-1).tolist())


if __name__ == "__main__":
    main()
