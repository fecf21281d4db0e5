"""The seconds and the memory that a plan will need, from its jobs and the rates of a machine: no file is read.

seconds  = start + programs + (arithmetic + host work / cores), or longer where one thread alone takes longer (SHA-256)
memory   = Python and JAX + workers * what a unit needs + what waits to be written

Arithmetic is counted in the traces of the methods (`arithmetic.py`), and divided by the rate of its kind.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cfmerge.core.call import form_of, structure
from cfmerge.planning.arithmetic import Arithmetic, arithmetic, of_matrix, shape_of
from cfmerge.planning.tally import Tally
from cfmerge.planning.work import Job, Work

if TYPE_CHECKING:
    from cfmerge.planning.resolved import Resolved


MEMORY = 2.5e8  # bytes of Python and JAX, where nothing is known of the machine


class Rates(NamedTuple):
    """How fast a machine is; a second's worth of each, of the whole machine unless it says of one core.

    Attributes:
        cores: how many there are.
        on_host: the device that computes is the processor itself.
        start: seconds of a process before and after its merge.
        memory: bytes of Python and JAX.
        call: seconds of one call of a compiled function, of one core.
        trace, compile: seconds for each equation of a program, of one core: with compiled code at hand, and without.
        code: bytes for each equation of a program.
        read, write, hash: bytes, of one core: from the page cache; to it; SHA-256.
        disk, sync: bytes from the disk, and to it.
        product, solve: floating-point operations of matrix products; of Cholesky and triangular solves.
        eigen, svd, qr: `n^3`, or `m n min(m, n)`, of decompositions.
        sort: entries.
        entry, move: operations on entries in fused loops; bytes that such loops read and write.
        select: keys that the host selects among, of one core.
    """

    cores: float
    on_host: bool
    start: float
    memory: float
    call: float
    trace: float
    compile: float
    code: float
    read: float
    write: float
    hash: float
    disk: float
    sync: float
    product: float
    solve: float
    eigen: float
    svd: float
    qr: float
    sort: float
    entry: float
    move: float
    select: float


class Limits(NamedTuple):
    """How the loop cuts work, see `cfmerge.engine`.

    Attributes:
        entries: `entries(job)` of a unit of an entrywise method.
        stacked: entries of a stack of matrices.
        workers: units in work at once.
        behind: results that wait to be written.
        memory: bytes that units in work may need together.
        free: bytes of files that stay in memory when they were read once.
        hashed: bytes of input files whose SHA-256 is known.
    """

    entries: Callable[[Job], int]
    stacked: int
    workers: int
    behind: int
    memory: float
    free: float
    hashed: float = 0


class Prediction(NamedTuple):
    """What a merge will need.

    Attributes:
        seconds: of the whole process, where compiled code is at hand from an earlier run; None: nothing is known of
            the machine's speed.
        compiling: seconds more where it is not at hand.
        memory: bytes of the process at the peak, files that the system maps into it aside.
        device_memory: bytes on one device at the peak, where devices have their own memory.
        device_flops: floating-point operations of one device.
        too_large: `{tensor: bytes}` of those that one device cannot hold.
        parts: seconds of each kind of work; several kinds go on at once.
    """

    seconds: float | None
    compiling: float | None
    memory: float
    device_memory: float
    device_flops: float
    too_large: Mapping[str, float]
    parts: Mapping[str, float]


class Devices(NamedTuple):
    """The devices that share the work; memory in bytes of each, None: not known."""

    count: int = 1  # type: ignore[assignment]  # a tuple has a method of that name
    memory: float | None = None
    on_host: bool = True


class Group(NamedTuple):
    """Jobs of one method and shape.

    Attributes:
        job: one of them, with the method that the loop takes.
        names: of their tensors.
        count: how many matrices (of entrywise methods: units) they hold together, in parts of one.
        needs: of one matrix or unit.
        entries: of one matrix or unit.
        units: how many units they are.
    """

    job: Job
    names: tuple[str, ...]
    count: float  # type: ignore[assignment]
    needs: Arithmetic
    entries: int
    units: int


def predicted(plan: "Resolved", rates: Rates | None, limits: Limits, devices: Devices) -> Prediction:
    """The prediction for a plan on a machine of these rates, or on devices whose rates are not known."""
    found = list(groups(plan.work, limits.entries, limits.stacked))
    work = sum((_all(group) for group in found), Tally())
    on_device = [on_one_device(group, limits, devices) for group in found]
    too_large = {
        name: held
        for group, held in zip(found, on_device, strict=True) if devices.memory is not None and held > devices.memory
        for name in group.names
    }  # fmt: skip
    memory = rates.memory + _equations(found)[0] * rates.code if rates else MEMORY
    memory += _memory(found, limits, devices.on_host)
    parts = _parts(plan, found, seconds(work, rates) / devices.count, rates, limits) if rates else {}
    seconds_in_all = compiling = None
    if rates:
        workers = min(rates.cores, limits.workers)
        seconds_in_all = rates.start + parts["tracing"] / workers + _together(parts, rates)
        compiling = _equations(found)[0] * rates.compile / workers
    return Prediction(
        seconds_in_all, compiling, memory, max(on_device, default=0.0), work.flops / devices.count, too_large,
        parts,
    )  # fmt: skip


def _parts(
    plan: "Resolved", found: Sequence[Group], computing: float, rates: Rates, limits: Limits
) -> dict[str, float]:
    """Seconds of each kind of work."""
    passes = 1 + max((len(group.needs.looks) for group in found), default=0)
    inputs = sum(info.nbytes for model in (plan.base, *plan.experts) for info in model.tensors.values())
    written = plan.bytes_to_write * len(plan.results)
    keys = sum(look.keys * group.count for group in found for look in group.needs.looks)
    calls = sum(group.units * (2 + len(group.job.experts)) * (1 + len(group.needs.looks)) for group in found)
    equations, programs = _equations(found)
    return {
        "arithmetic": computing,
        "reading": _bytes_merged(plan.work, found, limits) / rates.read,
        "selecting": keys / rates.select,
        "calls": (calls + programs) * rates.call,
        "writing": written / rates.write,
        "hashing": max(inputs - limits.hashed, 0) / rates.hash,
        "tracing": equations * rates.trace,
        "disk": written / rates.sync + ((1 + passes) * inputs / rates.disk if inputs > limits.free else 0.0),
    }


def _together(parts: Mapping[str, float], rates: Rates) -> float:
    """Seconds of a merge: cores share the work, but one thread hashes, one writes, and there is one disk."""
    host = sum(parts[kind] for kind in ("reading", "selecting", "calls", "writing", "hashing")) / rates.cores
    both = parts["arithmetic"] + host if rates.on_host else max(parts["arithmetic"], host)
    return max(both, parts["hashing"], parts["writing"], parts["disk"])


def on_one_device(group: Group, limits: Limits, devices: Devices) -> float:
    """Bytes that a unit needs on one device; a large matrix is shared out by rows where its method allows that."""
    held, method = _unit(group, limits), group.job.method
    if devices.count == 1 or _by_entry(group.job) or group.entries < limits.stacked:
        return held
    if not method.by_rows or method.survey is not None or group.job.matrices > 1 or group.job.joint is not None:
        return held
    m, n = group.job.seen_shape
    experts = len(group.job.experts)
    if experts * m < n:  # all rows together are fewer than the inputs, which are shared out instead
        shape, form = (m, -(-n // devices.count)), method
    else:
        shape, form = (-(-m // devices.count), n), form_of(method) or method
    own = arithmetic(form, shape, experts, group.job.parameter.dtype)
    return min(held, own.merge.memory)


def groups(work: Work, entries: Callable[[Job], int], stacked: int) -> Iterator[Group]:
    """The jobs that merge something, by method and shape."""
    alike: dict[Any, list[Job]] = {}
    for job in work.merged:
        job = work.by_entry(job)
        shape = () if _by_entry(job) else (shape_of(job), job.layout, job.joint)
        alike.setdefault((structure(job.method), shape, len(job.experts), job.parameter.dtype), []).append(job)
    for jobs in alike.values():
        job, size = jobs[0], sum(one.parameter.size for one in jobs)
        names = tuple(one.name for one in jobs)
        if _by_entry(job):
            most = min(size, entries(job))
            needs = arithmetic(job.method, (most,), len(job.experts), job.parameter.dtype)
            yield Group(job, names, size / most, needs, most, -(-size // most))
            continue
        each, needs = math.prod(shape_of(job)), of_matrix(job)
        yield Group(job, names, size / each, needs, each, -(-size // (each * max(1, stacked // each))))


def seconds(tally: Tally, rates: Rates) -> float:
    """The seconds that operations take, one kind after the other."""
    return (
        tally.products / rates.product + tally.solves / rates.solve + tally.eigen / rates.eigen + tally.svd / rates.svd
        + tally.qr / rates.qr + tally.sorted / rates.sort + tally.entries / rates.entry + tally.moved / rates.move
    )  # fmt: skip


def _all(group: Group) -> Tally:
    return sum((look.tally for look in group.needs.looks), group.needs.merge).times(group.count)


def _by_entry(job: Job) -> bool:
    return job.method.needs.scope == "entry" and job.joint is None


def _bytes_merged(work: Work, found: Sequence[Group], limits: Limits) -> float:
    """Bytes that are read in all passes, and those that are copied to lie side by side in a unit."""
    looks = {structure(group.job.method): len(group.needs.looks) for group in found}
    total = 0.0
    for job in work.jobs:
        own = work.by_entry(job).method
        full, entries = (
            (limits.entries(job), job.parameter.size)
            if own.needs.scope == "entry" else (limits.stacked // 2 + 1, math.prod(job.seen_shape))
        )  # fmt: skip
        copies = 2 if entries < full else 1
        if job.joint is not None:
            total += copies * (job.bytes_read + 4 * sum(job.joint) * sum(job.sides))
            continue
        total += copies * job.bytes_read * (1 + len(job.experts)) * (1 + looks.get(structure(own), 0))
    return total


def _equations(found: Sequence[Group]) -> tuple[float, int]:
    """The equations of all programs, and their number."""
    looks = [look.tally.equations for group in found for look in group.needs.looks]
    return sum(group.needs.merge.equations for group in found) + sum(looks), len(looks) + sum(
        group.needs.programs for group in found
    )


def _memory(found: Sequence[Group], limits: Limits, on_host: bool) -> float:
    """Bytes on the host of the units in work, and of the results that wait to be written."""
    need = _unit if on_host else _stored
    each = [need(group, limits) for group in found for _ in range(min(group.units, limits.workers))]
    waiting = limits.behind + limits.workers + 1
    results = [min(group.units, waiting) * _written(group, limits) * group.job.dtype.itemsize for group in found]
    at_once = min(sum(sorted(each, reverse=True)[: limits.workers]), max(limits.memory, *each, 0))
    return at_once + max(results, default=0)


def _written(group: Group, limits: Limits) -> float:
    """How many entries of a result are written at once: whole tensors where stacked layers do not lie in turn."""
    return group.job.parameter.size if group.job.is_turned else group.entries * _stack(group, limits)


def _stack(group: Group, limits: Limits) -> float:
    """How many matrices a unit holds."""
    return 1 if _by_entry(group.job) else min(group.count, max(1, limits.stacked // group.entries))


def _unit(group: Group, limits: Limits) -> float:
    """Bytes that a unit needs where it is computed."""
    looks = max((look.tally.memory for look in group.needs.looks), default=0)
    return max(looks, group.needs.merge.memory) * _stack(group, limits)


def _stored(group: Group, limits: Limits) -> float:
    """Bytes of a unit's arrays as they come from the files: two at a time where experts are added one by one."""
    arrays = 2 if group.job.method.additive else 1 + len(group.job.experts)
    return arrays * group.entries * _stack(group, limits) * group.job.bytes_read / group.job.parameter.size
