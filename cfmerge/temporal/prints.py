"""Hashes by which a model is known again, of the first and last entries of each tensor: quick for any size."""

import hashlib

import msgspec
import numpy as np

from cfmerge.formats import Source

SAMPLE = 1024  # entries at each end


def prints(source: Source) -> dict[str, str]:
    """`{tensor: hash of its header and of its first and last entries}`."""
    return {name: _print(source, name) for name in sorted(source.tensors)}


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
