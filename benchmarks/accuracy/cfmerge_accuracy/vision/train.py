"""Pre-training and fine-tuning under frozen heads: all steps in one jitted loop, deterministic given the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from cfmerge.demo.data import Split
from cfmerge_accuracy.images.heads import Head, Heads, cross_entropy, stacked
from cfmerge_accuracy.vision.model import Vit, features
from cfmerge_accuracy.zoo import Params


@dataclasses.dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up over the first tenth and a cosine decay to zero.

    Its memory of squared gradients is short (0.98): with the usual 0.999, some hundred steps reach far less.
    """

    steps: int
    batch: int
    learning_rate: float

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, self.steps // 10), self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=1e-4))


@partial(jax.jit, static_argnames=("model", "schedule"))
def _fit(model: Vit, schedule: Schedule, params: Params, images: jax.Array, labels: jax.Array, heads: Heads) -> Params:
    """One step for each of `images (steps, batch, 28, 28)`; labels are rows of the heads."""
    optimizer = schedule.optimizer()

    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(features(model, params, images), labels, heads)

    def step(state: tuple[Params, optax.OptState], drawn: tuple[jax.Array, jax.Array]) -> Any:
        params, moments = state
        gradient = jax.grad(loss)(params, *drawn)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    state, _ = jax.lax.scan(step, (params, optimizer.init(params)), (images, labels))
    return state[0]


def fit(
    model: Vit,
    schedule: Schedule,
    params: Params,
    seed: Sequence[int],
    splits: Mapping[int, Split],
    heads: Sequence[Head],
) -> Params:
    """Trains on the splits in equal shares, image by image among the classes of its own head.

    Args:
        seed: of the order of the images.
        splits: by the position of their heads.
        heads: of all tasks, those too that are not trained on: so all experts share one compilation.
    """
    images, labels = drawn(schedule, seed, splits, heads)
    return jax.device_get(_fit(model, schedule, params, images, labels, stacked(heads)))


def drawn(
    schedule: Schedule, seed: Sequence[int], splits: Mapping[int, Split], heads: Sequence[Head]
) -> tuple[np.ndarray, np.ndarray]:
    """Images `(steps, batch, 28, 28)` and their labels `(steps, batch)`, which count through the rows of all heads."""
    generator = np.random.default_rng(seed)
    first = np.cumsum([0, *(len(head.offsets) for head in heads)])
    sources = generator.choice(list(splits), schedule.steps * schedule.batch)
    images = np.empty((len(sources), *next(iter(splits.values())).images.shape[1:]), np.uint8)
    labels = np.empty(len(sources), np.int32)
    for number, split in splits.items():
        own = np.flatnonzero(sources == number)
        rows = _epochs(len(split), len(own), generator)
        images[own], labels[own] = split.images[rows], split.labels[rows] + first[number]
    shape = (schedule.steps, schedule.batch)
    return images.reshape(*shape, *images.shape[1:]), labels.reshape(shape)


def _epochs(length: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` row numbers: all rows in random order, again and again."""
    return np.concatenate([generator.permutation(length) for _ in range(-(-count // length))])[:count]
