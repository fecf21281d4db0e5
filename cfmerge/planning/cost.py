"""The size of a method's statistic, found out by tracing it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cfmerge.core.call import Call, call_of
from cfmerge.core.part import Context, Method


def statistic_size(method: Method, shape: tuple[int, ...], experts: int) -> int:
    """Numbers in the statistic of one tensor of that shape when all experts were seen."""
    values, structure = jax.tree.flatten(call_of(method))
    return _size(structure, len(values), shape, experts)


@functools.lru_cache(maxsize=4096)
def _size(structure: Any, numbers: int, shape: tuple[int, ...], experts: int) -> int:
    array = jax.ShapeDtypeStruct(shape, jnp.float32)

    def all_seen(values: list[jax.Array], base: jax.Array, delta: jax.Array, gram: jax.Array) -> object:
        call: Call = jax.tree.unflatten(structure, values)
        method: Method = call.part()
        statistic = method.init(base)
        for number in range(experts):
            context = Context(jax.random.key(0), number, gram if method.needs.moments == "input_gram" else delta)
            statistic = method.see(statistic, delta, jnp.ones((), base.dtype), context)
        return statistic

    gram = jax.ShapeDtypeStruct((shape[-1],) * 2 if shape else (), jnp.float32)
    one = [jax.ShapeDtypeStruct((), jnp.float32)] * numbers
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(all_seen, one, array, array, gram)))
