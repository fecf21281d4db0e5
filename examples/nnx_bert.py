"""BERT and RoBERTa as masked language models in Flax NNX, on converted weights.

    cfmerge convert MODEL CONVERTED --names bert                # or roberta
    python examples/nnx_bert.py CONVERTED 101 7592 103 102

It prints the most likely token at each position. A merged model is converted in the same way.
"""

import argparse
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from nnx_layers import ACTIVATIONS, Tree, attend, load, norm


class Layer(nnx.Module):
    """Attention and a feed-forward network, a norm behind each."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, inner = c.hidden_size, c.intermediate_size
        projections = {name: nnx.Linear(d, d, rngs=rngs) for name in ("query", "key", "value")}
        after = Tree(dense=nnx.Linear(d, d, rngs=rngs), LayerNorm=norm(c, rngs))
        self.attention = Tree(output=after)
        self.attention.self = Tree(**projections)
        self.intermediate = Tree(dense=nnx.Linear(d, inner, rngs=rngs))
        self.output = Tree(dense=nnx.Linear(inner, d, rngs=rngs), LayerNorm=norm(c, rngs))
        self.heads, self.activation = c.num_attention_heads, c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        own, after = self.attention.self, self.attention.output
        x = after.LayerNorm(x + after.dense(attend(own.query(x), own.key(x), own.value(x), self.heads)))
        inner = ACTIVATIONS[self.activation](self.intermediate.dense(x))
        return self.output.LayerNorm(x + self.output.dense(inner))


class Encoder(nnx.Module):
    """Embeddings and layers: `(batch, tokens)` to `(batch, tokens, hidden)`."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, c.hidden_size, rngs=rngs)

        self.embeddings = Tree(
            word_embeddings=table(c.vocab_size), position_embeddings=table(c.max_position_embeddings),
            token_type_embeddings=table(c.type_vocab_size), LayerNorm=norm(c, rngs),
        )  # fmt: skip
        self.encoder = Tree(layer=nnx.List(Layer(c, rngs) for _ in range(c.num_hidden_layers)))
        self.first = c.pad_token_id + 1 if c.model_type == "roberta" else 0  # RoBERTa counts positions from there

    def __call__(self, tokens: jax.Array) -> jax.Array:
        e, positions = self.embeddings, self.first + jnp.arange(tokens.shape[1])
        x = (
            e.word_embeddings(tokens)
            + e.position_embeddings(positions)
            + e.token_type_embeddings(jnp.zeros_like(tokens))
        )
        x = e.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return x


class Bert(nnx.Module):
    """BERT: logits `(batch, tokens, vocabulary)`; the output layer is the table of embeddings."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.bert = Encoder(c, rngs)
        transform = Tree(dense=nnx.Linear(c.hidden_size, c.hidden_size, rngs=rngs), LayerNorm=norm(c, rngs))
        self.cls = Tree(predictions=Tree(transform=transform, bias=nnx.Param(jnp.zeros(c.vocab_size))))
        self.activation = c.hidden_act

    def __call__(self, tokens: jax.Array) -> jax.Array:
        head = self.cls.predictions
        x = head.transform.LayerNorm(ACTIVATIONS[self.activation](head.transform.dense(self.bert(tokens))))
        return self.bert.embeddings.word_embeddings.attend(x) + head.bias[...]


class Roberta(nnx.Module):
    """RoBERTa: the same, with other names in the head."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.roberta = Encoder(c, rngs)
        dense, bias = nnx.Linear(c.hidden_size, c.hidden_size, rngs=rngs), nnx.Param(jnp.zeros(c.vocab_size))
        self.lm_head = Tree(dense=dense, layer_norm=norm(c, rngs), bias=bias)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.lm_head.layer_norm(ACTIVATIONS["gelu"](self.lm_head.dense(self.roberta(tokens))))
        return self.roberta.embeddings.word_embeddings.attend(x) + self.lm_head.bias[...]


def make(c: SimpleNamespace, rngs: nnx.Rngs) -> nnx.Module:
    return Roberta(c, rngs) if c.model_type == "roberta" else Bert(c, rngs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("tokens", type=int, nargs="+")
    asked = parser.parse_args()
    logits = load(make, asked.directory)(jnp.array([asked.tokens]))
    print("most likely:", *logits[0].argmax(-1).tolist())


if __name__ == "__main__":
    main()
