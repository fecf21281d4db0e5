"""PyTorch's two kinds of file, as a pickle's records and the places of the storages that it names.

Zip (since 1.6): members `*/data.pkl`, `*/data/KEY`, stored. Before: five pickles in a row (a magic number,
1001, facts of the system, the object, the keys of the storages), then for each key a count of 8 bytes and the bytes.
"""

import dataclasses
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pickles import MAX_BYTES, Global, Persistent, Pickle, interpret
from cfmerge.formats.zips import AGAIN as AGAIN
from cfmerge.formats.zips import ZIP as ZIP
from cfmerge.formats.zips import BytesFile, Crc32, Member, members

MAGIC = 0x1950A86A20F9469CFC6C
OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickle of the magic number
_NAMES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: dict[str, np.dtype] = {  # by their names in torch
    name: np.dtype(getattr(ml_dtypes, name, None) or getattr(np, name)) for name in _NAMES.split()
} | {"bool": np.dtype(np.bool_)}
STORAGES: dict[str, np.dtype] = {
    f"{kind}Storage": DTYPES[name]
    for kind, name in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    }.items()
}  # fmt: skip
METADATA = "cfmerge/metadata.json"  # the member of an archive that cfmerge adds


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    """Bytes that tensors view.

    Attributes:
        dtype: its numbers'; None if its tensors say it.
        start, nbytes: its place in the file.
        crc: its CRC-32, where the file has one.
    """

    key: str
    dtype: np.dtype | None
    start: int
    nbytes: int
    crc: Crc32 = dataclasses.field(default_factory=lambda: Crc32(None))

    def check(self, content: memoryview, where: str) -> None:
        """Raises `CfmergeError` if the bytes are not those that were written; looks once."""
        self.crc.check(
            content[self.start : self.start + self.nbytes],
            f"{where}: the file is corrupt there: member data/{self.key}",
        )


class Archive(NamedTuple):
    """A file's content: the bytes, the pickle, the storages by their keys, and the metadata that cfmerge has added."""

    content: memoryview
    pickle: Pickle
    storages: Mapping[str, Storage]
    metadata: Mapping[str, str]


def open_archive(content: memoryview, where: str) -> Archive:
    """The archive in some bytes, which are read where they are needed.

    Raises:
        CfmergeError: it is no file of torch's, it is corrupt, or it holds something that is not read.
    """
    if content[:4] == ZIP:
        return _open_zip(content, where)
    if content[: len(OLD)] == OLD:
        return _open_old(content, where)
    if content[257:262] == b"ustar":
        raise CfmergeError(f"{where}: is a tar file, as torch wrote before 2017; load and save it with torch")
    raise CfmergeError(
        f"{where}: is not a file that torch.save wrote: it begins with {bytes(content[:8])!r}, expected a zip archive "
        f"or torch's magic number; {AGAIN}"
    )


