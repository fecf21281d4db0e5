"""All that comes with the arrays of a stack: the methods' numbers, weights, keys; and how devices share it out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cfmerge.core.call import Call, call_of
from cfmerge.core.part import Method
from cfmerge.core.survey import Found

SHARED = "stack"  # the axis of a mesh that shares stacks out
STACK: Any = PartitionSpec(SHARED)
SAME: Any = PartitionSpec()  # the same on every device


class Settings(NamedTuple):
    """The method of the stack, a call whose numbers are `(stack,)` each, and what surveys found for it."""

    call: Call
    model: Any = None
    tensor: Any = None  # (stack, ...)

    @property
    def method(self) -> Method:
        """The method, with the numbers of the first tensor."""
        return jax.tree.map(lambda leaf: leaf[0], self.call).part()


SETTINGS = Settings(STACK, SAME, STACK)


class Inputs(NamedTuple):
    """All that comes with an expert's stack: weights `(stack,)`, its number, and what its context needs."""

    weight: Any
    number: Any = 0
    digest: Any = None  # (stack, 2), with the seed behind each: what keys are made of
    seed: Any = 0
    moment: Any = None  # (stack, ...)
    start: Any = 0  # (stack,), the first entry of each in its tensor
    minus: Any = None  # (stack,), 0 where a delta comes instead of an expert's tensor, else 1; none: 1 for all
    rank: Any = None  # (stack, row), see `Context.rank`


INPUTS = Inputs(STACK, SAME, STACK, SAME, STACK, STACK, STACK, STACK)


def settings_of(methods: Sequence[Method], repeats: Any = 1, found: Found | None = None) -> Settings:
    """The settings of a stack whose tensors have these methods, of one structure.

    Args:
        repeats: how many matrices, or rows, each tensor has in the stack; one number or one for each.
    """
    call = jax.tree.map(lambda *values: column(values, repeats), *(call_of(method) for method in methods))
    return Settings(call, found.model if found else None, found.tensor if found else None)


def column(values: Sequence[Any], repeats: Any) -> Any:
    """The tensors' numbers, each as often as its tensor has matrices, or rows, in the stack."""
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.repeat(jnp.stack([jnp.asarray(value) for value in values]), np.asarray(repeats))
    return np.repeat(np.asarray(values, np.float64), repeats)
