"""What a composer keeps of a tensor, found out by tracing it: the entry of the tensor in the result."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cfmerge.compose.entries import PACKED, Entry
from cfmerge.core.call import Call, call_of, of_expert
from cfmerge.core.part import Composer, Context
from cfmerge.formats.base import Header
from cfmerge.planning.work import Job


def entry_of(job: Job) -> Entry:
    """What the job's composer keeps of its tensor."""
    by_entry = job.method.needs.scope == "entry"
    parameter = job.parameter
    shape = parameter.shape if by_entry else job.seen_shape
    layout = "" if by_entry else parameter.layout
    values, structure = jax.tree.flatten(call_of(of_expert(job.method, 0)))
    kept = _kept(structure, len(values), shape, len(job.experts))
    lead = parameter.canonical[:1] if "b" in layout else ()

    def header(leaf: Any) -> Header:
        if leaf.dtype == bool:
            return (leaf.shape[0], -(-parameter.size // 8)), PACKED
        return (*lead, *leaf.shape), job.dtype

    own = {part: header(leaf) for part, leaf in kept.items()}
    return Entry(parameter.shape, parameter.dtype, layout, own, by_entry, job.experts, job.writes[1:])


@functools.lru_cache(maxsize=1024)
def _kept(structure: Any, numbers: int, shape: tuple[int, ...], experts: int) -> Mapping[str, Any]:
    call: Call = jax.tree.unflatten(structure, [0.5] * numbers)
    return _parts(call.part(), shape, experts)


def _parts(composer: Composer, shape: tuple[int, ...], experts: int) -> Mapping[str, Any]:
    """The parts that a composer makes of tensors of a shape, as shapes."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32)

    def made(base: jax.Array, delta: jax.Array) -> Any:
        statistic = composer.init(base)
        for number in range(experts):
            statistic = composer.see(statistic, delta, 1.0, Context(number=number))
        return composer.solve(statistic)[0]

    return jax.eval_shape(made, array, array)  # type: ignore[no-any-return]
