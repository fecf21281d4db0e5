"""The layout of files that `torch.load(weights_only=True, mmap=True)` reads: a zip archive of stored members.

The pickle is written by hand. Every storage begins at a multiple of 64 bytes; its CRC-32 follows when its bytes are
there.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Checksum, FileLayout, Header, bytes_of
from cfmerge.formats.opcodes import Opcodes
from cfmerge.formats.torch_archives import DTYPES, METADATA, STORAGES

ALIGNED = 64
ROOT = "archive/"
LARGE, MANY = 0xFFFFFFFF, 0xFFFF  # from here on a number stands in a zip64 field
UTF8 = 0x800
DOS_DATE = 0x21  # 1980-01-01
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TYPED = {dtype: name for name, dtype in STORAGES.items()}


class Zip(NamedTuple):
    """The layout of an archive: its end, all bytes that are known, where members begin, and CRC-32s of the others."""

    end: int
    fixed: tuple[tuple[int, bytes], ...]
    starts: Mapping[str, int]
    checksums: tuple[Checksum, ...]


def lay(
    tensors: Mapping[str, Header], metadata: Mapping[str, str], ties: Mapping[str, str] | None = None, key: str = ""
) -> FileLayout:
    """The layout of a file with these tensors as an OrderedDict.

    Args:
        metadata: text, in a member of its own, which torch does not look at.
        ties: `{alias: name}`, further names of the same numbers.
        key: the entry under which the dictionary stands, levels apart by `::`; "": it is the whole object.
    """
    write = Opcodes()
    keys = {name: str(number) for number, name in enumerate(tensors)}
    named = [*((name, name) for name in tensors), *(ties or {}).items()]
    empty = write.call(write.name("collections", "OrderedDict"))
    pairs = [(write.text(name), tensor(write, tensors[owner], keys[owner])) for name, owner in named]
    value = empty + write.items(pairs)
    for step in reversed(key.split("::") if key else ()):
        value = write.dict_of([(write.text(step), value)])
    sizes = {keys[name]: bytes_of(header) for name, header in tensors.items()}
    kept = {name: text for name, text in metadata.items() if (name, text) != ("format", "pt")}
    laid = archive(write.ended(value), sizes, kept)
    return FileLayout(laid.end, laid.fixed, {name: laid.starts[keys[name]] for name in tensors}, laid.checksums)


def tensor(write: Opcodes, header: Header, key: str) -> bytes:
    """The opcodes of a tensor that is a whole storage."""
    shape, dtype = header[0], np.dtype(header[1])
    if dtype not in NAMES:
        raise CfmergeError(f"a tensor of {dtype} cannot be written to a PyTorch file; it holds {', '.join(DTYPES)}")
    typed, size = TYPED.get(dtype), bytes_of(header)
    kind = write.name("torch", typed) if typed else write.name("torch.storage", "UntypedStorage")
    count = size // dtype.itemsize if typed else size
    storage = (
        write.tuple_of(write.word("storage"), kind, write.text(key), write.word("cpu"), write.number(count)) + b"Q"
    )
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    hooks = write.call(write.name("collections", "OrderedDict"))
    args = [storage, write.number(0), write.numbers(shape), write.numbers(strides), b"\x89", hooks]
    if typed:
        return write.call(write.name("torch._utils", "_rebuild_tensor_v2"), *args)
    args.append(write.name("torch", NAMES[dtype]))
    return write.call(write.name("torch._utils", "_rebuild_tensor_v3"), *args)


def archive(pickle: bytes, sizes: Mapping[str, int], metadata: Mapping[str, str], start: int = 0) -> Zip:
    """The layout of an archive with such a pickle and storages of such sizes, from byte `start` of a file on."""
    small: list[tuple[str, bytes | int]] = [("data.pkl", pickle), ("byteorder", b"little")]
    if metadata:
        small.append((METADATA, json.dumps(dict(metadata)).encode()))
    storages: list[tuple[str, bytes | int]] = [(f"data/{key}", size) for key, size in sizes.items()]
    laid = _zip([*small, *storages, ("version", b"3\n")], start)
    return laid._replace(starts={key: laid.starts[f"data/{key}"] for key in sizes})


def _zip(members: Sequence[tuple[str, bytes | int]], start: int) -> Zip:
    """The layout of a zip archive of members whose bytes are known, or only how many they are."""
    at = start
    fixed: list[tuple[int, bytes]] = []
    starts, entries, later = {}, [], []
    for name, content in members:
        size = content if isinstance(content, int) else len(content)
        crc = 0 if isinstance(content, int) else zlib.crc32(content)
        header = _local(f"{ROOT}{name}".encode(), size, crc, at - start)
        starts[name] = at + len(header)
        fixed.append((at, header if isinstance(content, int) else header + content))
        entries.append(_central(f"{ROOT}{name}".encode(), size, crc, at - start))
        if isinstance(content, int) and size:
            later.append((len(entries) - 1, at + 14, starts[name], size))
        at = starts[name] + size
    places = np.cumsum([0, *(len(entry) for entry in entries)]).tolist()
    checksums = tuple(Checksum(data, size, (crc, at + places[n] + 16)) for n, crc, data, size in later)
    directory = b"".join(entries)
    fixed.append((at, directory + _end(len(entries), len(directory), at - start)))
    return Zip(at + len(fixed[-1][1]), tuple(_joined(fixed)), starts, checksums)


def _local(name: bytes, size: int, crc: int, at: int) -> bytes:
    """A member's header in front of its bytes, so long that these begin at a multiple of 64."""
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= LARGE else b""
    pad = -(at + 30 + len(name) + len(extra)) % ALIGNED
    if pad:
        pad += ALIGNED if pad < 4 else 0
        extra += b"FB" + struct.pack("<H", pad - 4) + b"\0" * (pad - 4)
    told = min(size, LARGE)
    version = 45 if size >= LARGE else 20
    head = struct.pack("<4s5H3I2H", b"PK\3\4", version, UTF8, 0, 0, DOS_DATE, crc, told, told, len(name), len(extra))
    return head + name + extra


def _central(name: bytes, size: int, crc: int, at: int) -> bytes:
    """A member's entry in the directory at the end."""
    large = [size, size] if size >= LARGE else []
    large += [at] if at >= LARGE else []
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    told, version = min(size, LARGE), 45 if large else 20
    head = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", version, version, UTF8, 0, 0, DOS_DATE, crc, told, told, len(name), len(extra),
        0, 0, 0, 0, min(at, LARGE),
    )  # fmt: skip
    return head + name + extra


def _end(count: int, size: int, at: int) -> bytes:
    """The records behind the directory."""
    told = (min(count, MANY), min(count, MANY), min(size, LARGE), min(at, LARGE))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *told, 0)
    if count < MANY and size < LARGE and at < LARGE:
        return end
    large = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
    return large + struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1) + end


def _joined(fixed: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The same bytes in as few pieces as there are."""
    joined: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, content in fixed:
        if offset != end:
            joined.append((offset, []))
        joined[-1][1].append(content)
        end = offset + len(content)
    return [(offset, b"".join(parts)) for offset, parts in joined]
