"""safetensors: a zero-copy reader that trusts nothing, and a writer that fills shards as tensors come.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, data. The
library's own reader copies every tensor, and its writer wants a whole shard in memory; hence these two.
"""

import json
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Header, TensorInfo
from cfmerge.formats.magic import wrong_file
from cfmerge.formats.ranges import Covered, Range

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}
QUANTISED = {  # read, so that the model is known as quantised; not written
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
READ = DTYPES | QUANTISED
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the reference implementation's limit


class SafetensorsFile:
    """One mapped file. The header is checked when it is opened, tensors are views of the map.

    Raises:
        CfmergeError: not a safetensors file, truncated, or with an inconsistent header; names file and tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(64)
                wrong = wrong_file(path, start, size)
                if wrong:
                    raise CfmergeError(wrong)
                length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
                if size < 8 or length > MAX_HEADER or 8 + length > size:
                    raise CfmergeError(
                        f"{path}: not a safetensors file, or truncated: a header of {length} bytes does not "
                        f"fit a file of {size} bytes; fetch the file again"
                    )
                file.seek(8)
                header = file.read(length)
        except OSError as error:
            raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
        self._data_start = 8 + length
        self.odd: tuple[str, ...] = ()  # keys of the metadata whose values are not text
        self.metadata, self.tensors, self._offsets = self._parse(header, size - 8 - length)

    def _parse(self, header: bytes, data_size: int) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        try:
            entries = json.loads(header)
            metadata = entries.pop("__metadata__", None) or {}
            self.odd = tuple(key for key, value in metadata.items() if not isinstance(value, str))
            metadata = {key: _text(value) for key, value in metadata.items()}
            parsed = sorted(
                (tuple(entry["data_offsets"]), name, entry["dtype"], tuple(entry["shape"]))
                for name, entry in entries.items()
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CfmergeError(
                f"{self.path}: the safetensors header is corrupt ({error!r}); fetch the file again"
            ) from None
        tensors, offsets, end = {}, {}, 0
        for offset, name, dtype, shape in parsed:
            if not isinstance(dtype, str) or dtype not in READ:
                packed = isinstance(dtype, str) and re.match(r"F[468]", dtype)
                raise CfmergeError(
                    f"{self.path}: tensor {name!r} has dtype {dtype!r}, which cfmerge does not read; "
                    + ("the model is quantised: merge the model that it was made from; " if packed else "")
                    + f"it reads {', '.join(DTYPES)}"
                )
            if not all(type(n) is int and n >= 0 for n in (*shape, *offset)) or len(offset) != 2:
                raise CfmergeError(f"{self.path}: tensor {name!r} has a corrupt header: {shape}, {offset}")
            info = TensorInfo(shape, READ[dtype], self.path)
            if offset[0] != end or offset[1] - offset[0] != info.nbytes:
                raise CfmergeError(
                    f"{self.path}: tensor {name!r}, {dtype} of shape {shape}, needs {info.nbytes} bytes from "
                    f"{end}, but its header says {offset[0]} to {offset[1]}; the file is corrupt, fetch it again"
                )
            tensors[name], offsets[name], end = info, offset[0], offset[1]
        if end != data_size:
            raise CfmergeError(
                f"{self.path}: the header describes {end} bytes of tensors, the file holds {data_size}; "
                "it is truncated or corrupt, fetch it again"
            )
        return metadata, tensors, offsets

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.zeros(info.shape if count is None else 0, info.dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not 0 <= first <= first + (count or 0) <= info.size:
            raise IndexError(f"tensor {name!r} has {info.size} entries: there are no {count} from {first} on")
        flat = np.frombuffer(self._map, info.dtype, info.size, self._data_start + self._offsets[name])
        return flat.reshape(info.shape) if count is None else flat[first : first + count]


def _text(value: object) -> str:
    """A value of the metadata as the format has it: text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shard(tensors: Mapping[str, Header], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `max_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Unfit(Exception):
    """Files of an earlier writer that cannot be gone on with."""


class ShardWriter:
    """A writer of a model as safetensors shards with an index, tensor by tensor, in any order.

    All headers are written and all space is reserved at once, so a full disk is known before the first tensor.

    Args:
        index: the name of the index; none: another writer makes it.
        done: ranges that an earlier writer has written into the files that are there; none: the files are new.

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
    ):
        self._files: list[int] = []
        self._place: dict[str, tuple[int, int]] = {}
        self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in tensors.items()}
        self._sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, (shape, _) in tensors.items()}
        self._done = Covered() if done is None else done
        self._lock, self._dirty, self._resumed = threading.Lock(), set[int](), done is not None
        shards = shard(tensors, max_shard_bytes)
        weight_map: dict[str, str] = {}
        try:
            for number, names in enumerate(shards, 1):
                suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
                file = f"{stem}{suffix}.safetensors"
                weight_map |= dict.fromkeys(names, file)
                self._create(directory / file, {name: tensors[name] for name in names}, metadata)
        except BaseException:
            self.abort()
            raise
        if len(shards) > 1 and index is not None:
            total = sum(size * self._dtypes[name].itemsize for name, size in self._sizes.items())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / (index or f"{stem}.safetensors.index.json")).write_text(json.dumps(content, indent=2) + "\n")

    def _create(self, path: Path, tensors: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (shape, _) in tensors.items():
            size = self._sizes[name] * self._dtypes[name].itemsize
            entries[name] = {
                "dtype": NAMES[self._dtypes[name]],
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            end += size
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        header = struct.pack("<Q", len(header)) + header
        start = len(header)
        how = os.O_RDWR if self._resumed else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            file = os.open(path, how, 0o644)
        except FileNotFoundError:
            raise Unfit(f"{path}: is not there") from None
        self._files.append(file)
        if self._resumed and (os.fstat(file).st_size != start + end or os.pread(file, start, 0) != header):
            raise Unfit(f"{path}: is another file than its journal tells of")
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, start + end)
        if not self._resumed:
            _write_all(file, header, 0)
        for name, entry in entries.items():
            if name != "__metadata__":
                self._place[name] = (file, start + entry["data_offsets"][0])  # type: ignore[index]

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Writes a tensor, or a piece of it from flat element `first` on."""
        file, offset = self._place[name]
        if values.dtype != self._dtypes[name]:
            raise TypeError(f"tensor {name!r} is to be {self._dtypes[name]}, got {values.dtype}")
        values = np.ascontiguousarray(values)
        if values.nbytes:
            _write_all(file, values.reshape(-1).view(np.uint8).data, offset + first * values.itemsize)
        with self._lock:
            self._done.add(name, first, values.size)
            self._dirty.add(file)

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
        missing = [name for name, size in self._sizes.items() if self._done.count(name) != size]
        if missing:
            self.abort()
            raise CfmergeError(f"tensors were not wholly written: {', '.join(missing[:5])}")
        for file in self._files:
            os.fsync(file)
        self.abort()

    def abort(self) -> None:
        """Closes the files, whatever is in them."""
        for file in self._files:
            os.close(file)
        self._files = []


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
