"""The zoo of `tangents.py`: the demo's base and data, streams of parts, and the two ways to train on a part."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge.compose.tangent_training import fit
from cfmerge.demo import archives, data, model, train
from cfmerge.demo.data import Split, Task

TRUNK, STEPS, BATCH, RATE, KAPPA = model.Trunk(), 250, 64, 1e-3, 15.0


class Part(NamedTuple):
    """What one component learns, and the images that it is judged on, under a head."""

    name: str
    head: str
    train: Split
    validation: Split
    test: Split


class Zoo(NamedTuple):
    base: Any  # {"trunk": ..., "heads": {task: (classes, dim)}}
    tasks: Mapping[str, Task]
    seed: int
    steps: int  # of one training


@functools.cache
def network(head: str) -> Callable[[Any, jax.Array], jax.Array]:
    """`f(parameters, images)` under a head; the same object each time, so that it is compiled once."""

    def outputs(params: Any, images: jax.Array) -> jax.Array:
        return train.features(TRUNK, params["trunk"], train.scale_pixels(images)) @ params["heads"][head].T

    return outputs


def zoo(seed: int, steps: int = STEPS) -> Zoo:
    """The demo's tasks and base."""
    tasks = data.load_tasks(archives.cache_directory(), seed)
    split, letters = data.pretraining_split(tasks, np.random.default_rng((seed, 1)))
    start, drawn, order = jax.random.split(jax.random.key(seed), 3)
    sizes = [*(task.classes for task in tasks), letters]
    heads = [model.init_head(jax.random.fold_in(drawn, i), size, TRUNK.dim) for i, size in enumerate(sizes)]
    trunk = train.fit(TRUNK, train.Schedule(600, 256, 2e-3), model.init_trunk(TRUNK, start), order, split, heads)
    named = {task.name: jnp.asarray(head) for task, head in zip(tasks, heads[:-1], strict=True)}
    return Zoo({"trunk": trunk, "heads": named}, {task.name: task for task in tasks}, seed, steps)


def parts(zoo: Zoo, stream: str) -> list[Part]:
    """The parts of a stream in their order."""
    kind, _, name = stream.partition(": ")
    if kind == "task":
        return [Part(t.name, t.name, t.train, t.validation, t.test) for t in zoo.tasks.values()]
    task = zoo.tasks[name]
    if kind == "class":
        pairs = [(first, first + 1) for first in range(0, task.classes, 2)]
        return [
            Part(f"{a}-{b}", name, *(among(s, (a, b)) for s in (task.train, task.validation, task.test)))
            for a, b in pairs
        ]
    order = np.random.default_rng((zoo.seed, 2)).permutation(len(task.train))
    shards = [Split(task.train.images[rows], task.train.labels[rows]) for rows in np.array_split(order, 8)]
    return [Part(f"shard {i}", name, shard, task.validation, task.test) for i, shard in enumerate(shards)]


def of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    return split.images, split.labels


def among(split: Split, classes: Sequence[int]) -> Split:
    rows = np.isin(split.labels, classes)
    return Split(split.images[rows], split.labels[rows])


# --- training -----------------------------------------------------------------------------------------------------


@functools.cache
def optimiser(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(RATE, steps), b2=0.98, weight_decay=1e-4)


def batches(split: Split, classes: int, steps: int, seed: Sequence[int]) -> Iterator[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(split), BATCH)
        yield jnp.asarray(split.images[rows]), jax.nn.one_hot(split.labels[rows], classes)


@functools.partial(jax.jit, static_argnames=("head", "steps", "entropy"))
def ordinary_step(
    head: str, steps: int, entropy: bool, params: Any, moments: Any, images: jax.Array, targets: jax.Array
) -> tuple[Any, Any]:
    def loss(trunk: Any) -> jax.Array:
        z = network(head)({**params, "trunk": trunk}, images)
        squares = jnp.mean((z - KAPPA * targets) ** 2)
        return optax.softmax_cross_entropy(z, targets).mean() if entropy else squares

    gradient = jax.grad(loss)(params["trunk"])
    updates, moments = optimiser(steps).update(gradient, moments, params["trunk"])
    return {**params, "trunk": optax.apply_updates(params["trunk"], updates)}, moments


def ordinary(start: Any, part: Part, seed: Sequence[int], steps: int, entropy: bool = True) -> Any:
    """Parameters fine-tuned from `start` in the ordinary way."""
    params, moments = start, optimiser(steps).init(start["trunk"])
    for images, targets in batches(part.train, len(start["heads"][part.head]), steps, seed):
        params, moments = ordinary_step(part.head, steps, entropy, params, moments, images, targets)
    return params


def tangent(base: Any, part: Part, seed: Sequence[int], steps: int) -> Any:
    """A component for the part: its tangent by name of leaf."""
    drawn = batches(part.train, len(base["heads"][part.head]), steps, seed)
    return fit(network(part.head), base, drawn, optimiser(steps), trains="trunk/*", kappa=KAPPA)