def _open_zip(content: memoryview, where: str) -> Archive:
    files = members(content, where)
    pickles = [name for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CfmergeError(
            f"{where}: is a zip archive with {len(pickles)} members NAME/data.pkl, and torch.save writes one; "
            "unpack it, and name what it holds"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in files or any(name.startswith(f"{root}code/") for name in files):
        raise CfmergeError(
            f"{where}: is a TorchScript program, not only weights; save these: "
            "torch.save(torch.jit.load(FILE).state_dict(), OUT)"
        )
    packed = [name for name, member in files.items() if member.packed]
    if packed:
        raise CfmergeError(
            f"{where}: member {and_more([repr(name) for name in packed])} is compressed or encrypted, and torch.save "
            "writes neither; unpack the archive and name what it holds, or save the model again"
        )
    _check_order(_small(content, files, f"{root}byteorder", where) or b"little", where)
    pickle = interpret(_small(content, files, pickles[0], where) or b"", where)
    checked = any(member.crc for member in files.values())  # none has a CRC-32: torch was told to write none
    storages = {}
    for key, dtype, nbytes in _named(pickle.persistents, where):
        member = files.get(f"{root}data/{key}")
        if member is None or member.size != nbytes:
            found = "is missing" if member is None else f"has {member.size} bytes"
            raise CfmergeError(f"{where}: member {root}data/{key} {found}, expected {nbytes} bytes; {AGAIN}")
        storages[key] = Storage(key, dtype, member.start, nbytes, Crc32(member.crc if checked else None))
    return Archive(content, pickle, storages, _metadata(_small(content, files, f"{root}{METADATA}", where), where))


def _metadata(content: bytes | None, where: str) -> dict[str, str]:
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CfmergeError(f"{where}: member {METADATA} is not a JSON object of texts; {AGAIN}")
    return found


def _small(content: memoryview, files: Mapping[str, Member], name: str, where: str) -> bytes | None:
    """The content of a member, checked; None if there is none."""
    if name not in files:
        return None
    start, size, crc, _ = files[name]
    if size > MAX_BYTES:
        raise CfmergeError(f"{where}: member {name!r} has {size} bytes, cfmerge reads at most {MAX_BYTES}")
    found = bytes(content[start : start + size])
    if zlib.crc32(found) != crc and any(member.crc for member in files.values()):
        raise CfmergeError(f"{where}: member {name!r} is corrupt: its CRC-32 is another; {AGAIN}")
    return found


def _check_order(order: bytes, where: str) -> None:
    if order != b"little":
        raise CfmergeError(
            f"{where}: its numbers are big-endian ({order[:16]!r}), cfmerge reads little-endian ones; load it with "
            "torch on such a machine as cfmerge runs on, and save it again"
        )


def _open_old(content: memoryview, where: str) -> Archive:
    file = io.BufferedReader(BytesFile(content[:MAX_BYTES]))
    magic, version, system, pickle, keys = (interpret(file, where) for _ in range(5))  # type: ignore[arg-type]
    if magic.value != MAGIC or version.value != 1001 or not isinstance(system.value, dict):
        raise CfmergeError(f"{where}: is not a file that torch.save wrote, or a corrupt one; {AGAIN}")
    _check_order(b"little" if system.value.get("little_endian", True) is True else b"big", where)
    named = {key: (dtype, nbytes) for key, dtype, nbytes in _named(pickle.persistents, where)}
    if type(keys.value) is not list or not named.keys() <= {key for key in keys.value if type(key) is str}:
        raise CfmergeError(f"{where}: its list of storages lacks some that its tensors view; {AGAIN}")
    storages, at = {}, file.tell()
    for key in keys.value:
        if type(key) is not str or key not in named or key in storages:
            raise CfmergeError(f"{where}: its list of storages holds one that no tensor views, or one twice; {AGAIN}")
        dtype, nbytes = named[key]
        count = int.from_bytes(content[at : at + 8], "little") * (1 if dtype is None else dtype.itemsize)
        if count != nbytes or at + 8 + nbytes > len(content):
            raise CfmergeError(
                f"{where}: storage {key} at byte {at} has {count} bytes, its tensors say {nbytes}, and the file has "
                f"{max(0, len(content) - at - 8)} left; it is truncated or corrupt, {AGAIN}"
            )
        storages[key] = Storage(key, dtype, at + 8, nbytes)
        at += 8 + nbytes
    globals = tuple(dict.fromkeys(name for one in (magic, version, system, pickle, keys) for name in one.globals))
    return Archive(content, pickle._replace(globals=globals), storages, {})


def _named(persistents: Sequence[Persistent], where: str) -> list[tuple[str, np.dtype | None, int]]:
    """`(key, dtype, bytes)` of the storages that a pickle names, each once."""
    found: dict[str, tuple[np.dtype | None, int]] = {}
    for persistent in persistents:
        key, dtype, nbytes = _storage(persistent.id, where)
        if found.setdefault(key, (dtype, nbytes)) != (dtype, nbytes):
            raise CfmergeError(f"{where}: storage {key} is described in two ways; the file is corrupt, {AGAIN}")
    return [(key, *rest) for key, rest in found.items()]


def _storage(id: Any, where: str) -> tuple[str, np.dtype | None, int]:
    """`(key, dtype, bytes)` out of `("storage", type, key, location, count)`, or that and a view's, which is None."""
    if not (type(id) is tuple and len(id) in (5, 6) and id[0] == "storage" and isinstance(id[1], Global)):
        raise CfmergeError(f"{where}: it refers to something that is no storage of numbers; {AGAIN}")
    kind, key, _, count, *view = id[1:]
    if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 60:
        raise CfmergeError(f"{where}: a storage has a key that is no text, or no size; {AGAIN}")
    if view and view[0] is not None:
        raise CfmergeError(f"{where}: storage {key} is a view of another, as in 2017; load and save it with torch")
    if kind.name == "UntypedStorage":
        return key, None, count
    if kind.name not in STORAGES or kind.module not in ("torch", "torch.cuda"):
        raise CfmergeError(
            f"{where}: storage {key} is a {kind}, which cfmerge does not read (quantised numbers have no meaning of "
            f"their own); it reads {', '.join(DTYPES)}"
        )
    return key, STORAGES[kind.name], count * STORAGES[kind.name].itemsize
