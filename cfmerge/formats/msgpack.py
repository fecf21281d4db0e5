"""msgpack files of Flax: a zero-copy reader that trusts nothing, and the layout of a file that is written.

The format: maps in maps, whose leaves are extensions. Extension 1 is an array, packed as `(shape, dtype name, bytes)`,
extension 3 a NumPy scalar packed alike. An array of more than 2**30 bytes is a map `{"__msgpack_chunked_array__": true,
"shape": {"0": ...}, "chunks": {"0": ...}}`. Flax's own reader holds the whole file and copies every array; hence this.
"""

import bisect
import itertools
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgpack
import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import FileLayout, Header, TensorInfo, bytes_of
from cfmerge.formats.msgpack_bytes import ARRAY, CHUNKED, DTYPES, FIXED_EXTENSIONS, Corrupt, Walk, sized
from cfmerge.formats.trees import below, chosen, nested

CHUNK = 1 << 30  # bytes: larger arrays are written in chunks
AGAIN = "the file is truncated or corrupt, fetch it again"


class MsgpackFile:
    """One mapped file. All headers are read when it is opened, tensors are views of the map.

    A name is the keys on the way to the array, joined by "/". A plain number is a tensor without axes.

    Raises:
        CfmergeError: no msgpack file of Flax, truncated, or inconsistent; names file and tensor.
    """

    ties: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, subtree: str = ""):
        """Opens a file, or of it the arrays below `subtree` alone; see `trees.chosen`."""
        self.path, self.files = path, (path,)
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
        tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, list[int]] = {}  # {name: the first entry of each of its pieces}
        self._offsets: dict[str, list[int]] = {}  # {name: where each of its pieces begins}
        self._numbers: dict[str, np.ndarray] = {}
        walk, empty = Walk(self._map), []
        try:
            for name, leaf in walk.leaves():
                if name in tensors:
                    raise Corrupt(f"there are two tensors {name!r}")
                if leaf is None:
                    empty.append(name)
                elif isinstance(leaf, np.ndarray):
                    self._numbers[name] = leaf
                    tensors[name] = TensorInfo((), leaf.dtype, path)
                else:
                    shape, pieces = leaf
                    sizes = [math.prod(piece.shape) for piece in pieces]
                    self._starts[name] = [0, *itertools.accumulate(sizes[:-1])]
                    self._offsets[name] = [piece.offset for piece in pieces]
                    tensors[name] = TensorInfo(shape, pieces[0].dtype, path)
        except (Corrupt, UnicodeDecodeError) as error:
            where = f"tensor {walk.name!r}" if walk.name else "it is no msgpack file of Flax"
            raise CfmergeError(f"{path}: {where}: {error}; {AGAIN}") from None
        self._own, self.notes = chosen(tensors, subtree, path)
        self.tensors: dict[str, TensorInfo] = {name: tensors[own] for name, own in self._own.items()}
        odd = {name: own for name, own in self._own.items() if own in walk.keys}
        self.keys = {name: below(walk.keys[own], own.removesuffix(name)) for name, own in odd.items()}
        if empty:
            self.notes += (f"{and_more(empty)}: None, not an array; not read",)

    def grain(self, name: str) -> int:
        return 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on."""
        info = self.tensors[name]
        if not 0 <= first <= first + (count or 0) <= info.size:
            raise IndexError(f"tensor {name!r} has {info.size} entries: there are no {count} from {first} on")
        end = info.size if count is None else first + count
        own = self._own[name]
        flat = self._numbers[own].reshape(-1)[first:end] if own in self._numbers else self._flat(own, info, first, end)
        flat.flags.writeable = False
        return flat.reshape(info.shape) if count is None else flat

    def _flat(self, own: str, info: TensorInfo, first: int, end: int) -> np.ndarray:
        """Entries of the flat tensor; a copy only where they lie in several pieces."""
        starts, parts = self._starts[own], list[np.ndarray]()
        while first < end:
            piece = bisect.bisect_right(starts, first) - 1
            stop = min(end, starts[piece + 1]) if piece + 1 < len(starts) else end
            offset = self._offsets[own][piece] + (first - starts[piece]) * info.dtype.itemsize
            parts.append(np.frombuffer(self._map, info.dtype, stop - first, offset))
            first = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, info.dtype)


def lay(
    tensors: Mapping[str, Header],
    metadata: Mapping[str, str],
    keys: Mapping[str, tuple[str | int, ...]] | None = None,
) -> FileLayout:
    """Where arrays and the maps around them lie in one file; the format has no place for metadata.

    The bytes are those that `flax.serialization.to_bytes` writes.

    Args:
        keys: the keys of names that are not to be cut at every "/".
    """
    fixed, places = list[tuple[int, bytes]](), dict[str, list[tuple[int, int]]]()
    start, between = 0, bytearray()  # bytes since the last array, and where they begin
    for piece in _laid(nested(tensors, keys)):
        if isinstance(piece, bytes):
            between += piece
            continue
        name, first, count = piece
        fixed.append((start, bytes(between)))
        offset = start + len(between)
        places.setdefault(name, []).append((first, offset))
        start, between = offset + count, bytearray()
    if between:
        fixed.append((start, bytes(between)))
    one = {name: where[0][1] if len(where) == 1 else tuple(where) for name, where in places.items()}
    return FileLayout(start + len(between), tuple(fixed), one)


def _laid(tree: object, prefix: str = "") -> Iterator[bytes | tuple[str, int, int]]:
    """Bytes, and `(tensor, its first byte, how many)` where a tensor's bytes come."""
    assert isinstance(tree, dict)
    yield msgpack.Packer().pack_map_header(len(tree))
    for key, value in tree.items():
        yield msgpack.packb(key)
        if isinstance(value, dict):
            yield from _laid(value, prefix + key + "/")
            continue
        name, (shape, dtype) = prefix + key, value
        itemsize, size = np.dtype(dtype).itemsize, bytes_of(value)
        if np.dtype(dtype).name not in DTYPES:
            raise CfmergeError(f"tensor {name!r} is {dtype}, which a msgpack file does not hold; cast it (dtype: ...)")
        if size <= CHUNK:
            yield from _packed_array(name, shape, dtype, 0, size)
            continue
        most = max(1, CHUNK // itemsize) * itemsize
        axes = {str(number): axis for number, axis in enumerate(shape)}
        starts = range(0, size, most)
        yield msgpack.packb({CHUNKED: True, "shape": axes, "chunks": {}})[:-1]
        yield msgpack.Packer().pack_map_header(len(starts))
        for number, first in enumerate(starts):
            count = min(most, size - first)
            yield msgpack.packb(str(number))
            yield from _packed_array(name, (count // itemsize,), dtype, first, count)


def _packed_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype, first: int, count: int
) -> Iterator[bytes | tuple[str, int, int]]:
    head = b"\x93" + msgpack.packb(tuple(shape)) + msgpack.packb(np.dtype(dtype).name) + sized("bytes", count)
    size = len(head) + count
    fits = next((first for first, own in FIXED_EXTENSIONS.items() if own == size), None)
    yield (bytes([fits]) if fits else sized("extension", size)) + bytes([ARRAY]) + head
    yield name, first, count
