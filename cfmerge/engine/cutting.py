"""Jobs cut into units: what is stacked, what is cut, and what fits the memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from cfmerge.engine.segments import Segment
from cfmerge.engine.surveys import kind_of, looks_within
from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError
from cfmerge.planning.work import Job, Work

ENTRIES = 1 << 22  # of a unit of an entrywise method, at most
BYTES = 1 << 27  # of such a unit's working set
ROW = 1 << 16  # of a row, if a unit has as many
STACKED = 1 << 18  # of a stack of matrices: larger ones keep a processor busy alone, and stacking copies them


def units_of(work: Work, jobs: Sequence[Job], memory: int | None = None) -> Iterator[Unit]:
    """The jobs as units, in about the order of the plan; the working set of a stack fits half of `memory`.

    Methods that can look within a tensor first and then take its entries do so, and see rows.

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
        job = work.by_entry(job)
        likes = (job.parameter.dtype, str(job.dtype), job.experts, kind_of(job.method), job.joint)
        if looks_within(job.method):
            yield from _apart(work, job, filling.setdefault(likes, []), entries_of(job, memory))
            continue
        if job.method.needs.scope == "entry" and not work.traced and job.joint is None:
            survey, most = job.method.survey, entries_of(job, memory)
            if work.from_files and (survey is None or survey.rows):
                yield from _rows(work, job, filling.setdefault(likes, []), most)
                continue
            if job.parameter.size > most:
                yield from _in_pieces(work, job, most)
                continue
        apart = job.layers_apart and not work.traced and job.joint is None
        if apart and (job.layers_in_turn or _at_once(job, 1, memory) < job.matrices):
            yield from _layers(work, job, memory)
            continue
        bucket = waiting.setdefault((job.shape, job.layout, *likes), [])
        bucket.append(job)
        if not work.traced and len(bucket) >= _at_once(job, job.matrices, memory):
            yield _whole(work, waiting.pop((job.shape, job.layout, *likes)))
    for bucket in waiting.values():
        yield _whole(work, bucket)
    for segments in filling.values():
        if segments:
            yield Unit(work, tuple(segments), min(ROW, entries_of(segments[0].job, memory)))


def entries_of(job: Job, memory: int | None) -> int:
    """How many entries a unit of an entrywise method has: a power of two, fewer for many experts and little memory."""
    bound = BYTES if memory is None else min(BYTES, memory // 8)
    fitting = bound // (12 * (len(job.experts) + 2))  # as they are stored, and in float32
    return min(ENTRIES, max(ROW, 1 << (max(fitting, 1).bit_length() - 1)))


def _whole(work: Work, jobs: Sequence[Job]) -> Unit:
    return Unit(work, tuple(Segment(job) for job in jobs))


def _in_pieces(work: Work, job: Job, most: int) -> Iterator[Unit]:
    """A large tensor in pieces, each one row."""
    for first in range(0, job.parameter.size, most):
        count = min(most, job.parameter.size - first)
        yield Unit(work, (Segment(job, first, count),), count)


def _rows(work: Work, job: Job, filling: list[Segment], most: int) -> Iterator[Unit]:
    """Units that a tensor fills, by itself or with the segments before it; its rest is left in `filling`."""
    row, alone = min(ROW, most), job.parameter.size // most * most
    for first in range(0, alone, most):  # units of its own, which need not be copied together
        yield Unit(work, (Segment(job, first, most),), row)
    first = alone
    while first < job.parameter.size:
        used = sum(segment.rows(row) for segment in filling)
        room = (most // row - used) * row
        if room <= 0:
            yield Unit(work, tuple(filling), row)
            filling.clear()
            continue
        count = min(room, job.parameter.size - first)
        filling.append(Segment(job, first, count))
        first += count


def _apart(work: Work, job: Job, filling: list[Segment], most: int) -> Iterator[Unit]:
    """Units that hold whole tensors, or pieces of one."""
    row, size = min(ROW, most), job.parameter.size
    if size > most:
        for first in range(0, size, most):
            yield Unit(work, (Segment(job, first, min(most, size - first)),), row)
        return
    segment = Segment(job, 0, size)
    if filling and sum(one.rows(row) for one in filling) + segment.rows(row) > most // row:
        yield Unit(work, tuple(filling), row)
        filling.clear()
    filling.append(segment)


def _layers(work: Work, job: Job, memory: int | None) -> Iterator[Unit]:
    """A tensor that stacks layers, some of them at a time: units, or one that is solved so and written at once."""
    size = math.prod(job.seen_shape)
    most = _at_once(job, 1, memory)
    if not job.layers_in_turn:
        yield Unit(work, (Segment(job),), at_once=most if most < job.matrices else 0)
        return
    for layer in range(0, job.matrices, most):
        count = min(most, job.matrices - layer)
        yield Unit(work, (Segment(job, layer * size, count * size),))


def _at_once(job: Job, layers: int, memory: int | None) -> int:
    """How many arrays of so many layers, tensors like the job's or some of its layers, are one unit."""
    size = layers * math.prod(job.seen_shape)
    by_size = (ENTRIES if job.method.needs.scope == "entry" else STACKED) // size
    if memory is None:
        return max(1, by_size)
    check_memory(job, memory)
    return max(1, min(by_size, memory // 2 // max(layers * job.working_bytes, 1)))


def check_memory(job: Job, memory: int) -> None:
    """Raises `CfmergeError` if one job alone needs more than `memory` bytes."""
    if job.working_bytes > memory:
        raise CfmergeError(
            f"tensor {job.name!r} {job.parameter.shape} needs {job.working_bytes / 2**20:.1f} MiB with "
            f"{job.assignment.label}, but the working set may be {memory / 2**20:.1f} MiB; raise --memory, or "
            f'give it a rule: match: "{job.name}", method: average'
        )
