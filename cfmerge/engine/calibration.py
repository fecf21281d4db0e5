"""How fast this machine is: measured once in some seconds, and kept in the user's cache directory.

    rates, note = calibrated()

The file is `rates/MACHINE/rates.json` in cfmerge's cache directory, which is checked as that of compiled code is. It is
made anew when the device, the number of cores or a version is another. Whatever is wrong, a plan goes on without it.
"""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cfmerge.engine.placement import Placement
from cfmerge.engine.rates import cores, device_of, measured
from cfmerge.engine.user_cache import Unusable, machine, own_directory, write_whole
from cfmerge.planning.prediction import Rates

FORM = 1  # of the file, raised when the same names mean something else


def calibrated(placement: Placement) -> tuple[Rates | None, str]:
    """This machine's rates, and a note on what is wrong; kept rates where they are of this machine and version."""
    try:
        file, why = _file(), ""
    except Unusable as error:
        file, why = None, f"the calibration is not kept: {error}"
    key = _key(placement)
    kept = _kept(file, key) if file else None
    if kept is not None:
        return kept, ""
    try:
        rates = measured(placement, file.parent if file else None)
    except Exception as error:
        return None, f"this machine could not be calibrated ({type(error).__name__}: {error}): no seconds are predicted"
    if file is not None:
        why = _keep(file, key, rates)
    return rates, why


def _file() -> Path:
    return own_directory("rates", machine()) / "rates.json"


def _key(placement: Placement) -> dict[str, Any]:
    """All that the rates hold for."""
    device = device_of(placement)
    kind = f"{device.platform} {device.device_kind}"
    versions = {name: version(name) for name in ("cfmerge", "jax", "jaxlib", "numpy")}
    return {"form": FORM, "device": kind, "cores": cores(), "python": sys.version.split()[0], **versions}


def _kept(file: Path, key: dict[str, Any]) -> Rates | None:
    """The rates in the file, if they are for this key and each is a number that can be divided by."""
    try:
        content = json.loads(file.read_text())
        if content["key"] != key:
            return None
        rates = Rates(**content["rates"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    numbers = [value for value in rates if value is not False]
    fine = all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in numbers)
    return rates if fine else None


def _keep(file: Path, key: dict[str, Any], rates: Rates) -> str:
    """Writes the file; why it could not be written."""
    try:
        write_whole(file, json.dumps({"key": key, "rates": rates._asdict()}, indent=2))
    except OSError as error:
        return f"the calibration is not kept: {file} cannot be written: {error.strerror}"
    return ""
