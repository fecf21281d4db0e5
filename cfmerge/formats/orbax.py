"""Checkpoints of Orbax, read array by array without Orbax: its v0 and v1, zarr 2 and 3, in OCDBT or a folder an array.

`_METADATA` names the arrays; shapes and dtypes stand in the arrays themselves, which tensorstore reads. A chunk is
compressed, and is often the whole array: it is the least that is read, and the last ones are kept for the next piece.
"""

import collections
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import TensorInfo
from cfmerge.formats.orbax_layout import Tree, files_of, find_tree, read_tree, text_metadata
from cfmerge.formats.safetensors import READ
from cfmerge.formats.trees import below, chosen

KEPT = 2  # decoded blocks: as many as threads that read pieces
ALL = -1  # in place of a block's number
MOST_PACKED = 40_000  # zstd packs no array into fewer bytes than one in so many
SMALL = 1 << 26  # bytes: an array of so few is believed
AGAIN = "the checkpoint is incomplete or corrupt; fetch it again"


class OrbaxCheckpoint:
    """One directory of arrays: headers when it is opened, an array or some of its chunks when asked for.

    A name is the keys on the way to the array, joined by "/"; lists count from 0. `keys` has the keys themselves, with
    which a key that holds a "/" and a list come out as they were.

    Raises:
        CfmergeError: no checkpoint of Orbax, unfinished, several items, incomplete, or inconsistent.
    """

    ties: Mapping[str, str] = {}

    def __init__(self, path: Path, subtree: str = "", *, whole: bool = False):
        """Opens a directory, or of it the arrays below `subtree` alone, see `trees.chosen`; or all that is in it."""
        self.path = path
        folder, notes = find_tree(path)
        tree = read_tree(folder)
        own, left_out = ({name: name for name in tree.leaves}, ()) if whole else chosen(tree.leaves, subtree, path)
        self.keys = {name: below(tree.keys[full], full.removesuffix(name)) for name, full in own.items()}
        self.notes: tuple[str, ...] = notes + tree.notes + left_out
        self.metadata: Mapping[str, str] = text_metadata(folder)
        self.files = files_of(tree)
        arrays = _open(tree, {name: tree.leaves[whole] for name, whole in own.items()})
        stored = sum(file.stat().st_size for file in self.files)
        self.tensors: dict[str, TensorInfo] = {n: _info(n, array, folder, stored) for n, array in arrays.items()}
        self._arrays = arrays
        self._kept: collections.OrderedDict[tuple[str, int], np.ndarray] = collections.OrderedDict()
        self._locks = {name: threading.Lock() for name in arrays}
        self._lock = threading.Lock()

    def grain(self, name: str) -> int:
        """The entries of a row of chunks."""
        return self._rows(name) * math.prod(self.tensors[name].shape[1:])

    def _rows(self, name: str) -> int:
        """How many rows a chunk has."""
        shape, chunk = self.tensors[name].shape, self._arrays[name].chunk_layout.read_chunk.shape
        return max(1, min(chunk[0] or shape[0], shape[0])) if shape and chunk else 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on."""
        info = self.tensors[name]
        if not 0 <= first <= first + (count or 0) <= info.size:
            raise IndexError(f"tensor {name!r} has {info.size} entries: there are no {count} from {first} on")
        if count is None:
            return self._whole(name)
        if not info.shape or not count:
            return self._decoded(name, ...).reshape(-1)[first : first + count]
        row, rows, end = math.prod(info.shape[1:]), self._rows(name), first + count
        parts, grain = [], rows * row
        while first < end:
            block = first // grain
            start, stop = block * grain, min((block + 1) * grain, info.size)
            if first == start and end >= stop:  # whole blocks, as many as there are
                until = end if end == info.size else end // grain * grain
                parts.append(self._decoded(name, slice(first // row, until // row)).reshape(-1))
            else:
                until = min(stop, end)
                parts.append(self._block(name, block, rows, until == stop)[first - start : until - start])
            first = until
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
        flat.flags.writeable = False
        return flat

    def _whole(self, name: str) -> np.ndarray:
        """All of the array; one that stacks layers is kept, since they are taken some at a time."""
        if len(self.tensors[name].shape) < 3:
            return self._decoded(name, ...)
        with self._locks[name]:
            with self._lock:
                found = self._kept.pop((name, ALL), None)
            if found is None:
                found = self._decoded(name, ...)
            self._keep(name, ALL, found)
        return found

    def _keep(self, name: str, block: int, values: np.ndarray) -> None:
        with self._lock:
            self._kept[name, block] = values
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _block(self, name: str, block: int, rows: int, last: bool) -> np.ndarray:
        """A row of chunks, flat; kept for the next piece, unless this is the last."""
        with self._locks[name]:
            with self._lock:
                found = self._kept.pop((name, block), None)
            if found is None:
                found = self._decoded(name, slice(block * rows, (block + 1) * rows)).reshape(-1)
            if not last:
                self._keep(name, block, found)
        return found

    def _decoded(self, name: str, rows: Any) -> np.ndarray:
        array = self._arrays[name]
        if isinstance(rows, slice):
            rows = slice(rows.start, min(rows.stop, self.tensors[name].shape[0]))
        try:
            values = np.asarray(array[rows].read(order="C").result())
        except Exception as error:  # tensorstore's errors are of several kinds
            raise CfmergeError(f"{self.path}: tensor {name!r} cannot be read: {_short(error)}; {AGAIN}") from None
        values.flags.writeable = False
        return values


def _open(tree: Tree, stored: Mapping[str, str]) -> dict[str, Any]:
    """`{name: tensorstore's handle}`."""
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    opening, arrays = {}, {}
    for name, own in stored.items():
        where = tree.folder.resolve()
        if tree.ocdbt:
            place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{where}/"}, "path": f"{own}/"}
        else:
            place = {"driver": "file", "path": f"{where}/{own}/"}
        spec = {"driver": "zarr3" if tree.zarr3 else "zarr", "kvstore": place, "fill_missing_data_reads": tree.sparse}
        opening[name] = tensorstore.open(spec, read=True, open=True, context=context)
    for name, future in opening.items():
        try:
            arrays[name] = future.result()
        except Exception as error:  # tensorstore's errors are of several kinds
            raise CfmergeError(f"{tree.folder}: tensor {name!r} cannot be opened: {_short(error)}; {AGAIN}") from None
    return arrays


def _info(name: str, array: Any, folder: Path, stored: int) -> TensorInfo:
    dtype, shape = np.dtype(array.dtype.numpy_dtype), tuple(array.shape)
    if dtype not in READ.values():
        known = ", ".join(own.name for own in READ.values())
        raise CfmergeError(
            f"{folder}: tensor {name!r} has dtype {dtype}, which cfmerge does not read; it reads {known}"
        )
    info = TensorInfo(shape, dtype, folder)
    chunk = array.chunk_layout.read_chunk.shape or ()
    claimed = max(info.nbytes, math.prod(chunk) * dtype.itemsize)
    if claimed > SMALL + MOST_PACKED * stored:
        raise CfmergeError(
            f"{folder}: tensor {name!r} of shape {shape} claims {claimed} bytes, more than the {stored} bytes of the "
            f"checkpoint's files can hold; {AGAIN}"
        )
    return info


def _short(error: Exception) -> str:
    """tensorstore's message without its own spec and source."""
    return str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
