"""GPT-2 in Flax NNX, on converted weights.

    cfmerge convert MODEL CONVERTED --names gpt2
    python examples/nnx_gpt2.py CONVERTED 464 3139 286 4881

It prints the most likely token after each of them. A merged model is converted in the same way.
"""

import argparse
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from nnx_layers import ACTIVATIONS, Tree, attend, load


class Conv1D(nnx.Module):
    """A dense layer whose kernel is `(out, in)`."""

    def __init__(self, inputs: int, outputs: int):
        self.kernel, self.bias = nnx.Param(jnp.zeros((outputs, inputs))), nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].T + self.bias[...]


def norm(c: SimpleNamespace, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(c.n_embd, epsilon=c.layer_norm_epsilon, rngs=rngs)


class Block(nnx.Module):
    """Attention and a feed-forward network, a norm in front of each."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, inner = c.n_embd, c.n_inner or 4 * c.n_embd
        self.ln_1, self.ln_2 = norm(c, rngs), norm(c, rngs)
        self.attn = Tree(c_attn=Conv1D(d, 3 * d), c_proj=Conv1D(d, d))
        self.mlp = Tree(c_fc=Conv1D(d, inner), c_proj=Conv1D(inner, d))
        self.heads, self.activation = c.n_head, c.activation_function

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = jnp.split(self.attn.c_attn(self.ln_1(x)), 3, axis=-1)
        x = x + self.attn.c_proj(attend(query, key, value, self.heads, causal=True))
        return x + self.mlp.c_proj(ACTIVATIONS[self.activation](self.mlp.c_fc(self.ln_2(x))))


class GPT2(nnx.Module):
    """Logits `(batch, tokens, vocabulary)`; the output layer is the table of embeddings, unless it is apart."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.transformer = Tree(
            wte=nnx.Embed(c.vocab_size, c.n_embd, rngs=rngs), wpe=nnx.Embed(c.n_positions, c.n_embd, rngs=rngs),
            h=nnx.List(Block(c, rngs) for _ in range(c.n_layer)), ln_f=norm(c, rngs),
        )  # fmt: skip
        self.tied = c.tie_word_embeddings
        if not self.tied:
            self.lm_head = nnx.Linear(c.n_embd, c.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        model = self.transformer
        x = model.wte(tokens) + model.wpe(jnp.arange(tokens.shape[1]))
        for block in model.h:
            x = block(x)
        x = model.ln_f(x)
        return model.wte.attend(x) if self.tied else self.lm_head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("tokens", type=int, nargs="+")
    asked = parser.parse_args()
    logits = load(GPT2, asked.directory)(jnp.array([asked.tokens]))
    print("most likely:", *logits[0].argmax(-1).tolist())


if __name__ == "__main__":
    main()
