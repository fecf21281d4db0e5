"""A distributed checkpoint that is written: `__0_N.distcp` files of chunks, and the `.metadata` that tells of them.

A chunk is a run of rows, so that a file has at most so many bytes of tensors; a row is never cut.
`torch.distributed.checkpoint.load` reads it into any division of the tensors.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cfmerge.formats.base import Checksum, FileLayout, Header, bytes_of
from cfmerge.formats.boxes import Box
from cfmerge.formats.distributed_index import NAME, ROOM, Chunk, Record
from cfmerge.formats.opcodes import Opcodes
from cfmerge.formats.shards import Divide
from cfmerge.formats.torch_layouts import ALIGNED, NAMES, archive, tensor

Paths = Mapping[str, tuple[str | int, ...]]


def distributed(opaque: Mapping[str, bytes] | None = None, paths: Paths | None = None) -> Divide:
    """The division of tensors into the files of a distributed checkpoint, for `ShardWriter(files=...)`.

    Args:
        opaque: objects that are no tensors, as the bytes that they have in another such checkpoint.
        paths: `{name: keys}` in the nested dictionary that is saved; by default the name is the only key.
    """
    return functools.partial(_divided, opaque=opaque or {}, paths=paths or {})


def rows_of(header: Header, max_bytes: int) -> Iterator[Box]:
    """The chunks of a tensor: as many whole rows as fit into so many bytes, at least one.

    >>> [box.start for box in rows_of(((5, 2), np.dtype("f4")), 16)]
    [(0, 0), (2, 0), (4, 0)]
    """
    shape = header[0]
    row = bytes_of((shape[1:], header[1]))
    step = max(1, max_bytes // row) if shape and row else max(1, shape[0]) if shape else 1
    if not shape or step >= shape[0]:
        yield Box((0,) * len(shape), shape)
        return
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        yield Box((first, *(0,) * (len(shape) - 1)), (last, *shape[1:]))


class _File:
    """A file that grows record by record."""

    def __init__(self, name: str):
        self.name, self.size, self.held = name, 0, 0
        self.fixed: list[tuple[int, bytes]] = []
        self.places: dict[str, tuple[tuple[int, int], ...]] = {}
        self.checksums: list[Checksum] = []

    def add_bytes(self, content: bytes) -> Record:
        self.fixed.append((self.size, content))
        record = Record(self.name, self.size, len(content))
        self.size += len(content)
        return record

    def add(self, name: str, header: Header, first: int) -> Record:
        """A chunk's record; `first` is its first byte in the tensor."""
        start = -(-self.size // ALIGNED) * ALIGNED
        self.fixed.append((self.size, b"\0" * (start - self.size)))
        write = Opcodes()
        laid = archive(write.ended(tensor(write, header, "0")), {"0": bytes_of(header)}, {}, start)
        self.fixed += laid.fixed
        self.checksums += laid.checksums
        place: Any = laid.places["0"]
        self.places[name] = (*self.places.get(name, ()), (first, place))
        self.size, self.held = laid.size, self.held + bytes_of(header)
        return Record(self.name, start, laid.size - start)

    def layout(self) -> FileLayout:
        return FileLayout(self.size, tuple(one for one in self.fixed if one[1]), self.places, tuple(self.checksums))


def _divided(
    tensors: Mapping[str, Header], max_bytes: int, opaque: Mapping[str, bytes], paths: Paths
) -> tuple[dict[str, FileLayout], dict[str, bytes]]:
    files = [_File("__0_0.distcp")]
    records = {name: files[0].add_bytes(content) for name, content in opaque.items()}
    chunks: dict[str, list[Chunk]] = {}
    for name, header in tensors.items():
        dtype, first = np.dtype(header[1]), 0
        for box in rows_of(header, max_bytes):
            own = (box.shape, dtype)
            if files[-1].held and files[-1].held + bytes_of(own) > max_bytes:
                files.append(_File(f"__0_{len(files)}.distcp"))
            chunks.setdefault(name, []).append(Chunk(box, files[-1].add(name, own, first)))
            first += bytes_of(own)
    return {file.name: file.layout() for file in files}, {NAME: index(tensors, chunks, records, paths)}


def index(
    tensors: Mapping[str, Header], chunks: Mapping[str, list[Chunk]], opaque: Mapping[str, Record], paths: Paths
) -> bytes:
    """The `.metadata`: a pickle of torch's `Metadata`."""
    write = Opcodes()
    top = write.name(ROOM, "Metadata")
    described = [(write.text(name), _described(write, tensors[name], own)) for name, own in chunks.items()]
    described += [(write.text(name), write.name(ROOM, "BytesStorageMetadata") + b")\x81") for name in opaque]
    stored = [
        pair
        for name, own in chunks.items()
        for number, chunk in enumerate(own)
        for pair in [_stored(write, name, chunk.record, chunk.box.start, number)]
    ]
    stored += [_stored(write, name, record) for name, record in opaque.items()]
    kept = [(write.text(name), _keys(write, paths.get(name, (name,)))) for name in (*tensors, *opaque)]
    state = {
        "state_dict_metadata": write.dict_of(described),
        "storage_data": write.dict_of(stored),
        "planner_data": write.dict_of(kept),
        "version": write.text("1.0.0"),
    }
    return write.ended(_object(write, top, state))


def _object(write: Opcodes, cls: bytes, fields: Mapping[str, bytes]) -> bytes:
    return write.object(cls, write.dict_of([(write.text(name), value) for name, value in fields.items()]))


def _size(write: Opcodes, numbers: tuple[int, ...]) -> bytes:
    return write.call(write.name("torch", "Size"), write.numbers(numbers))


def _described(write: Opcodes, header: Header, chunks: list[Chunk]) -> bytes:
    cls = write.name(ROOM, "TensorStorageMetadata")
    properties = write.name(ROOM, "TensorProperties")
    state = [
        write.name("torch", NAMES[np.dtype(header[1])]),
        write.call(write.name("torch.serialization", "_get_layout"), write.text("torch.strided")),
        b"\x89",  # requires_grad
        write.call(write.name(ROOM, "_MEM_FORMAT_ENCODING"), write.number(0)),
        b"\x89",  # pin_memory
    ]
    fields = {
        "properties": write.object(properties, write.tuple_of(*state)),
        "size": _size(write, header[0]),
        "chunks": write.list_of([_chunk(write, chunk.box) for chunk in chunks]),
    }
    return _object(write, cls, fields)


def _chunk(write: Opcodes, box: Box) -> bytes:
    cls = write.name(ROOM, "ChunkStorageMetadata")
    return _object(write, cls, {"offsets": _size(write, box.start), "sizes": _size(write, box.shape)})


def _stored(
    write: Opcodes, name: str, record: Record, start: tuple[int, ...] | None = None, number: int = 0
) -> tuple[bytes, bytes]:
    cls, fields = write.name(ROOM, "MetadataIndex"), {"fqn": write.text(name)}
    if start is not None:
        fields |= {"offset": _size(write, start), "index": write.number(number)}
    key = _object(write, cls, fields)
    info = write.name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    place = {"relative_path": write.text(record.file), "offset": write.number(record.offset)}
    return key, _object(write, info, place | {"length": write.number(record.length)})


def _keys(write: Opcodes, keys: tuple[str | int, ...]) -> bytes:
    return write.tuple_of(*(write.text(key) if isinstance(key, str) else write.number(key) for key in keys))
