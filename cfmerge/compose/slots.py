"""Composers that keep something of every expert by itself, each in a slot of its own.

    slots(base)[part]            (T, ...) zeros for T experts
    update(slots, D_t)           slot t is filled; the delta is forgotten

So experts are streamed: the working set is one delta and what is kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.deltas import of_deltas
from cfmerge.core.part import NO_CONTEXT, Composer, Context, Method, Needs, Report

Parts = Mapping[str, Array]
Keep = Callable[[Array, Array], Parts]  # of a base and a delta: what is kept of the expert
MATRICES = Needs("tensor", weights="none")
ENTRIES = Needs("entry", weights="none")


def composer(method: Method, **changes: Any) -> Composer:
    """The method, whose `solve` returns parts, as a composer."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return Composer(**fields | changes)


def in_slots(keep: Keep, experts: int, needs: Needs = MATRICES, *, based: bool = False, **fields: Any) -> Composer:
    """The composer that keeps `keep(base, delta)` of each expert, stacked over the experts.

    Args:
        based: `keep` looks at the base; otherwise it is not held, and an array of its shape comes instead.
    """

    def init(base: Array) -> tuple[Array, Parts]:
        kept = jax.eval_shape(keep, base, base)
        held = base if based else jnp.zeros((), base.dtype)
        return held, {part: jnp.zeros((experts, *leaf.shape), leaf.dtype) for part, leaf in kept.items()}

    def update(
        statistic: tuple[Array, Parts], delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> tuple[Array, Parts]:
        base, slots = statistic
        own = keep(base if based else delta, delta)
        filled = {
            part: lax.dynamic_update_index_in_dim(slot, own[part].astype(slot.dtype), context.number, 0)
            for part, slot in slots.items()
        }
        return base, filled

    def solve(statistic: tuple[Array, Parts]) -> tuple[Parts, Report]:
        return statistic[1], {}

    return Composer("slots", init, update, solve, needs=needs, **fields)


@functools.cache  # one structure for all tensors
def whole(part: str) -> Composer:
    """The composer that keeps all deltas as they are, `(T, ...)`, under that name."""

    def kept(base: Array, deltas: Array, weights: Array) -> tuple[Parts, Report]:
        return {part: deltas}, {}

    return composer(of_deltas(kept, ENTRIES, name=part))


@functools.cache
def whole_of_all(part: str, experts: int) -> Composer:
    """`whole`, with zeros for the experts that lack the tensor, so that its rows are numbered as all experts are."""
    made = in_slots(lambda base, delta: {part: delta}, experts, ENTRIES)
    return dataclasses.replace(made, name=part)


@functools.cache
def mean(part: str) -> Composer:
    """The composer that keeps the mean of the deltas under that name."""

    def kept(base: Array, deltas: Array, weights: Array) -> tuple[Parts, Report]:
        return {part: jnp.mean(deltas, axis=0)}, {}

    return composer(of_deltas(kept, ENTRIES, name=part))


def outside(parts: Parts, u: Float[Array, "m p"], v: Float[Array, "n q"]) -> Parts:
    """Factors of the cores `M_t` as those of the deltas `U M_t V^T`: `up` has rows in the outputs, all others columns
    in the inputs."""
    return {part: linalg.matmul(u, leaf) if part == "up" else linalg.matmul(leaf, v.T) for part, leaf in parts.items()}


def resized(array: Array, axis: int, size: int) -> Array:
    """The first entries along an axis, and zeros behind them."""
    array = lax.slice_in_dim(array, 0, min(size, array.shape[axis]), axis=axis)
    missing = [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, missing)
