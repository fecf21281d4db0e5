"""A model written as files whose layout is known before the first tensor: safetensors, PyTorch, msgpack, npz."""

import bisect
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats import safetensors
from cfmerge.formats.base import FileLayout, Header, bytes_of
from cfmerge.formats.ranges import Covered, Range

Lay = Callable[[Mapping[str, Header], Mapping[str, str]], FileLayout]  # of named tensors and metadata in one file
# The layouts of files by name, and the small files beside them, of tensors and of the bytes that a file has at most.
Divide = Callable[[Mapping[str, Header], int], tuple[Mapping[str, FileLayout], Mapping[str, bytes]]]
CHECKED_AT_ONCE = 1 << 24  # bytes


def shard(tensors: Mapping[str, Header], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `max_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, header in tensors.items():
        size = bytes_of(header)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def divide(stem: str, suffix: str, index: str | None, metadata: Mapping[str, str], lay: Lay) -> Divide:
    """The division into one file, or into numbered shards with an index in JSON beside them."""

    def divided(tensors: Mapping[str, Header], max_bytes: int) -> tuple[dict[str, FileLayout], dict[str, bytes]]:
        shards = shard(tensors, max_bytes)
        layouts: dict[str, FileLayout] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            numbered = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            file = f"{stem}{numbered}{suffix}"
            layouts[file] = lay({name: tensors[name] for name in names}, metadata)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) == 1:
            return layouts, {}
        total = sum(map(bytes_of, tensors.values()))
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return layouts, {index or f"{stem}{suffix}.index.json": (json.dumps(content, indent=2) + "\n").encode()}

    return divided


class Unfit(Exception):
    """Files of an earlier writer that cannot be gone on with."""


class Writer(Protocol):
    """The writer of one folder of an output."""

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None: ...

    def covers(self, ranges: Iterable[Range]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class ShardWriter:
    """A writer of a model as shards with an index, tensor by tensor, in any order.

    All that is no tensor is written, and all space is reserved, at once: a full disk is known before the first tensor.

    Args:
        index: the name of the index; none: another writer makes it.
        done: ranges that an earlier writer has written into the files that are there; none: the files are new.
        suffix, lay: of the format's files.
        files: how a format that has its own division into files, and its own index, divides tensors into files of so
            many bytes; then `stem`, `suffix`, `metadata`, `lay` and the index's name are not looked at.

    Raises:
        Unfit: the files that are there are not those of an earlier writer.
        CfmergeError: on `close`, if a tensor was not wholly written.
        OSError: the disk is full, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Header],
        max_shard_bytes: int,
        metadata: Mapping[str, str],
        stem: str = "model",
        index: str | None = "",
        done: Covered | None = None,
        *,
        suffix: str = ".safetensors",
        lay: Lay = safetensors.lay,
        files: Divide | None = None,
    ):
        self._files: list[tuple[int, FileLayout]] = []
        self._place: dict[str, list[tuple[int, int, int]]] = {}  # {name: [(first byte, file, offset), ...]}
        self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in tensors.items()}
        self._sizes = {name: bytes_of(header) for name, header in tensors.items()}
        self._done = Covered() if done is None else done
        self._lock, self._dirty, self._resumed = threading.Lock(), set[int](), done is not None
        divided = files or divide(stem, suffix, index, metadata, lay)
        layouts, beside = divided(tensors, max_shard_bytes)
        try:
            for name, layout in layouts.items():
                self._create(directory / name, layout)
        except BaseException:
            self.abort()
            raise
        for places in self._place.values():
            places.sort()
        for name, content in beside.items() if index is not None else ():
            (directory / name).write_bytes(content)

    def _create(self, path: Path, layout: FileLayout) -> None:
        how = os.O_RDWR if self._resumed else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            file = os.open(path, how, 0o644)
        except FileNotFoundError:
            raise Unfit(f"{path}: is not there") from None
        self._files.append((file, layout))
        if self._resumed and not _begun(file, layout):
            raise Unfit(f"{path}: is another file than its journal tells of")
        if hasattr(os, "posix_fallocate") and layout.size:
            os.posix_fallocate(file, 0, layout.size)
        if not self._resumed:
            for offset, content in layout.fixed:
                _write_all(file, content, offset)
        for name, place in layout.places.items():
            pieces = ((0, place),) if isinstance(place, int) else place
            self._place.setdefault(name, []).extend((first, file, offset) for first, offset in pieces)

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Writes a tensor, or a piece of it from flat element `first` on."""
        if values.dtype != self._dtypes[name]:
            raise TypeError(f"tensor {name!r} is to be {self._dtypes[name]}, got {values.dtype}")
        values = np.ascontiguousarray(values)
        pieces: list[tuple[int, int, memoryview]] = []
        if values.nbytes:
            data = values.reshape(-1).view(np.uint8).data
            pieces = list(_pieces(self._place[name], data, first * values.itemsize))
            for file, offset, piece in pieces:
                _write_all(file, piece, offset)
        with self._lock:
            self._done.add(name, first, values.size)
            self._dirty.update(file for file, _, _ in pieces)

    def covers(self, ranges: Iterable[Range]) -> None:
        """Takes note of ranges that another writer of the same files has written."""
        with self._lock:
            for one in ranges:
                self._done.add(*one)

    def sync(self) -> None:
        """Makes safe what is written so far."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for file in dirty:
            getattr(os, "fdatasync", os.fsync)(file)

    def close(self) -> None:
        sizes = {name: size // self._dtypes[name].itemsize for name, size in self._sizes.items()}
        missing = [name for name, size in sizes.items() if self._done.count(name) != size]
        if missing:
            self.abort()
            raise CfmergeError(f"tensors were not wholly written: {', '.join(missing[:5])}")
        for file, layout in self._files:
            for checked in layout.checksums:
                crc = _crc32(file, checked.first, checked.size).to_bytes(4, "little")
                for place in checked.places:
                    _write_all(file, crc, place)
            os.fsync(file)
        self.abort()

    def abort(self) -> None:
        """Closes the files, whatever is in them."""
        for file, _ in self._files:
            os.close(file)
        self._files = []


def _begun(file: int, layout: FileLayout) -> bool:
    """Whether a file is as a writer of this layout has left it; its checksums may be there or not."""
    places = sorted(place for checked in layout.checksums for place in checked.places)
    if os.fstat(file).st_size != layout.size:
        return False
    for offset, content in layout.fixed:
        found = bytearray(os.pread(file, len(content), offset))
        inside = places[bisect.bisect_left(places, offset) : bisect.bisect_left(places, offset + len(content))]
        for place in inside:
            found[place - offset : place - offset + 4] = content[place - offset : place - offset + 4]
        if found != content:
            return False
    return True


def _pieces(
    places: Sequence[tuple[int, int, int]], data: memoryview, first: int
) -> Iterator[tuple[int, int, memoryview]]:
    """`(file, offset in it, bytes)` of a tensor's bytes from `first` on."""
    starts = [start for start, _, _ in places]
    while data:
        number = bisect.bisect_right(starts, first) - 1
        start, file, offset = places[number]
        count = len(data) if number + 1 == len(starts) else min(len(data), starts[number + 1] - first)
        yield file, offset + first - start, data[:count]
        data, first = data[count:], first + count


def _crc32(file: int, first: int, count: int) -> int:
    crc = 0
    while count:
        content = os.pread(file, min(count, CHECKED_AT_ONCE), first)
        crc, first, count = zlib.crc32(content, crc), first + len(content), count - len(content)
    return crc


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def save(directory: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], stem: str) -> None:
    """Small models at once: one file `stem.safetensors`."""
    headers = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    writer = ShardWriter(directory, headers, 1 << 62, metadata, stem)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
