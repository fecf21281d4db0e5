"""Placement: the devices that do a unit. What a unit is does not depend on it, nor does the result.

Each unit is done in one of three ways (`spread.py` has the arrays):

    one      one device does the unit
    stack    the devices share its stack out: `jit(shard_map)` over a mesh of one axis, each walks its share
    rows     the devices share one matrix out by the rows of its deltas: XLA adds their parts of a Gram (all-reduce),
             and each solves for its rows of the cross term; by columns where all deltas together have fewer rows

The loop goes over `placement.grouped(units)`: units that are alike are joined until their stack fills the mesh.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from cfmerge.engine.cutting import STACKED
from cfmerge.engine.precision import low_rank
from cfmerge.engine.processes import ALONE, Processes
from cfmerge.engine.spread import Kind, Spread, on_host
from cfmerge.engine.surveys import kind_of
from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices that do the units.

    Attributes:
        devices: all of one kind; none: arrays go where JAX puts them, as in memory.
        memory: bound of the working set on the host, in bytes.
        processes: those that share the units out.
    """

    devices: tuple[jax.Device, ...] = ()
    memory: int | None = None
    processes: Processes = ALONE

    def within(self, memory: int | None) -> "Placement":
        """The same devices under a bound of the host's memory."""
        return dataclasses.replace(self, memory=memory)

    @property
    def on_host(self) -> bool:
        """Whether the devices' memory is the host's."""
        return on_host(self.devices)

    def grouped(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units; those that are alike are joined, as many as there are devices."""
        if len(self.devices) < 2:
            yield from units
            return
        waiting: dict[Any, list[Unit]] = {}
        for unit in units:
            if self._at_once(unit) == 1:
                yield unit
                continue
            key = _likeness(unit)
            bucket = waiting.setdefault(key, [])
            bucket.append(unit)
            if len(bucket) == self._at_once(unit):
                yield _joined(waiting.pop(key))
        for bucket in waiting.values():
            few = sum(unit.stack for unit in bucket) < len(self.devices)
            yield from bucket if few and self._axis(bucket[0]) is not None else [_joined(bucket)]

    def spread(self, unit: Unit) -> Spread:
        """How the unit lies on the devices."""
        kind = self._kind(unit)
        return Spread(unit, kind, self.devices, self._axis(unit) if kind == "rows" else None)

    def alone(self, unit: Unit) -> Spread:
        """The unit on the first device."""
        return Spread(unit, "one", self.devices)

    def _kind(self, unit: Unit) -> Kind:
        count = len(self.devices)
        if count < 2:
            return "one"
        if unit.stack < count and self._axis(unit) is not None:
            return "rows"
        filled = -(-unit.stack // count) * count
        return "stack" if filled == unit.stack or self._fits(unit, filled / unit.stack) else "one"

    def _at_once(self, unit: Unit) -> int:
        """How many units like this one are joined."""
        if unit.at_once:  # it is solved in pieces, which are joined
            return 1
        alone = self._axis(unit) is not None and unit.job.working_bytes > memory_of(self.devices[0])
        return len(self.devices) if not alone and self._fits(unit, len(self.devices)) else 1

    def _fits(self, unit: Unit, times: float) -> bool:
        """Whether so many times the unit fits half of the host's memory: two are in work at once."""
        if self.memory is None:
            return True
        arrays = (2 if unit.job.method.additive else len(unit.experts)) + 2 if self.on_host else 2
        needed = 4 * arrays * unit.entries
        if self.on_host:
            needed = max(needed, unit.job.working_bytes * unit.stack * len(unit.layers))
        return times * needed <= self.memory // 2

    def _axis(self, unit: Unit) -> int | None:
        """The axis of the stored tensor by which one large matrix is shared out; None if that does not pay."""
        job, method = unit.job, unit.job.method
        if job.joint is not None or not method.by_rows:
            return None
        if method.survey is not None or unit.row is not None or unit.stack * job.matrices > 1:
            return None
        times = len(self.devices) if self.on_host else 1  # each device holds the whole Gram
        if job.parameter.size < STACKED or not self._fits(unit, times):
            return None
        m, n = job.seen_shape
        letter = "i" if len(unit.experts) * m < n else "o"  # all rows together are fewer than a Gram's: these are kept
        sizes = zip(job.layout, job.parameter.shape, strict=True)
        return next((a for a, (l, size) in enumerate(sizes) if l == letter and size % len(self.devices) == 0), None)


Devices = int | str | Placement | None  # as users name them


def _joined(units: Sequence[Unit]) -> Unit:
    segments = tuple(segment for unit in units for segment in unit.segments)
    return dataclasses.replace(units[0], segments=segments)


def _likeness(unit: Unit) -> Any:
    """A key that is equal for units that one compiled call can do."""
    job, first = unit.job, unit.segments[0]
    shape = job.shape if unit.row is None else unit.row
    method = kind_of(job.method), low_rank(unit)
    lies = job.layout, job.parameter.dtype, job.dtype, job.joint
    return shape, len(unit.layers), first.count is None, *lies, job.experts, method


@functools.lru_cache
def memory_of(device: jax.Device) -> int:
    """The device's memory; without a bound where it does not say."""
    return int((device.memory_stats() or {}).get("bytes_limit", 1 << 62))


# --- what users ask for -------------------------------------------------------------------------------------------


def placement_of(devices: Devices = None) -> Placement:
    """The placement on `"all"` devices, on so many, on the `"cpu"`; None: all of an accelerator, else one.

    Raises:
        CfmergeError: there are fewer, or it is none of these.
    """
    if isinstance(devices, Placement):
        return devices
    text = str(devices)
    if devices is not None and text not in {"all", "cpu"} and not (text.isdecimal() and int(text) > 0):
        raise CfmergeError(f"devices: expected 'all', 'cpu' or a number of devices, found {devices!r}")
    if text.isdecimal():
        with contextlib.suppress(RuntimeError):  # JAX is in use: its devices are what they are
            jax.config.update("jax_num_cpu_devices", max(int(text), jax.config.jax_num_cpu_devices))  # type: ignore[attr-defined]
    found = tuple(jax.local_devices(backend="cpu" if text == "cpu" else None))
    if text == "cpu" or (devices is None and found[0].platform == "cpu"):
        return Placement(found[:1])
    if text.isdecimal():
        _check_count(int(text), found)
        return Placement(found[: int(text)])
    return Placement(found)


def check_no_devices(what: str, devices: Devices) -> None:
    """Raises `CfmergeError` if devices are named for trees, whose arrays say by themselves where they lie."""
    if devices is not None:
        raise CfmergeError(f"{what} of pytrees: devices is for checkpoints; arrays lie where their sharding says")


def _check_count(wanted: int, found: Sequence[jax.Device]) -> None:
    if wanted <= len(found):
        return
    have = f"devices: {wanted} are wanted, but JAX has {len(found)} ({found[0].device_kind})"
    if found[0].platform != "cpu":
        raise CfmergeError(f"{have}; ask for fewer, or for 'all'")
    raise CfmergeError(
        f"{have}, and their number is settled when JAX is first used: set JAX_NUM_CPU_DEVICES={wanted} in the "
        f"environment, or call jax.config.update('jax_num_cpu_devices', {wanted}) before anything else"
    )
