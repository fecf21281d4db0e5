"""Fine-tuning by LoRA under frozen heads: low-rank additions to the kernels of all blocks, added to them in the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cfmerge.demo.data import Split
from cfmerge_accuracy.images.heads import Head, Heads, cross_entropy, stacked
from cfmerge_accuracy.vision.model import Vit, features
from cfmerge_accuracy.vision.train import Schedule, drawn
from cfmerge_accuracy.zoo import Params

SCALE = 2.0  # alpha / rank


@dataclasses.dataclass(frozen=True)
class LowRank(Schedule):
    """Each kernel `W` `(in, out)` of a block stays and gets `2 A B` added; all else stays.

    Attributes:
        rank: of the additions.
        shared: all experts of a seed start from the same `A`, as if one script had made them.
    """

    rank: int = 8
    shared: bool = False


def additions(params: Params, rank: int, generator: np.random.Generator) -> Params:
    """For each block's kernel a random `A` `(in, rank)` and `B` `(rank, out)` of zeros, by the kernel's path."""
    found = {}
    for path, leaf in sorted(flatten_dict(params).items()):
        if path[-1] == "kernel" and path[0].startswith("block_"):
            height, width = leaf.shape
            a = generator.standard_normal((height, rank)) / math.sqrt(height)
            found[path] = {"a": a.astype(np.float32), "b": np.zeros((rank, width), np.float32)}
    return found


def added(params: Params, factors: Params) -> Params:
    """The tree with the products of these factors added to its kernels."""
    flat = dict(flatten_dict(params))
    for path, own in factors.items():
        flat[path] = flat[path] + SCALE * own["a"] @ own["b"]
    return unflatten_dict(flat)


@partial(jax.jit, static_argnames=("model", "schedule"))
def _fit(
    model: Vit, schedule: LowRank, params: Params, factors: Params, images: jax.Array, labels: jax.Array, heads: Heads
) -> Params:
    """One step for each of `images (steps, batch, 28, 28)`; labels are rows of the heads."""
    optimizer = schedule.optimizer()

    def loss(factors: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(features(model, added(params, factors), images), labels, heads)

    def step(state: tuple[Params, optax.OptState], drawn: tuple[jax.Array, jax.Array]) -> Any:
        factors, moments = state
        gradient = jax.grad(loss)(factors, *drawn)
        updates, moments = optimizer.update(gradient, moments, factors)
        return (optax.apply_updates(factors, updates), moments), None

    state, _ = jax.lax.scan(step, (factors, optimizer.init(factors)), (images, labels))
    return added(params, state[0])


def fit(
    model: Vit,
    schedule: LowRank,
    params: Params,
    seed: Sequence[int],
    splits: Mapping[int, Split],
    heads: Sequence[Head],
) -> Params:
    """As `train.fit`, with low-rank additions as all that is trained; returns the whole tree.

    Args:
        seed: of the order of the images and of the additions; the first number alone draws those that are shared.
    """
    images, labels = drawn(schedule, seed, splits, heads)
    generator = np.random.default_rng([seed[0]] if schedule.shared else [*seed, schedule.rank])
    factors = additions(params, schedule.rank, generator)
    return jax.device_get(_fit(model, schedule, params, factors, images, labels, stacked(heads)))
