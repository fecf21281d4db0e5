"""The statistic of methods that must see all deltas at once: the deltas and weights themselves."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge.methods._base import Method, Report


class Stack(NamedTuple):
    """The deltas and their weights, in order."""

    deltas: tuple[Float[Array, "..."], ...]
    weights: tuple[Float[Array, ""], ...]


def init(base: Float[Array, "..."]) -> Stack:
    return Stack((), ())


def update(statistic: Stack, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Stack:
    return Stack((*statistic.deltas, delta), (*statistic.weights, jnp.asarray(weight, delta.dtype)))


def method(name: str, report: Callable[[Stack], tuple[Array, Report]], **fields: Any) -> Method:
    """The method `report(stack) -> (merged, report)` of all deltas; `fields` are those of `Method`."""
    return Method(
        name, init, update, lambda stack: report(stack)[0], report, additive=False, statistic="stack", **fields
    )


def weighted(statistic: Stack) -> list[Float[Array, "..."]]:
    """`w_t D_t` of every expert."""
    return [weight * delta for weight, delta in zip(statistic.weights, statistic.deltas, strict=True)]


def total(items: Iterable[Array]) -> Array:
    """The sum of arrays, of which there is at least one."""
    return functools.reduce(operator.add, items)


def ratio(above: Array, below: Array, otherwise: float = 0.0) -> Array:
    """`above / below`, or `otherwise` where `below` is (in effect) 0; so are its derivatives."""
    zero = jnp.abs(below) < jnp.finfo(below.dtype).tiny
    return jnp.where(zero, otherwise, above / jnp.where(zero, 1, below))
