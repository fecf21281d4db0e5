"""safetensors: a zero-copy reader that trusts nothing, and the layout of a file that is written.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, data. The
library's own reader copies every tensor, and its writer wants a whole shard in memory; hence these two.
"""

import json
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import FileLayout, Header, TensorInfo, bytes_of
from cfmerge.formats.mapped import read_ahead

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
QUANTISED = {  # read, so that the model is known as quantised, and copied by `convert`
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
READ = DTYPES | QUANTISED
NAMES = {dtype: name for name, dtype in READ.items()}
MAX_HEADER = 100_000_000  # the reference implementation's limit


class SafetensorsFile:
    """One mapped file. The header is checked when it is opened, tensors are views of the map.

    Raises:
        CfmergeError: not a safetensors file, truncated, or with an inconsistent header; names file and tensor.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        self._map: mmap.mmap | None = None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
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
        self.metadata, self.tensors, self._offsets = self._parse(header, size - 8 - length)
        self.ties = {  # as safetensors.torch.save_model tells them
            alias: name for alias, name in self.metadata.items() if name in self.tensors and alias not in self.tensors
        }

    def _parse(self, header: bytes, data_size: int) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        try:
            entries = json.loads(header)
            metadata = entries.pop("__metadata__", None) or {}
            odd = [repr(key) for key, value in metadata.items() if not isinstance(value, str)]
            self.notes = (f"metadata {and_more(odd)} is not text; it is kept as JSON text",) if odd else ()
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

    def grain(self, name: str) -> int:
        return 1

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
        start, size = self._data_start + self._offsets[name], info.dtype.itemsize
        read_ahead(self._map, start + first * size, (info.size if count is None else count) * size)
        flat = np.frombuffer(self._map, info.dtype, info.size, start)
        return flat.reshape(info.shape) if count is None else flat[first : first + count]


def _text(value: object) -> str:
    """A value of the metadata as the format has it: text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def lay(tensors: Mapping[str, Header], metadata: Mapping[str, str]) -> FileLayout:
    """Where a header and tensors lie in one file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name, header in tensors.items():
        if np.dtype(header[1]) not in NAMES:
            raise CfmergeError(
                f"tensor {name!r} is {header[1]}, which safetensors cannot hold; it holds {', '.join(READ)}"
            )
        start, end = end, end + bytes_of(header)
        entries[name] = {"dtype": NAMES[np.dtype(header[1])], "shape": list(header[0]), "data_offsets": [start, end]}
        places[name] = start
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = struct.pack("<Q", len(text)) + text
    return FileLayout(len(first) + end, ((0, first),), {name: len(first) + start for name, start in places.items()})
