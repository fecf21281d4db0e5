"""npz files of NumPy: mapped and checked, nothing in them is unpickled; and the layout of a file that is written.

The format: a zip file of `.npy` files, each a line of text that tells dtype, order and shape, and the array's bytes.
NumPy does not know bfloat16: it writes such arrays as two bytes without a meaning, `V2`, and they are taken for it.
"""

import ast
import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import FileLayout, Header, TensorInfo, bytes_of
from cfmerge.formats.ranges import flat_range
from cfmerge.formats.trees import chosen
from cfmerge.formats.zips import StoredZip
from cfmerge.formats.zips import lay as lay_zip

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
READ = {  # what stands behind the order of the bytes
    dtype.str[1:]: dtype
    for dtype in map(np.dtype, ("?", *"bhiq", *"BHIQ", *"efd", "F", "D"))
} | {"V2": BFLOAT16}  # fmt: skip
WRITTEN = {dtype: code for code, dtype in READ.items()}
MAX_HEADER, MAX_AXES = 10_000, 32


class _Place(NamedTuple):
    """How an array lies in its member: from which byte on, in which dtype, and whether by columns."""

    member: str
    first: int
    dtype: np.dtype
    fortran: bool


class NpzFile:
    """One mapped file. Headers are checked when it is opened, an array's CRC-32 when it is first read.

    Raises:
        CfmergeError: no npz file, truncated, inconsistent, compressed, or with other things than arrays of numbers;
            names file and tensor.
    """

    ties: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, subtree: str = ""):
        """Opens a file, or of it the arrays below `subtree` alone; see `trees.chosen`."""
        self.path, self.files = path, (path,)
        self._zip = StoredZip(path, f"save it uncompressed: numpy.savez(OUT, **numpy.load({str(path)!r}))")
        tensors: dict[str, TensorInfo] = {}
        places: dict[str, _Place] = {}
        other = [name for name in self._zip.members if not name.endswith(".npy")]
        if other:
            raise CfmergeError(
                f"{path}: {and_more(other)}: no array (.npy) of NumPy; is this another kind of zip file?"
            )
        for member in self._zip.members:
            name = member.removesuffix(".npy")
            try:
                shape, places[name] = _header(member, self._zip.content(member))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, struct.error) as error:
                raise CfmergeError(f"{path}: tensor {name!r}: {error}; fetch the file again") from None
            tensors[name] = TensorInfo(shape, places[name].dtype.newbyteorder("="), path)
        own, self.notes = chosen(tensors, subtree, path)
        self.tensors: dict[str, TensorInfo] = {name: tensors[whole] for name, whole in own.items()}
        self._places = {name: places[whole] for name, whole in own.items()}

    def grain(self, name: str) -> int:
        """1; of an array that lies by columns a row, so that no row is gathered twice."""
        shape = self.tensors[name].shape
        return max(1, math.prod(shape[1:])) if self._places[name].fortran else 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on."""
        info, place = self.tensors[name], self._places[name]
        if not 0 <= first <= first + (count or 0) <= info.size:
            raise IndexError(f"tensor {name!r} has {info.size} entries: there are no {count} from {first} on")
        content = self._zip.checked(place.member)
        flat = np.frombuffer(content, place.dtype, info.size, place.first) if info.size else np.zeros(0, info.dtype)
        if place.fortran and info.size:
            array = flat.reshape(info.shape[::-1]).T
            piece = array.reshape(-1) if count is None else flat_range(array, first, count)
        else:
            piece = flat if count is None else flat[first : first + count]
        piece = piece.astype(info.dtype, copy=False)
        piece.flags.writeable = False
        return piece.reshape(info.shape) if count is None else piece


def _header(member: str, content: memoryview) -> tuple[tuple[int, ...], _Place]:
    """Shape and place of an array; other errors than `ValueError` are those of `ast.literal_eval`."""
    start = bytes(content[:12])
    wide = start[6:7] > b"\1"
    if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise ValueError("no .npy file, or of an unknown version")
    first = 12 if wide else 10
    length = struct.unpack_from("<L" if wide else "<H", start, 8)[0]
    if length > MAX_HEADER or first + length > len(content):
        raise ValueError(f"its header should have {length} bytes of {len(content)}")
    text = bytes(content[first : first + length]).decode("latin1" if start[6] < 3 else "utf-8")
    header = ast.literal_eval(text.strip(" \n\0"))
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header does not tell dtype, order and shape")
    descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise ValueError(f"it has the shape {shape!r}")
    dtype = _dtype(descr)
    needs = bytes_of((shape, dtype))
    if len(shape) > MAX_AXES or type(fortran) is not bool or first + length + needs != len(content):
        raise ValueError(f"{descr} of shape {shape} needs {needs} bytes, and there are {len(content) - first - length}")
    order = fortran and sum(n != 1 for n in shape) > 1  # otherwise both orders are one
    return shape, _Place(member, first + length, dtype, order)


def _dtype(descr: object) -> np.dtype:
    """The dtype that a header names."""
    known = READ.get(descr[1:]) if isinstance(descr, str) else None
    order = descr[:1] if isinstance(descr, str) else ""
    if descr == "|O":
        raise ValueError("it holds Python objects, which are pickled; they are not opened, because pickles run code")
    if isinstance(descr, str) and descr[1:] == "V1":
        raise ValueError("its dtype is not in the file (V1: one of several of 8 bits); save it in another format")
    if known is None or order not in {"<", ">", "|"} or (order == ">" and known == BFLOAT16):
        raise ValueError(f"it has dtype {descr!r}, which cfmerge does not read; it reads {', '.join(READ)}")
    return known.newbyteorder(order) if known != BFLOAT16 else known


def lay(tensors: Mapping[str, Header], metadata: Mapping[str, str]) -> FileLayout:
    """Where headers and arrays lie in one file; the format has no place for metadata.

    Raises:
        CfmergeError: the format has no name for a tensor's dtype.
    """
    members = {}
    for name, (shape, dtype) in tensors.items():
        code = WRITTEN.get(np.dtype(dtype))
        if code is None:
            raise CfmergeError(f"tensor {name!r} is {dtype}, which an npz file does not name; cast it (dtype: ...)")
        descr = ("|" if code in {"b1", "i1", "u1"} else "<") + code
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        members[f"{name}.npy"] = header.getvalue(), bytes_of((shape, dtype))
    layout = lay_zip(members)
    return FileLayout(
        layout.size, layout.fixed, {name: layout.places[f"{name}.npy"] for name in tensors}, layout.checksums
    )
