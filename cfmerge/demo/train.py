"""Pre-training, fine-tuning and evaluation: all steps in one jitted loop, deterministic given the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge.demo.data import Split
from cfmerge.demo.model import Params, Trunk

State = tuple[Params, optax.OptState]


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up over the first tenth and a cosine decay to zero."""

    steps: int
    batch: int
    learning_rate: float

    def optimizer(self) -> optax.GradientTransformation:
        warmup = max(1, self.steps // 10)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image `(batch, 28, 28)` by up to two pixels each way."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2)))
    corners = jax.random.randint(key, (len(images), 2), 0, 5)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, images.shape[1:]))(padded, corners)


def scale_pixels(images: jax.Array) -> jax.Array:
    """uint8 to float32 in 0..1."""
    return images.astype(jnp.float32) / 255


def features(trunk: Trunk, params: Params, images: jax.Array) -> jax.Array:
    """The trunk's features of images `(batch, 28, 28)` in 0..1: `(batch, dim)`."""
    result: Any = trunk.apply({"params": params}, images)
    return jnp.asarray(result)


def loss(
    trunk: Trunk, params: Params, images: jax.Array, labels: jax.Array, rows: jax.Array, group: jax.Array
) -> jax.Array:
    """Mean cross-entropy of images `(batch, 28, 28)`, each among the classes of its own head only.

    Args:
        rows: all heads, one below the other, `(classes, dim)`; labels are positions in it.
        group: which head each row belongs to, `(classes,)`.
    """
    logits = features(trunk, params, images) @ rows.T
    logits = jnp.where(group == group[labels][:, None], logits, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames=("trunk", "schedule"))
def _fit(
    trunk: Trunk,
    schedule: Schedule,
    params: Params,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    group: jax.Array,
) -> Params:
    optimizer = schedule.optimizer()

    def step(state: tuple[Params, optax.OptState], key: jax.Array) -> tuple[tuple[Params, optax.OptState], None]:
        params, moments = state
        draw_key, shift_key = jax.random.split(key)
        drawn = jax.random.randint(draw_key, (schedule.batch,), 0, len(labels))
        batch = shift(shift_key, scale_pixels(images[drawn]))
        gradient = jax.grad(partial(loss, trunk))(params, batch, labels[drawn], rows, group)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    state, _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, schedule.steps))
    return state[0]


def fit(
    trunk: Trunk,
    schedule: Schedule,
    params: Params,
    key: jax.Array,
    split: Split,
    heads: Sequence[np.ndarray],
) -> Params:
    """Trains the trunk under frozen heads; labels count through the heads' rows, in order."""
    rows = jnp.concatenate([jnp.asarray(head) for head in heads])
    group = jnp.repeat(jnp.arange(len(heads)), jnp.asarray([len(head) for head in heads]))
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    return jax.block_until_ready(_fit(trunk, schedule, params, key, images, labels, rows, group))


@partial(jax.jit, static_argnames=("trunk",))
def _predict(trunk: Trunk, params: Params, images: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.argmax(features(trunk, params, scale_pixels(images)) @ head.T, axis=-1)


def accuracy(trunk: Trunk, params: Params, split: Split, head: np.ndarray) -> float:
    """Share of the split's images whose best-scoring class is the right one."""
    predicted = _predict(trunk, params, jnp.asarray(split.images), jnp.asarray(head))
    return float(np.mean(np.asarray(predicted) == split.labels))
