"""T5 in Flax NNX, on converted weights.

    cfmerge convert MODEL CONVERTED --names t5
    python examples/nnx_t5.py CONVERTED 8774 296 1

It prints the tokens that the model generates greedily, up to `--most` of them. A merged model is converted in the same
way.
"""

import argparse
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from nnx_layers import ACTIVATIONS, RMSNorm, Tree, attend, load


def buckets(distance: jax.Array, count: int, longest: int, both: bool) -> jax.Array:
    """The bucket of each distance `key - query`: exact when near, growing with its logarithm when far."""
    if both:
        count //= 2
        start, distance = jnp.where(distance > 0, count, 0), jnp.abs(distance)
    else:
        start, distance = 0, jnp.maximum(-distance, 0)
    exact = count // 2
    far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(longest / exact) * (count - exact)
    return start + jnp.where(distance < exact, distance, jnp.minimum(exact + far.astype(int), count - 1))


def dense(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)


def attention(c: SimpleNamespace, rngs: nnx.Rngs, first: bool = False) -> Tree:
    inner = c.num_heads * c.d_kv
    made = Tree(**{name: dense(c.d_model, inner, rngs) for name in "qkv"}, o=dense(inner, c.d_model, rngs))
    if first:
        made.relative_attention_bias = nnx.Embed(c.relative_attention_num_buckets, c.num_heads, rngs=rngs)
    return made


class Stack(nnx.Module):
    """The encoder or the decoder; a block is `layer/0`, `layer/1`, ..., each with a norm in front."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs, decoder: bool):
        def normed(**module: object) -> Tree:
            return Tree(**module, layer_norm=RMSNorm(c.d_model, c.layer_norm_epsilon, "weight"))

        inner = ("wi_0", "wi_1") if c.is_gated_act else ("wi",)
        blocks = []
        for number in range((c.num_decoder_layers if decoder else None) or c.num_layers):
            layers = [normed(SelfAttention=attention(c, rngs, first=number == 0))]
            layers += [normed(EncDecAttention=attention(c, rngs))] if decoder else []
            into = {name: dense(c.d_model, c.d_ff, rngs) for name in inner}
            layers.append(normed(DenseReluDense=Tree(**into, wo=dense(c.d_ff, c.d_model, rngs))))
            blocks.append(Tree(layer=nnx.List(layers)))
        self.block = nnx.List(blocks)
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, "weight")
        self.heads, self.activation, self.gated, self.decoder = c.num_heads, c.dense_act_fn, c.is_gated_act, decoder
        self.buckets = c.relative_attention_num_buckets, c.relative_attention_max_distance

    def __call__(self, x: jax.Array, encoded: jax.Array | None = None) -> jax.Array:
        bias = self.bias(x.shape[1])
        for block in self.block:
            own, *cross, forward = block.layer
            x = x + self.attended(own.SelfAttention, own.layer_norm(x), None, bias)
            for layer in cross:
                x = x + self.attended(layer.EncDecAttention, layer.layer_norm(x), encoded, None)
            x = x + self.forward(forward.DenseReluDense, forward.layer_norm(x))
        return self.final_layer_norm(x)

    def bias(self, tokens: int) -> jax.Array:
        """A number that is added to each logit of attention, by distance: `(1, heads, query, key)`."""
        table, places = self.block[0].layer[0].SelfAttention.relative_attention_bias, jnp.arange(tokens)
        found = buckets(places[None] - places[:, None], *self.buckets, both=not self.decoder)
        return table(found).transpose(2, 0, 1)[None]

    def attended(self, own: Tree, x: jax.Array, encoded: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        seen, causal = (x, self.decoder) if encoded is None else (encoded, False)
        query, key, value = own.q(x), own.k(seen), own.v(seen)
        return own.o(attend(query, key, value, self.heads, bias=bias, scale=1.0, causal=causal))

    def forward(self, own: Tree, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        return own.wo(activation(own.wi_0(x)) * own.wi_1(x) if self.gated else activation(own.wi(x)))


class T5(nnx.Module):
    """Logits `(batch, tokens, vocabulary)` of what the decoder says next."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.shared = nnx.Embed(c.vocab_size, c.d_model, rngs=rngs)
        self.encoder, self.decoder = Stack(c, rngs, decoder=False), Stack(c, rngs, decoder=True)
        self.tied = getattr(c, "tie_word_embeddings", True)
        self.scale = c.d_model**-0.5 if getattr(c, "scale_decoder_outputs", self.tied) else 1.0
        if not self.tied:
            self.lm_head = dense(c.d_model, c.vocab_size, rngs)

    def __call__(self, tokens: jax.Array, said: jax.Array) -> jax.Array:
        x = self.decoder(self.shared(said), self.encoder(self.shared(tokens)))
        return self.shared.attend(x * self.scale) if self.tied else self.lm_head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--most", type=int, default=8)
    asked = parser.parse_args()
    model, said = load(T5, asked.directory), [0]
    while len(said) <= asked.most and said[-1] != 1:  # 0 begins, 1 ends
        said.append(int(model(jnp.array([asked.tokens]), jnp.array([said]))[0, -1].argmax()))
    print("generates:", *said[1:])


if __name__ == "__main__":
    main()
