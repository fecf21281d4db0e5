"""Pre-training and fine-tuning under frozen heads, deterministic given the seed.

One jitted step is called again and again: XLA's convolutions are many times slower inside a loop of its own on CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from cfmerge.demo.data import Split
from cfmerge.demo.train import Schedule, shift
from cfmerge_accuracy.convolutional.model import ConvNet
from cfmerge_accuracy.images.heads import Head, Heads, cross_entropy, stacked
from cfmerge_accuracy.zoo import Params


class State(NamedTuple):
    params: Params
    batch_stats: Params
    moments: optax.OptState


@partial(jax.jit, static_argnames=("model", "schedule"))
def _step(
    model: ConvNet,
    schedule: Schedule,
    state: State,
    key: jax.Array,
    number: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    heads: Heads,
) -> State:
    """One step on `images (batch, 28, 28)`; labels are rows of the heads."""
    moved = shift(jax.random.fold_in(key, number), images)

    def loss(params: Params) -> tuple[jax.Array, Params]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        found, changed = model.apply(variables, moved, train=True, mutable=["batch_stats"])
        return cross_entropy(found, labels, heads), changed["batch_stats"]

    gradient, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    updates, moments = schedule.optimizer().update(gradient, state.moments, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, moments)


def fit(
    model: ConvNet,
    schedule: Schedule,
    variables: Params,
    seed: Sequence[int],
    splits: Mapping[int, Split],
    heads: Sequence[Head],
) -> Params:
    """Trains on the splits in equal shares, image by image among the classes of its own head.

    Args:
        variables: where it starts, running statistics among them.
        seed: of the order of the images and of their shifts.
        splits: by the position of their heads.
        heads: of all tasks, those too that are not trained on: so all experts share one compilation.
    """
    generator = np.random.default_rng(seed)
    key = jax.random.key(int(generator.integers(2**31)))
    state = State(**variables, moments=schedule.optimizer().init(variables["params"]))
    every = stacked(heads)
    for number, (images, labels) in enumerate(drawn(schedule, splits, heads, generator)):
        state = _step(model, schedule, state, key, number, images, labels, every)
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats})


def drawn(
    schedule: Schedule, splits: Mapping[int, Split], heads: Sequence[Head], generator: np.random.Generator
) -> Any:
    """For each step its images `(batch, 28, 28)` and its labels `(batch,)`, which count through the rows of all heads.

    Each split is walked through in random order, again and again.
    """
    first = np.cumsum([0, *(len(head.offsets) for head in heads)])
    orders: dict[int, list[int]] = {number: [] for number in splits}
    for _ in range(schedule.steps):
        sources = generator.choice(list(splits), schedule.batch)
        images, labels = [], []
        for number in sources:
            if not orders[number]:
                orders[number] = generator.permutation(len(splits[number])).tolist()
            row = orders[number].pop()
            images.append(splits[number].images[row])
            labels.append(splits[number].labels[row] + first[number])
        yield np.stack(images), np.array(labels, np.int32)
