"""Frozen heads above a trunk of images: class embeddings, fixed before fine-tuning, as CLIP's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOGIT_SCALE = 100.0  # as CLIP ends with


class Head(NamedTuple):
    """A frozen head: `logits = LOGIT_SCALE * (features @ embeddings.T - offsets)`.

    Attributes:
        embeddings: `(classes, dim)`, of length 1.
        offsets: `(classes,)`.
    """

    embeddings: np.ndarray
    offsets: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """`(N, dim)` to `(N, classes)`."""
        return LOGIT_SCALE * (features @ self.embeddings.T - self.offsets)


def random_head(key: jax.Array, classes: int, dim: int) -> Head:
    """Orthogonal rows, no offsets: for pre-training, with a softmax less sharp than the tasks'."""
    return Head(np.asarray(0.3 * jax.random.orthogonal(key, dim)[:classes]), np.zeros(classes, np.float32))


def class_embeddings(features: np.ndarray, labels: np.ndarray, classes: int, shrinkage: float = 0.1) -> Head:
    """Where the base itself puts a task's classes, from its features `(N, dim)` of training images.

    With class means `m_c`, their mean `m`, and the covariance `S` within classes, shrunk towards a multiple of the
    identity: `e_c = S^-1 (m_c - m)` at length 1, and the score of features `f` is `e_c . (f - m)`. Without `S`,
    letters' embeddings are almost parallel, since all that the base knows of is clothes.
    """
    means = np.stack([features[labels == label].mean(axis=0) for label in range(classes)])
    centre = means.mean(axis=0)
    within = features - means[labels]
    covariance = within.T @ within / len(within)
    identity = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    directions = np.linalg.solve((1 - shrinkage) * covariance + shrinkage * identity, (means - centre).T).T
    embeddings = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return Head(embeddings.astype(np.float32), (embeddings @ centre).astype(np.float32))


class Heads(NamedTuple):
    """The heads of all tasks, one below the other: `(classes, dim)`, `(classes,)`, and each row's task `(classes,)`."""

    embeddings: np.ndarray
    offsets: np.ndarray
    task: np.ndarray


def stacked(heads: Sequence[Head]) -> Heads:
    task = np.repeat(np.arange(len(heads)), [len(head.offsets) for head in heads])
    embeddings, offsets = (np.concatenate(parts) for parts in zip(*heads, strict=True))
    return Heads(embeddings, offsets, task)


def log_likelihoods(features: jax.Array, tasks: jax.Array, heads: Heads) -> jax.Array:
    """`(batch, classes)`: of each image among the classes of its own task, `tasks (batch,)`; else minus infinity."""
    logits = LOGIT_SCALE * (features @ heads.embeddings.T - heads.offsets)
    return jax.nn.log_softmax(jnp.where(heads.task == tasks[:, None], logits, -jnp.inf))


def cross_entropy(features: jax.Array, labels: jax.Array, heads: Heads) -> jax.Array:
    """Mean over a batch; labels `(batch,)` are rows of the heads, each image among the classes of its own task."""
    found = log_likelihoods(features, jnp.asarray(heads.task)[labels], heads)
    return -jnp.take_along_axis(found, labels[:, None], axis=1).mean()
