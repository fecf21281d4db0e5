"""Arithmetic on the deltas of all experts that several methods share."""

import functools
import operator
from collections.abc import Iterable

from jaxtyping import Array, Float


def weighted(deltas: Float[Array, "T ..."], weights: Float[Array, " T"]) -> list[Float[Array, "..."]]:
    """`w_t D_t` of every expert."""
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


def total(items: Iterable[Array]) -> Array:
    """The sum of arrays, of which there is at least one."""
    return functools.reduce(operator.add, items)
