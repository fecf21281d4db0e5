"""The `.metadata` of a distributed checkpoint: which chunks of which tensors lie where. It is read, never loaded."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.boxes import Box, tile
from cfmerge.formats.pickles import MAX_BYTES, Call, interpret
from cfmerge.formats.torch_archives import AGAIN
from cfmerge.formats.torch_tensors import dtype_of, numbers
from cfmerge.models import Shape

NAME = ".metadata"
MAX_CHUNKS = 10_000_000
ROOM = "torch.distributed.checkpoint.metadata"


class Record(NamedTuple):
    """A place in a file, by its name in the directory."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor, and the record that holds it."""

    box: Box
    record: Record


class Entry(NamedTuple):
    """A tensor: its chunks tile its shape."""

    shape: Shape
    dtype: np.dtype
    chunks: tuple[Chunk, ...]


class Index(NamedTuple):
    """What a distributed checkpoint holds.

    Attributes:
        tensors: by their names.
        opaque: objects that are no tensors, pickled, by their names.
        paths: `{name: keys}`: where it stood in the nested dictionary that was saved.
    """

    tensors: Mapping[str, Entry]
    opaque: Mapping[str, Record]
    paths: Mapping[str, tuple[str | int, ...]]


def read_index(directory: Path) -> Index:
    """The index of the checkpoint in a directory.

    Raises:
        CfmergeError: it would run something, is corrupt, or tells of a tensor whose chunks are not all of it.
    """
    path = directory / NAME
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CfmergeError(f"{path}: has {size} bytes, cfmerge reads at most {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
    value = interpret(content, str(path)).value
    fields = _fields(value, f"{ROOM}.Metadata", path)
    records = _records(fields.get("storage_data"), path)
    tensors: dict[str, Entry] = {}
    opaque: dict[str, Record] = {}
    left = MAX_CHUNKS
    for name, described in _items(fields.get("state_dict_metadata"), path):
        chunks = described.state.get("chunks") if isinstance(described, Call) and type(described.state) is dict else ()
        left -= len(chunks) if type(chunks) is list else 0
        if left < 0:
            raise CfmergeError(f"{path}: tells of more than {MAX_CHUNKS} chunks")
        if type(name) is not str or not isinstance(described, Call):
            raise CfmergeError(f"{path}: an entry has no name, or no description; {AGAIN}")
        if str(described.func) == f"{ROOM}.TensorStorageMetadata":
            tensors[name] = _entry(name, described, records, path)
        elif str(described.func) == f"{ROOM}.BytesStorageMetadata":
            opaque[name] = _record(records, name, None, path)
        else:
            raise CfmergeError(f"{path}: {name!r} is a {described.func}, which cfmerge does not know")
    paths = fields.get("planner_data")
    return Index(tensors, opaque, _paths(paths) if type(paths) is dict else {})


def _entry(name: str, described: Call, records: Mapping[tuple, Record | str], path: Path) -> Entry:
    fields = _fields(described, f"{ROOM}.TensorStorageMetadata", path)
    where = f"{path}: tensor {name!r}"
    properties = getattr(fields.get("properties"), "state", None)
    if type(properties) is tuple and properties:
        dtype = dtype_of(properties[0], where)
    else:
        dtype = dtype_of(properties.get("dtype") if type(properties) is dict else None, where)
    shape = numbers(fields.get("size"))
    boxes: dict[Box, None] = {}
    chunks = fields.get("chunks")
    for chunk in chunks if type(chunks) is list else ():
        own = _fields(chunk, f"{ROOM}.ChunkStorageMetadata", path)
        start, sizes = numbers(own.get("offsets")), numbers(own.get("sizes"))
        if not len(start) == len(sizes) == len(shape) or -1 in (*start, *sizes):
            raise CfmergeError(f"{where} of shape {shape} has a chunk of sizes {sizes} at {start}; {AGAIN}")
        boxes[Box(start, tuple(a + n for a, n in zip(start, sizes, strict=True)))] = None
    if -1 in shape or not tile(list(boxes), shape):
        held = sum(box.size for box in boxes)
        raise CfmergeError(
            f"{where} of shape {shape}: its {len(boxes)} chunks hold {held} entries and do not make it up exactly: "
            "chunks are missing or overlap; save the checkpoint again, or fetch all of it"
        )
    return Entry(shape, dtype, tuple(Chunk(box, _record(records, name, box.start, path)) for box in boxes if box.size))


def _records(found: Any, path: Path) -> dict[tuple, Record | str]:
    """`{(name, first entry): record}`, or why the record is not read."""
    records: dict[tuple, Record | str] = {}
    for index, info in _items(found, path):
        own = _fields(index, f"{ROOM}.MetadataIndex", path)
        offset = own.get("offset")
        place = _fields(info, "torch.distributed.checkpoint.filesystem._StorageInfo", path)
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if type(file) is not str or type(start) is not int or type(length) is not int or start < 0 or length < 0:
            raise CfmergeError(f"{path}: the place of {_shown(own.get('fqn'))} is no file and range; {AGAIN}")
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in file or "\0" in file:
            raise CfmergeError(f"{path}: {_shown(own.get('fqn'))} is to lie in {file!r}, outside of the checkpoint")
        changed: Any = place.get("transform_descriptors")
        told = (
            ", ".join(one for one in changed if type(one) is str) if isinstance(changed, list | tuple) else "some way"
        )
        key = (own.get("fqn") if type(own.get("fqn")) is str else None, None if offset is None else numbers(offset))
        records[key] = Record(file, start, length) if not changed else f"is compressed or changed by {told}"
    return records


def _record(records: Mapping[tuple, Record | str], name: str, start: tuple[int, ...] | None, path: Path) -> Record:
    found = records.get((name, start))
    if isinstance(found, Record):
        return found
    what = found or "is in no file"
    way = "save it without such extensions" if found else "save the checkpoint again, or fetch all of it"
    chunk = "" if start is None else f" chunk at {start}"
    raise CfmergeError(f"{path}: {name!r}{chunk} {what}; {way}")


def _paths(found: dict) -> dict[str, tuple[str | int, ...]]:
    return {
        name: keys
        for name, keys in found.items()
        if type(name) is str and type(keys) is tuple and all(type(key) in (str, int) for key in keys)
    }


def _fields(value: Any, cls: str, path: Path) -> dict[str, Any]:
    """The fields of an object of that class."""
    if not isinstance(value, Call) or str(value.func) != cls or not isinstance(value.state or {}, dict):
        found = value.func if isinstance(value, Call) else type(value).__name__
        raise CfmergeError(f"{path}: holds a {found} where a {cls} is expected; it is not a checkpoint's, or corrupt")
    return value.state or {}


def _items(value: Any, path: Path) -> list[tuple[Any, Any]]:
    if type(value) is not dict:
        raise CfmergeError(f"{path}: lacks a dictionary of entries or of their places; {AGAIN}")
    return list(value.items())


def _shown(name: Any) -> str:
    return repr(name) if type(name) is str else "an entry"
