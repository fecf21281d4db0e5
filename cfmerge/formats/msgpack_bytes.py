"""The bytes of a msgpack file of Flax: one way through them that trusts nothing and copies no array."""

import math
import mmap
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from cfmerge.formats.base import bytes_of

DTYPES: dict[str, np.dtype] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64", "complex64", "complex128"),
            *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
            *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz),
        ),
    )
}
ARRAY, SCALAR = 1, 3  # Flax's codes of extensions
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH, MAX_NAMES, MAX_AXES = 100, 1 << 20, 32
SIZED = {  # first byte: what it begins, and in how many bytes its size stands
    **{0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("extension", 1), 0xC8: ("extension", 2)},
    **{0xC9: ("extension", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("list", 2)},
    **{0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
NUMBERS = {first: struct.Struct(f">{kind}") for first, kind in zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True)}


class Corrupt(Exception):
    """Bytes that cannot be, and what is wrong with them."""


class Item(NamedTuple):
    """The beginning of a value: its kind, its size (bytes or entries), its value or its extension's code."""

    kind: str
    size: int = 0
    value: int | float | bool | None = None


class Array(NamedTuple):
    """An array's header, and where its bytes begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


Leaf = tuple[tuple[int, ...], list[Array]] | np.ndarray | None  # an array in pieces, a number, nothing


class Walk:
    """One way through the bytes, from front to back.

    Attributes:
        name: of the value that is looked at.
        keys: `{name: its keys}` where one of them holds a "/".
    """

    def __init__(self, content: mmap.mmap | bytes):
        self._content, self._at, self._names, self.name = content, 0, 0, ""
        self.keys: dict[str, tuple[str, ...]] = {}

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """`(name, leaf)` of the whole file."""
        top = self._item()
        if top.kind != "map":
            raise Corrupt(f"it begins with {_told(top)}, not with a map")
        yield from self._inside(top, "", 0)
        if self._at != len(self._content):
            raise Corrupt(f"{len(self._content) - self._at} bytes follow the end")

    def _inside(self, item: Item, prefix: str, depth: int) -> Iterator[tuple[str, Leaf]]:
        if depth > MAX_DEPTH:
            raise Corrupt(f"more than {MAX_DEPTH} maps lie in one another")
        for name, value in self._entries(item, prefix):
            if value.kind == "map" and self._begins_chunked():
                yield name, self._chunked(value, name)
            elif value.kind in {"map", "list"}:
                yield from self._inside(value, name + "/", depth + 1)
            elif value.kind == "nothing":
                yield name, None
            elif value.kind == "number":
                yield name, np.asarray(value.value)
            else:
                array = self._array(value)
                yield name, (array.shape, [array])

    def _entries(self, item: Item, prefix: str) -> Iterator[tuple[str, Item]]:
        """`(name, beginning of the value)` in a map or a list."""
        seen = set()
        for number in range(item.size):
            key = self._text() if item.kind == "map" else str(number)
            name, folder = prefix + key, prefix.removesuffix("/")
            if "/" in key or folder in self.keys:
                self.keys[name] = (*self.keys.get(folder, folder.split("/") if prefix else ()), key)
            self._names += 1
            if name in seen or self._names > MAX_NAMES:
                raise Corrupt(f"{name!r} is there twice" if name in seen else f"there are more than {MAX_NAMES} names")
            seen.add(name)
            self.name = name
            yield name, self._item()

    def _begins_chunked(self) -> bool:
        key = msgpack.packb(CHUNKED)
        return self._content[self._at : self._at + len(key)] == key

    def _chunked(self, item: Item, name: str) -> Leaf:
        """An array in pieces; its map has begun."""
        shape, pieces = dict[str, int](), dict[str, Array]()
        for key, value in self._entries(item, name + "/"):
            short = key.removeprefix(name + "/")
            if short == "shape" and value.kind == "map":
                for own, number in self._entries(value, ""):
                    shape[own] = number.value if type(number.value) is int and number.kind == "number" else -1
            elif short == "chunks" and value.kind == "map":
                for own, chunk in self._entries(value, ""):
                    pieces[own] = self._array(chunk)
            elif short != CHUNKED or value.value is not True:
                raise Corrupt(f"an array in chunks has an entry {short!r}")
        self.name = name
        try:
            axes = tuple(shape[str(number)] for number in range(len(shape)))
            chunks = [pieces[str(number)] for number in range(len(pieces))]
        except KeyError as error:
            raise Corrupt(f"an array in chunks lacks number {error}") from None
        entries = sum(math.prod(piece.shape) for piece in chunks)
        dtypes = {piece.dtype for piece in chunks}
        if len(dtypes) != 1 or min(axes, default=0) < 0 or len(axes) > MAX_AXES or math.prod(axes) != entries:
            raise Corrupt(f"chunks of {entries} entries ({len(dtypes)} dtypes) do not make an array of shape {axes}")
        return axes, chunks

    def _array(self, item: Item) -> Array:
        if item.kind != "extension" or item.value not in (ARRAY, SCALAR):
            raise Corrupt(f"it is {_told(item)}, not an array")
        end = self._at + item.size
        pack, axes = self._item(), self._item()
        if pack != Item("list", 3) or axes.kind != "list" or axes.size > MAX_AXES:
            raise Corrupt("its header is no shape, dtype and bytes")
        shape: Any = tuple(self._item().value for _ in range(axes.size))
        name = self._text()
        data = self._item()
        dtype = DTYPES.get(name)
        if dtype is None:
            raise Corrupt(f"it has dtype {name!r}, which cfmerge does not read; it reads {', '.join(DTYPES)}")
        if not all(type(axis) is int and 0 <= axis < 1 << 62 for axis in shape):
            raise Corrupt(f"it has the shape {shape}")
        needs = bytes_of((shape, dtype))
        if data.kind != "bytes" or data.size != needs or self._at + data.size != end:
            raise Corrupt(f"{name} of shape {shape} needs {needs} bytes, and there are {data.size}")
        return Array(shape, dtype, self._take(data.size))

    def _text(self) -> str:
        item = self._item()
        if item.kind not in {"text", "bytes"}:
            raise Corrupt(f"{_told(item)} stands where a text should")
        start = self._take(item.size)
        return self._content[start : start + item.size].decode()

    def _item(self) -> Item:
        """The beginning of the value that comes next; what has bytes begins behind it."""
        first = self._content[self._take(1)]
        if first in SIZED:
            kind, width = SIZED[first]
            start = self._take(width)
            size = int.from_bytes(self._content[start : start + width], "big")
            code = self._content[self._take(1)] if kind == "extension" else None
            return self._whole(Item(kind, size, code))
        if first in FIXED_EXTENSIONS:
            return self._whole(Item("extension", FIXED_EXTENSIONS[first], self._content[self._take(1)]))
        if first in NUMBERS:
            number = NUMBERS[first]
            return Item("number", 0, number.unpack_from(self._content, self._take(number.size))[0])
        if first < 0x80 or first >= 0xE0:
            return Item("number", 0, first - 256 * (first >= 0xE0))
        if first >= 0xA0 and first < 0xC0:
            return self._whole(Item("text", first & 31))
        if first < 0xA0:
            return self._whole(Item("list" if first & 16 else "map", first & 15))
        if first == 0xC1:
            raise Corrupt("there is a byte c1, which is no msgpack")
        return Item("nothing") if first == 0xC0 else Item("number", 0, first == 0xC3)

    def _whole(self, item: Item) -> Item:
        """The item, if the file has so many bytes left; an entry has one at least."""
        if item.size > len(self._content) - self._at:
            raise Corrupt(f"it claims {item.size} {item.kind} bytes or entries, and {self._left()} bytes are left")
        return item

    def _left(self) -> int:
        return len(self._content) - self._at

    def _take(self, count: int) -> int:
        """Where the next bytes begin; they are passed over."""
        if count > self._left():
            raise Corrupt(f"it ends after {len(self._content)} bytes")
        self._at += count
        return self._at - count


def _told(item: Item) -> str:
    told = {"nothing": "nothing", "bytes": "bytes", "extension": f"an extension {item.value}"}
    return told.get(item.kind, f"a {item.kind}")


def sized(kind: str, size: int) -> bytes:
    """The beginning of a value with a size, in as few bytes as there are."""
    first, width = next((f, w) for f, (own, w) in SIZED.items() if own == kind and size < 1 << 8 * w)
    return bytes([first]) + size.to_bytes(width, "big")
