"""Units: the smallest pieces of work, each solved in one compiled call.

A unit is segments (a tensor, its first entry, how many) of one layout and one method but for its numbers: a stack of
small tensors of one shape, one large tensor, or a piece of one whose method takes entries one by one. A unit depends
on headers, methods and the memory bound alone: never on devices or processes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.call import of_expert
from cfmerge.core.random import digest_of
from cfmerge.core.several import leaders, members
from cfmerge.engine.steps import Inputs, Settings, settings_of
from cfmerge.engine.surveys import Place, at_places, kind_of
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method
from cfmerge.planning.work import Job, Readable, Work
from cfmerge.statistics import stacked

ENTRIES = 1 << 22  # of a unit of an entrywise method
STACKED = 1 << 18  # of a stack of matrices: larger ones keep a processor busy alone, and stacking copies them


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` entries of a tensor as it is stored, from entry `first` on; the whole tensor without a count."""

    job: Job
    first: int = 0
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """Whole tensors of one shape, dtype, layout, method and set of experts; or one piece of one tensor."""

    work: Work
    segments: tuple[Segment, ...]

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(segment.job for segment in self.segments)

    @property
    def job(self) -> Job:
        """The first job: what the others share with it is the unit's."""
        return self.segments[0].job

    @property
    def experts(self) -> tuple[int, ...]:
        return self.job.experts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.job.name for segment in self.segments)

    @property
    def first(self) -> int:
        return self.segments[0].first

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(job.method for job in self.jobs)

    @property
    def places(self) -> tuple[Place, ...]:
        if self.segments[0].count is not None:
            return ((self.job.name, self.first),)
        return tuple((name, layer) for name in self.names for layer in range(self.job.matrices))

    def only(self, number: int) -> "Unit":
        """The unit of one of its segments."""
        return dataclasses.replace(self, segments=(self.segments[number],))

    # --- arrays ---------------------------------------------------------------------------------------------------

    def base(self) -> Any:
        """`(segments, *stored shape)`, or `(1, count)` of a piece."""
        return self.read(self.work.base.tensors, self.names)

    def expert(self, number: int) -> Any:
        """The same of an expert; of one that lacks the tensors the base, for surveys: no delta."""
        if number not in self.experts:
            return self.base()
        return self.read(self.work.experts[number].tensors, tuple(str(job.sources[number]) for job in self.jobs))

    def read(self, model: Readable, names: Sequence[str]) -> Any:
        """The unit's share of tensors of a model, one name for each segment."""
        first, count = self.segments[0].first, self.segments[0].count
        arrays = [model.read(name, first, count) for name in names]
        if any(isinstance(array, jax.Array) for array in arrays):
            return jnp.stack(arrays)
        if len({array.dtype for array in arrays}) > 1:  # NumPy has no common dtype for float16 and bfloat16
            wide = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
            arrays = [array.astype(wide) for array in arrays]
        return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)

    # --- numbers that come with them ------------------------------------------------------------------------------

    def inputs(self, number: int) -> Inputs:
        """The weights of an expert, and all that its context needs."""
        method, expert = self.job.method, self.work.experts[number]
        weights = [job.weights[number] for job in self.jobs]
        inputs = Inputs(
            _repeated(weights, self.job.matrices), self.work.before + number, seed=self.work.seed, start=self.first
        )
        if method.needs.random:
            layers = [(name, layer) for name in self.names for layer in range(self.job.matrices)]
            told = [layer_name(name, layer, self.job.matrices) for name, layer in layers]
            inputs = inputs._replace(digest=np.stack([digest_of(layer, expert.name) for layer in told]))
        if method.needs.moments and expert.moments is not None:
            moment = self.read(expert.moments, self.names)
            if method.needs.moments == "input_gram":
                moment = moment.reshape(-1, *moment.shape[-2:])
            inputs = inputs._replace(moment=moment)
        return inputs

    def settings(self, methods: Sequence[Method], found: Found | None) -> "list[Settings]":
        """The settings of start and solve, and then of each expert that takes part."""
        numbers = [0, *(self.work.before + t for t in self.experts)]
        known = at_places(found, self.places)
        return [settings_of([of_expert(m, t) for m in methods], self.job.matrices, known) for t in numbers]

    def kept(self, method: Method, compute: str) -> Any:
        """The method's statistics as the work's statistics hold them; None if it has none."""
        if self.work.statistics is None:
            return None
        piece = None if self.segments[0].count is None else slice(self.first, self.first + self.segments[0].count)
        own = [self.work.statistics.tensors[name] for name in self.names]
        each = [stacked(own, one, self.job.seen_shape, compute, piece) for one in leaders(method)]
        return each[0] if members(method) == (method,) else tuple(each)


def _repeated(values: Sequence[Any], times: int) -> Any:
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.repeat(jnp.stack([jnp.asarray(value) for value in values]), times)
    return np.repeat(np.asarray(values, np.float64), times)


def layer_name(name: str, layer: int, layers: int) -> str:
    """The text that a random method's keys are made of: the tensor's name, and which of its stacked layers."""
    return name if layers == 1 else f"{name}[{layer}]"


# --- cutting --------------------------------------------------------------------------------------------------------


def units_of(work: Work, jobs: Sequence[Job], memory: int | None = None) -> Iterator[Unit]:
    """All merge jobs as units, in about the order of the plan; the working set of a stack fits half of `memory`.

    Under a transformation of JAX tensors are neither cut nor kept apart: its compiler sees all of them anyway.

    Raises:
        CfmergeError: one tensor alone does not fit.
    """
    waiting: dict[Any, list[Job]] = {}
    for job in jobs:
        if job.assignment.action != "merge" or job.parameter.size == 0:
            continue
        size = job.parameter.size
        if job.method.needs.scope == "entry" and size > ENTRIES and not work.traced:
            for first in range(0, size, ENTRIES):
                yield Unit(work, (Segment(job, first, min(ENTRIES, size - first)),))
            continue
        key = (job.parameter.shape, job.parameter.dtype, str(job.dtype), job.layout, job.experts, kind_of(job.method))
        bucket = waiting.setdefault(key, [])
        bucket.append(job)
        if not work.traced and len(bucket) >= _stack(job, memory):
            yield _whole(work, waiting.pop(key))
    for bucket in waiting.values():
        yield _whole(work, bucket)


def _whole(work: Work, jobs: Sequence[Job]) -> Unit:
    return Unit(work, tuple(Segment(job) for job in jobs))


def _stack(job: Job, memory: int | None) -> int:
    by_size = (ENTRIES if job.method.needs.scope == "entry" else STACKED) // job.parameter.size
    if memory is None:
        return max(1, by_size)
    check_memory(job, memory)
    return max(1, min(by_size, memory // 2 // max(job.working_bytes, 1)))


def check_memory(job: Job, memory: int) -> None:
    """Raises `CfmergeError` if one job alone needs more than `memory` bytes."""
    if job.working_bytes > memory:
        raise CfmergeError(
            f"tensor {job.name!r} {job.parameter.shape} needs {job.working_bytes / 2**20:.1f} MiB with "
            f"{job.assignment.label}, but the working set may be {memory / 2**20:.1f} MiB; raise --memory, or "
            f'give it a rule: match: "{job.name}", method: average'
        )
