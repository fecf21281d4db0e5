"""What is fixed before any training: tasks, heads, and texts after the embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge_accuracy.text.bert import Encoder, MiniLM
from cfmerge_accuracy.text.data import Task, Texts, buckets, tokenise
from cfmerge_accuracy.zoo import Params

Batch = tuple[np.ndarray, jax.Array, jax.Array]  # rows, embedded tokens, mask
BATCH = 40  # divides the usual 200 and 80 texts of a split, so that few shapes are compiled
LOGIT_SCALE = 20.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is fixed before any training: the base, the tasks by name, and their heads `(classes, width)`."""

    minilm: MiniLM
    tasks: Mapping[str, Task]
    heads: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, minilm: MiniLM, tasks: Mapping[str, Task]) -> Setting:
        return cls(minilm, tasks, {name: phrases_head(minilm, task.classes) for name, task in tasks.items()})


def phrases_head(minilm: MiniLM, phrases: Sequence[str]) -> np.ndarray:
    """A frozen head `(classes, width)`: the base's unit features of one phrase per class, times the logit scale."""
    ids, lengths = tokenise(minilm.tokenizer, phrases, 16)
    texts = Texts(ids, lengths, np.zeros(len(phrases), np.int32))
    return LOGIT_SCALE * flax_features(minilm.module, minilm.encoder, embedded(minilm, texts))


def embedded(minilm: MiniLM, texts: Texts, batch: int = BATCH, multiple: int = 8) -> list[Batch]:
    """Batches of texts of like length, after the embeddings; the last one is filled up with empty texts."""
    made = []
    for rows, length in buckets(texts.lengths, batch, multiple):
        ids, lengths = np.zeros((batch, length), np.int32), np.ones(batch, np.int32)
        ids[: len(rows)], lengths[: len(rows)] = texts.ids[rows, :length], texts.lengths[rows]
        mask = np.arange(length) < lengths[:, None]
        made.append((rows, jnp.asarray(minilm.embed(ids)), jnp.asarray(mask)))
    return made


@partial(jax.jit, static_argnames="encoder")
def _features(encoder: Encoder, params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.asarray(encoder.apply({"params": params}, x, mask))


def flax_features(encoder: Encoder, params: Params, batches: Sequence[Batch]) -> np.ndarray:
    """`(N, width)`, in the order of the texts."""
    params = jax.tree.map(jnp.asarray, params)
    made = [(rows, _features(encoder, params, x, mask)) for rows, x, mask in batches]
    found = np.zeros((sum(len(rows) for rows, _ in made), made[0][1].shape[1]), np.float32)
    for rows, features in made:
        found[rows] = np.asarray(features)[: len(rows)]
    return found
