"""ViT as a classifier of images in Flax NNX, on converted weights.

    cfmerge convert MODEL CONVERTED --names vit
    python examples/nnx_vit.py CONVERTED image.npy              # (height, width, 3), normalised as the model expects

It prints the class. A merged model is converted in the same way.
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
        projections = {name: nnx.Linear(d, d, rngs=rngs) for name in ("query", "key", "value")}
        self.attention = Tree(attention=Tree(**projections), output=Tree(dense=nnx.Linear(d, d, rngs=rngs)))
        self.intermediate = Tree(dense=nnx.Linear(d, inner, rngs=rngs))
        self.output = Tree(dense=nnx.Linear(inner, d, rngs=rngs))
        self.layernorm_before, self.layernorm_after = norm(c, rngs), norm(c, rngs)
        self.heads, self.activation = c.num_attention_heads, c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        own, normed = self.attention.attention, self.layernorm_before(x)
        found = attend(own.query(normed), own.key(normed), own.value(normed), self.heads)
        x = x + self.attention.output.dense(found)
        inner = ACTIVATIONS[self.activation](self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dense(inner)


class ViT(nnx.Module):
    """Logits `(batch, classes)` of images `(batch, height, width, 3)`."""

    def __init__(self, c: SimpleNamespace, rngs: nnx.Rngs):
        d, patch = c.hidden_size, (c.patch_size,) * 2
        classes = len(vars(c.id2label)) if hasattr(c, "id2label") else 2
        projection = nnx.Conv(c.num_channels, d, patch, strides=patch, padding="VALID", rngs=rngs)
        embeddings = Tree(
            cls_token=nnx.Param(jnp.zeros((1, 1, d))), patch_embeddings=Tree(projection=projection),
            position_embeddings=nnx.Param(jnp.zeros((1, (c.image_size // c.patch_size) ** 2 + 1, d))),
        )  # fmt: skip
        layers = nnx.List(Layer(c, rngs) for _ in range(c.num_hidden_layers))
        self.vit = Tree(embeddings=embeddings, encoder=Tree(layer=layers), layernorm=norm(c, rngs))
        self.classifier = nnx.Linear(d, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        e = self.vit.embeddings
        patches = e.patch_embeddings.projection(images)
        patches = patches.reshape(len(images), -1, patches.shape[-1])
        first = jnp.broadcast_to(e.cls_token[...], (len(images), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + e.position_embeddings[...]
        for layer in self.vit.encoder.layer:
            x = layer(x)
        return self.classifier(self.vit.layernorm(x)[:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("image")
    asked = parser.parse_args()
    logits = load(ViT, asked.directory)(jnp.asarray(np.load(asked.image))[None])
    print("class:", int(logits[0].argmax()))


if __name__ == "__main__":
    main()
