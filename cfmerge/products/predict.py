"""The prediction for a plan: on this machine, whose rates are measured once, or on devices that are not here."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax

from cfmerge import recipe as recipes
from cfmerge.engine.calibration import calibrated
from cfmerge.engine.cutting import STACKED, entries_of
from cfmerge.engine.loop import WORKERS
from cfmerge.engine.placement import Devices as Asked
from cfmerge.engine.placement import Placement, memory_of, placement_of
from cfmerge.engine.writing import WRITE_BEHIND
from cfmerge.errors import CfmergeError
from cfmerge.planning.prediction import Devices, Limits, Prediction, predicted
from cfmerge.products.hashes import is_known

if TYPE_CHECKING:
    from cfmerge.products.plan import Plan


class Forecast(NamedTuple):
    """All that is known of a merge before it runs.

    Attributes:
        memory: the bound of the working set.
        needed: the largest working set that cannot be cut.
        refused: `{tensor: bytes}` of those that need more than the bound.
        devices: the devices that it is for.
        notes: what is not known, and why.
    """

    prediction: Prediction
    memory: int
    needed: int
    refused: Mapping[str, int]
    devices: Devices
    notes: tuple[str, ...]


def forecast(
    plan: "Plan", memory: int, free: int, devices: Asked, device_memory: str | int | None, calibrate: bool
) -> Forecast:
    """The forecast for a plan.

    Args:
        memory: bound of the working set.
        free: bytes of memory that are available.
        devices, device_memory: see `Plan.prediction`.
        calibrate: measure this machine if need be; else no seconds are predicted.
    """
    needs = {job.name: plan.work.by_entry(job).working_bytes for job in plan.work.merged}
    needed = max(needs.values(), default=0)
    refused = {name: need for name, need in needs.items() if need > memory}
    limits = Limits(functools.partial(entries_of, memory=memory), STACKED, WORKERS, WRITE_BEHIND, memory, free)
    size = None if device_memory is None else recipes.parse_size(str(device_memory))
    elsewhere = _elsewhere(devices, size)
    if elsewhere is not None:
        return Forecast(predicted(plan, None, limits, elsewhere), memory, needed, refused, elsewhere, ())
    placement = placement_of(devices)
    rates, note = calibrated(placement) if calibrate else (None, "")
    if rates is not None:
        files = {file for model in (plan.base, *plan.experts) for file in model.files}
        limits = limits._replace(hashed=sum(file.stat().st_size for file in files if is_known(file)))
    here, notes = _here(placement), (note,) if note else ()
    return Forecast(predicted(plan, rates, limits, here), memory, needed, refused, here, notes)


def _elsewhere(devices: Asked, size: int | None) -> Devices | None:
    """The devices of a machine that is not here; None: they are here."""
    if isinstance(devices, Placement) or (size is None and not str(devices).isdecimal()):
        return None
    if devices is not None and not str(devices).isdecimal():
        raise CfmergeError(f"devices: {devices!r} are here, and have the memory that they have; give their number")
    count = int(devices or 1)
    if count < 1:
        raise CfmergeError(f"devices: expected a number of devices, found {devices!r}")
    here = size is None and jax.default_backend() != "cpu" and count <= len(jax.local_devices())
    return None if here or (size is None and count == 1) else Devices(count, size, on_host=False)


def _here(placement: Placement) -> Devices:
    if placement.on_host:
        return Devices()
    return Devices(len(placement.devices), memory_of(placement.devices[0]), on_host=False)
