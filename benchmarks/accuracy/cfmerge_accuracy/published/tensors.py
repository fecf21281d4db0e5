"""Checks of a model's tensors, without which a number could be wrong in silence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError


def finite(path: Path, name: str, tensor: Any) -> np.ndarray:
    """A tensor in float32; raises `CfmergeError` if it holds NaN or infinity, for argmax gives a label even so."""
    found = np.asarray(tensor, np.float32)
    if not np.isfinite(found).all():
        raise CfmergeError(f"{path}: tensor {name!r} holds NaN or infinity; fetch the model again")
    return found


def check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `CfmergeError` unless a model has the base's tensors, in the base's shapes."""
    told = [f"{name} is missing" for name in base if name not in found]
    told += [f"{name} is none of the base's" for name in found if name not in base]
    told += [
        f"{name} is {list(found[name])}, the base's {list(shape)}"
        for name, shape in base.items()
        if name in found and found[name] != shape
    ]
    if told:
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise CfmergeError(f"{path}: its tensors are not the base's: {'; '.join(told[:3])}{more}")
