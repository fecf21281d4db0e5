"""CLIP, both towers, in Flax NNX, on converted weights.

    cfmerge convert MODEL CONVERTED --names clip
    python examples/nnx_clip.py CONVERTED image.npy 49406 320 1125 539 2368 49407

The image is `(height, width, 3)`, normalised as the model expects. It prints how alike the image and the text are. A
merged model is converted in the same way.
"""

import argparse
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from nnx_layers import ACTIVATIONS, Tree, attend, load, norm


class Layer(nnx.Module):
    """Attention and a feed-forward network, a norm in front of each."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, inner = c.hidden_size, c.intermediate_size
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = Tree(**{name: nnx.Linear(d, d, rngs=rngs) for name in names})
        self.layer_norm1, self.layer_norm2 = norm(c, rngs), norm(c, rngs)
        self.mlp = Tree(fc1=nnx.Linear(d, inner, rngs=rngs), fc2=nnx.Linear(inner, d, rngs=rngs))
        self.heads, self.activation = c.num_attention_heads, c.hidden_act

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        own, normed = self.self_attn, self.layer_norm1(x)
        found = attend(own.q_proj(normed), own.k_proj(normed), own.v_proj(normed), self.heads, causal=causal)
        x = x + own.out_proj(found)
        return x + self.mlp.fc2(ACTIVATIONS[self.activation](self.mlp.fc1(self.layer_norm2(x))))


def layers(c: SimpleNamespace, rngs: nnx.Rngs) -> Tree:
    return Tree(layers=nnx.List(Layer(c, rngs) for _ in range(c.num_hidden_layers)))


class Text(nnx.Module):
    """`(batch, tokens)` to one vector each, at the token that ends the text."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        sizes = {"token_embedding": c.vocab_size, "position_embedding": c.max_position_embeddings}
        self.embeddings = Tree(**{name: nnx.Embed(rows, c.hidden_size, rngs=rngs) for name, rows in sizes.items()})
        self.encoder, self.final_layer_norm = layers(c, rngs), norm(c, rngs)
        self.end = c.eos_token_id

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding(jnp.arange(tokens.shape[1]))
        for layer in self.encoder.layers:
            x = layer(x, causal=True)
        ends = tokens.argmax(-1) if self.end == 2 else (tokens == self.end).argmax(-1)  # 2: of configs before 2023
        return self.final_layer_norm(x)[jnp.arange(len(x)), ends]


class Vision(nnx.Module):
    """`(batch, height, width, 3)` to one vector each."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, patch = c.hidden_size, (c.patch_size,) * 2
        convolution = nnx.Conv(c.num_channels, d, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs)
        positions = nnx.Embed((c.image_size // c.patch_size) ** 2 + 1, d, rngs=rngs)
        self.embeddings = Tree(
            class_embedding=nnx.Param(jnp.zeros(d)), patch_embedding=convolution, position_embedding=positions
        )
        self.pre_layrnorm, self.encoder, self.post_layernorm = norm(c, rngs), layers(c, rngs), norm(c, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        e = self.embeddings
        patches = e.patch_embedding(images)
        patches = patches.reshape(len(images), -1, patches.shape[-1])
        first = jnp.broadcast_to(e.class_embedding[...], (len(images), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1)
        x = self.pre_layrnorm(x + e.position_embedding(jnp.arange(x.shape[1])))
        for layer in self.encoder.layers:
            x = layer(x, causal=False)
        return self.post_layernorm(x[:, 0])


class CLIP(nnx.Module):
    """Logits `(images, texts)`."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        self.text_model, self.vision_model = Text(c.text_config, rngs), Vision(c.vision_config, rngs)
        self.text_projection, self.visual_projection = (
            nnx.Linear(own.hidden_size, c.projection_dim, use_bias=False, rngs=rngs)
            for own in (c.text_config, c.vision_config)
        )
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        image, text = self.visual_projection(self.vision_model(images)), self.text_projection(self.text_model(tokens))
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        return jnp.exp(self.logit_scale[...]) * image @ text.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("image")
    parser.add_argument("tokens", type=int, nargs="+")
    asked = parser.parse_args()
    logits = load(CLIP, asked.directory)(jnp.asarray(np.load(asked.image))[None], jnp.array([asked.tokens]))
    print(f"alike: {float(logits[0, 0]):.4f}")


if __name__ == "__main__":
    main()
