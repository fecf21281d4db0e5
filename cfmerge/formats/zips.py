"""Zip archives of stored members: where each member lies, once all headers agree, and the layout of a new one.

PyTorch's files and NumPy's .npz are such. Members lie in the archive and apart from one another, so that none claims
more bytes than it has. Python's `zipfile` reads the directory; a member's own header must say the same.
"""

import io
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Checksum, FileLayout
from cfmerge.formats.mapped import mapped

ZIP = b"PK\x03\x04"
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
FULL, FULL_COUNT = 0xFFFFFFFF, 0xFFFF  # the number stands elsewhere, in 64 bits
ENCRYPTED, LATER, UTF8 = 0x2041, 0x8, 0x800  # flags: encryption; CRC and sizes behind the data; the name's encoding
DESCRIPTOR = 24  # bytes at most behind a member that was streamed: its CRC-32 and sizes
NO_DATE = 0x21  # 1 January 1980: what is written depends on the tensors alone
PADDING = b"FB"  # the extra field that PyTorch pads with
METHODS = {8: "deflate", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstandard", 95: "xz"}
AGAIN = "fetch the file again"


class Member(NamedTuple):
    """A member: its place, its CRC-32, and how it is packed: "" where its bytes stand there as they are."""

    start: int
    size: int
    crc: int
    packed: str = ""


class Crc32:
    """The CRC-32 that some bytes should have; they are compared with it once, whatever thread comes first.

    Attributes:
        expected: None if it is not known, or has been compared.
    """

    __slots__ = ("_lock", "expected")

    def __init__(self, expected: int | None):
        self.expected, self._lock = expected, threading.Lock()

    def check(self, content: memoryview, where: str) -> None:
        """Raises `CfmergeError` if the bytes are others; where they have been compared it does nothing."""
        if self.expected is None:
            return
        with self._lock:
            if self.expected is not None:
                found = zlib.crc32(content)
                if found != self.expected:
                    raise CfmergeError(
                        f"{where} should have the CRC-32 {self.expected:08x}, and has {found:08x}: its bytes were "
                        f"changed; {AGAIN}"
                    )
                self.expected = None


def members(content: memoryview, where: str) -> dict[str, Member]:
    """The members of a zip archive by name; none overlaps another.

    Raises:
        CfmergeError: headers contradict one another.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(BytesFile(content))) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError, LookupError, OverflowError,
            EOFError) as error:  # fmt: skip
        raise CfmergeError(
            f"{where}: the zip archive is truncated or corrupt ({error}), and the arrays or the pickle in it were not "
            f"opened; {AGAIN}"
        ) from None
    found: dict[str, Member] = {}
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, at = info.filename, info.header_offset
        start = _data_start(content, info)
        apart = 0 <= at - last <= DESCRIPTOR  # no member lies between that the directory does not tell of
        if start is None or name in found or not apart or start + info.compress_size > end:
            raise CfmergeError(
                f"{where}: member {name!r} is corrupt: its header at {at} and its {info.file_size} bytes do not fit "
                f"what the archive's directory says; {AGAIN}"
            )
        found[name] = Member(start, info.compress_size, info.CRC, _packed(info))
        last = start + info.compress_size
    if end - last > DESCRIPTOR:
        raise CfmergeError(
            f"{where}: the zip archive is corrupt: its directory begins at {end}, and tells of nothing behind {last}; "
            f"{AGAIN}"
        )
    return found


def _packed(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & ENCRYPTED:
        return "encrypted"
    method = METHODS.get(info.compress_type, f"method {info.compress_type}")
    return f"compressed ({method})" if info.compress_type != zipfile.ZIP_STORED else ""


def _data_start(content: memoryview, info: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin; None if its own header is not the one that the directory tells of."""
    header = bytes(content[info.header_offset : info.header_offset + LOCAL.size])
    if len(header) < LOCAL.size or not header.startswith(ZIP):
        return None
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack(header)
    start = info.header_offset + LOCAL.size
    name = bytes(content[start : start + name_length])
    later = bool(flags & LATER)
    fits = name == info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437", "replace")
    fits &= method == info.compress_type and flags == info.flag_bits
    fits &= method != zipfile.ZIP_STORED or info.file_size == info.compress_size
    fits &= (later and crc == 0) or crc == info.CRC
    sizes = ((packed, info.compress_size), (size, info.file_size))
    fits &= all((later and n == 0) or n in (told, FULL) for n, told in sizes)
    return start + name_length + extra_length if fits else None


class StoredZip:
    """One mapped zip file.

    Attributes:
        members: `{name: Member}` in the order in which they lie.

    Raises:
        CfmergeError: no zip file, truncated, inconsistent, encrypted or compressed; names file and member.
    """

    def __init__(self, path: Path, unpacked: str):
        """Opens a file; `unpacked` is the way out for one whose members are compressed."""
        self.path = path
        self._content = mapped(path)
        self.members = members(self._content, str(path))
        for name, member in self.members.items():
            if member.packed:
                raise CfmergeError(f"{path}: member {name!r} is {member.packed}, so it cannot be mapped; {unpacked}")
        self._crcs = {name: Crc32(member.crc) for name, member in self.members.items()}

    def content(self, name: str) -> memoryview:
        """A member's bytes, unchecked."""
        member = self.members[name]
        return self._content[member.start : member.start + member.size]

    def checked(self, name: str) -> memoryview:
        """A member's bytes, compared with their CRC-32 when it is first asked for.

        Raises:
            CfmergeError: they are others.
        """
        content = self.content(name)
        self._crcs[name].check(content, f"{self.path}: member {name!r}")
        return content


def lay(members: Mapping[str, tuple[bytes, int]], align: int = 64, start: int = 0) -> FileLayout:
    """Where everything lies in a zip file that is written.

    Args:
        members: `{name: (its first bytes, how many follow)}`; those that follow are a place of the layout.
        align: a member begins at a multiple of it.
        start: the archive's first byte in the file, also such a multiple.
    """
    fixed, checksums, central = list[tuple[int, bytes]](), list[tuple[int, int, int, int]](), bytearray()
    places: dict[str, int] = {}
    end = 0
    for name, (begin, rest) in members.items():
        raw, size, header = name.encode(), len(begin) + rest, end
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= FULL else b""
        short, crc = min(size, FULL), 0 if rest else zlib.crc32(begin)
        gap = -(header + LOCAL.size + len(raw) + len(wide) + 4) % align
        extra = wide + struct.pack("<2sH", PADDING, gap) + bytes(gap)
        needs, flags = 45 if size >= FULL or header >= FULL else 20, 0 if name.isascii() else UTF8
        sizes = (needs, flags, 0, 0, NO_DATE, crc, short, short, len(raw))
        local = LOCAL.pack(b"PK\3\4", *sizes, len(extra)) + raw + extra
        first = header + len(local)
        fixed.append((start + header, local + begin))
        places[name], end = start + first + len(begin), first + size
        over = ([size, size] if size >= FULL else []) + ([header] if header >= FULL else [])
        extra = struct.pack(f"<2H{len(over)}Q", 1, 8 * len(over), *over) if over else b""
        if rest:
            checksums.append((start + first, size, start + header + 14, len(central) + 16))
        central += CENTRAL.pack(
            b"PK\1\2", (3 << 8) | needs, *sizes, len(extra), 0, 0, 0, 0o600 << 16, min(header, FULL)
        )
        central += raw + extra
    count, size, last = len(members), len(central), b""
    if count >= FULL_COUNT or size >= FULL or end >= FULL:
        last = END_64.pack(b"PK\6\6", 44, (3 << 8) | 45, 45, 0, 0, count, count, size, end)
        last += LOCATOR_64.pack(b"PK\6\7", 0, end + size, 1)
    few = min(count, FULL_COUNT)
    last += END.pack(b"PK\5\6", 0, 0, few, few, min(size, FULL), min(end, FULL), 0)
    fixed.append((start + end, bytes(central) + last))
    written = tuple(Checksum(first, size, (local, start + end + place)) for first, size, local, place in checksums)
    return FileLayout(start + end + len(fixed[-1][1]), tuple(_joined(fixed)), places, written)


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


class BytesFile(io.RawIOBase):
    """Bytes as a file, without a copy of them."""

    def __init__(self, content: memoryview):
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._content[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._content))[whence]
        if self._at < 0:
            raise OSError("before the first byte")
        return self._at

    def tell(self) -> int:
        return self._at
