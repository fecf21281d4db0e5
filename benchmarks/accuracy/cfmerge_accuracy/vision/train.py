"""Pre-training and fine-tuning under frozen heads: all steps in one jitted loop, deterministic given the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge.demo.data import Split
from cfmerge_accuracy.vision.model import LOGIT_SCALE, Head, Vit
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


def features(model: Vit, params: Params, images: jax.Array) -> jax.Array:
    """`(batch, 28, 28)` uint8 to `(batch, dim)`."""
    result: Any = model.apply({"params": params}, images)
    return jnp.asarray(result)


class Heads(NamedTuple):
    """The heads of all tasks, one below the other: `(classes, dim)`, `(classes,)`, and each row's task `(classes,)`."""

    embeddings: np.ndarray
    offsets: np.ndarray
    task: np.ndarray


def stacked(heads: Sequence[Head]) -> Heads:
    task = np.repeat(np.arange(len(heads)), [len(head.offsets) for head in heads])
    embeddings, offsets = (np.concatenate(parts) for parts in zip(*heads, strict=True))
    return Heads(embeddings, offsets, task)


def log_likelihoods(model: Vit, params: Params, images: jax.Array, tasks: jax.Array, heads: Heads) -> jax.Array:
    """`(batch, classes)`: of each image among the classes of its own task, `tasks (batch,)`; else minus infinity."""
    logits = LOGIT_SCALE * (features(model, params, images) @ heads.embeddings.T - heads.offsets)
    return jax.nn.log_softmax(jnp.where(heads.task == tasks[:, None], logits, -jnp.inf))


@partial(jax.jit, static_argnames=("model", "schedule"))
def _fit(model: Vit, schedule: Schedule, params: Params, images: jax.Array, labels: jax.Array, heads: Heads) -> Params:
    """One step for each of `images (steps, batch, 28, 28)`; labels are rows of the heads."""
    optimizer = schedule.optimizer()

    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        found = log_likelihoods(model, params, images, jnp.asarray(heads.task)[labels], heads)
        return -jnp.take_along_axis(found, labels[:, None], axis=1).mean()

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
    generator = np.random.default_rng(seed)
    first = np.cumsum([0, *(len(head.offsets) for head in heads)])
    sources = generator.choice(list(splits), schedule.steps * schedule.batch)
    images = np.empty((len(sources), *next(iter(splits.values())).images.shape[1:]), np.uint8)
    labels = np.empty(len(sources), np.int32)
    for number, split in splits.items():
        drawn = np.flatnonzero(sources == number)
        rows = _epochs(len(split), len(drawn), generator)
        images[drawn], labels[drawn] = split.images[rows], split.labels[rows] + first[number]
    images = images.reshape(schedule.steps, schedule.batch, *images.shape[1:])
    fitted = _fit(model, schedule, params, images, labels.reshape(images.shape[:2]), stacked(heads))
    return jax.device_get(fitted)


def _epochs(length: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` row numbers: all rows in random order, again and again."""
    return np.concatenate([generator.permutation(length) for _ in range(-(-count // length))])[:count]
