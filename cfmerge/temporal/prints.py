"""Hashes by which a model is known again, of the first and last entries of each tensor: quick for any size."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from cfmerge.formats import Source
from cfmerge.formats.arrays import ArraysSource, named_arrays

SAMPLE = 1024  # entries at each end


def prints(source: Source) -> dict[str, str]:
    """`{tensor: hash of its header and of its first and last entries}`."""
    return {name: _print(source, name) for name in sorted(source.tensors)}


def prints_of_tree(tree: Any, saved: Mapping[str, str]) -> dict[str, str]:
    """The same of a tree of parameters, without the names that files hold once, as `saved` has them."""
    source: Any = ArraysSource(named_arrays(tree, "base", trees=True), "base", "(a tree)", {})
    return {name: value for name, value in prints(source).items() if name in saved or name not in source.ties}


def print_of(source: Source) -> str:
    """One hash of all tensors."""
    return hashlib.sha256(msgspec.json.encode(prints(source))).hexdigest()[:32]


def _print(source: Source, name: str) -> str:
    info = source.tensors[name]
    digest = hashlib.sha256(f"{info.shape}".encode())
    size = int(np.prod(info.shape, dtype=np.int64))
    grain = source.grain(name)
    count = min(size, -(-SAMPLE // grain) * grain)
    for first in sorted({0, max(0, (size - count) // grain * grain)}) if size else ():
        values = source.read(name, first, min(count, size - first))
        digest.update(np.asarray(values).astype(np.float64).tobytes())
    return digest.hexdigest()[:16]
