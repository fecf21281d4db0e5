"""Jobs cut into units: what is stacked, what is cut, and what fits the memory."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from cfmerge.core.call import in_pieces
from cfmerge.engine.surveys import kind_of, looks_within
from cfmerge.engine.units import Segment, Unit
from cfmerge.errors import CfmergeError
from cfmerge.planning.work import Job, Work

ENTRIES = 1 << 22  # of a unit of an entrywise method
ROW = 1 << 16  # of a row, if a unit has as many
STACKED = 1 << 18  # of a stack of matrices: larger ones keep a processor busy alone, and stacking copies them


def units_of(work: Work, jobs: Sequence[Job], memory: int | None = None, *, pieces: bool = False) -> Iterator[Unit]:
    """The jobs as units, in about the order of the plan; the working set of a stack fits half of `memory`.

    With `pieces`, methods that can look within a tensor first and then take its entries do so, and see rows.

    Each job merges something: see `Work.merged`.

    Under a transformation of JAX tensors are neither cut nor kept apart: its compiler sees all of them anyway. Tensors
    that lie on several devices are neither cut nor stacked: each device has but its part of them.

    Raises:
        CfmergeError: one tensor alone does not fit.
    """
    waiting: dict[Any, list[Job]] = {}
    filling: dict[Any, list[Segment]] = {}
    for job in jobs:
        if job.name in work.sharded:
            yield from _layers(work, job, memory) if job.layers_apart else [_whole(work, [job])]
            continue
        if pieces and work.in_pieces(job):
            job = dataclasses.replace(job, assignment=dataclasses.replace(job.assignment, method=in_pieces(job.method)))
        likes = (job.parameter.dtype, str(job.dtype), job.experts, kind_of(job.method))
        if looks_within(job.method):
            yield from _apart(work, job, filling.setdefault(likes, []))
            continue
        if job.method.needs.scope == "entry" and not work.traced:
            if work.from_files and job.method.survey is None:
                yield from _rows(work, job, filling.setdefault(likes, []))
                continue
            if job.parameter.size > ENTRIES:
                yield from _in_pieces(work, job)
                continue
        if job.layers_apart and not work.traced:
            yield from _layers(work, job, memory)
            continue
        bucket = waiting.setdefault((job.parameter.shape, job.layout, *likes), [])
        bucket.append(job)
        if not work.traced and len(bucket) >= _at_once(job, job.parameter.size, memory):
            yield _whole(work, waiting.pop((job.parameter.shape, job.layout, *likes)))
    for bucket in waiting.values():
        yield _whole(work, bucket)
    for segments in filling.values():
        if segments:
            yield Unit(work, tuple(segments), min(ROW, ENTRIES))


def _whole(work: Work, jobs: Sequence[Job]) -> Unit:
    return Unit(work, tuple(Segment(job) for job in jobs))


def _in_pieces(work: Work, job: Job) -> Iterator[Unit]:
    """A large tensor in pieces, each one row."""
    for first in range(0, job.parameter.size, ENTRIES):
        count = min(ENTRIES, job.parameter.size - first)
        yield Unit(work, (Segment(job, first, count),), count)


def _rows(work: Work, job: Job, filling: list[Segment]) -> Iterator[Unit]:
    """Units that a tensor fills, by itself or with the segments before it; its rest is left in `filling`."""
    row, alone = min(ROW, ENTRIES), job.parameter.size // ENTRIES * ENTRIES
    for first in range(0, alone, ENTRIES):  # units of its own, which need not be copied together
        yield Unit(work, (Segment(job, first, ENTRIES),), row)
    first = alone
    while first < job.parameter.size:
        used = sum(segment.rows(row) for segment in filling)
        room = (ENTRIES // row - used) * row
        if room <= 0:
            yield Unit(work, tuple(filling), row)
            filling.clear()
            continue
        count = min(room, job.parameter.size - first)
        filling.append(Segment(job, first, count))
        first += count


def _apart(work: Work, job: Job, filling: list[Segment]) -> Iterator[Unit]:
    """Units that hold whole tensors, or pieces of one."""
    row, size = min(ROW, ENTRIES), job.parameter.size
    if size > ENTRIES:
        for first in range(0, size, ENTRIES):
            yield Unit(work, (Segment(job, first, min(ENTRIES, size - first)),), row)
        return
    segment = Segment(job, 0, size)
    if filling and sum(one.rows(row) for one in filling) + segment.rows(row) > ENTRIES // row:
        yield Unit(work, tuple(filling), row)
        filling.clear()
    filling.append(segment)


def _layers(work: Work, job: Job, memory: int | None) -> Iterator[Unit]:
    """A tensor that stacks layers, some of them at a time."""
    size = math.prod(job.seen_shape)
    most = _at_once(job, size, memory)
    for layer in range(0, job.matrices, most):
        count = min(most, job.matrices - layer)
        yield Unit(work, (Segment(job, layer * size, count * size),))


def _at_once(job: Job, size: int, memory: int | None) -> int:
    """How many arrays of so many entries, tensors like the job's or its layers, are one unit."""
    by_size = (ENTRIES if job.method.needs.scope == "entry" else STACKED) // size
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
