"""Zip files whose members are stored, not compressed: mapped, checked, and laid out before they are written.

PyTorch's files and NumPy's .npz are such. All numbers of the directory are checked against the file: members lie in
it and apart from one another, so no file claims more bytes than it has.
"""

import itertools
import mmap
import struct
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Checksum, FileLayout

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
FULL, FULL_COUNT = 0xFFFFFFFF, 0xFFFF  # the number stands elsewhere, in 64 bits
ENCRYPTED, UTF8 = 0x2041, 0x800  # flags: any of three kinds of encryption; the name's encoding
NO_DATE = 0x21  # 1 January 1980: what is written depends on the tensors alone
PADDING = b"FB"  # the extra field that PyTorch pads with
METHODS = {8: "deflate", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstandard", 95: "xz"}
AGAIN = "the file is truncated or corrupt, fetch it again"


class Member(NamedTuple):
    """A member: where its bytes begin in the file, how many there are, and the CRC-32 that they should have."""

    start: int
    size: int
    crc: int


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
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self.members = _members(self.map, unpacked)
        except _Corrupt as error:
            raise CfmergeError(f"{path}: {error}") from None
        except (struct.error, UnicodeDecodeError) as error:
            raise CfmergeError(f"{path}: the directory of the zip file cannot be read ({error}); {AGAIN}") from None
        self._unchecked = {name: threading.Lock() for name in self.members}

    def content(self, name: str) -> memoryview:
        """A member's bytes, unchecked."""
        start, size, _ = self.members[name]
        return memoryview(self.map)[start : start + size]

    def checked(self, name: str) -> memoryview:
        """A member's bytes; the first call compares them with their CRC-32, and other threads wait for it.

        Raises:
            CfmergeError: they are others.
        """
        content, lock = self.content(name), self._unchecked.get(name)
        if lock is None:
            return content
        with lock:
            if name in self._unchecked:
                found, expected = zlib.crc32(content), self.members[name].crc
                if found != expected:
                    raise CfmergeError(
                        f"{self.path}: member {name!r} should have the CRC-32 {expected:08x}, and has {found:08x}: its "
                        "bytes were changed; fetch the file again"
                    )
                del self._unchecked[name]
        return content


class _Corrupt(Exception):
    """Something in the directory that cannot be; what it is, and the way out."""


def _members(content: mmap.mmap | bytes, unpacked: str) -> dict[str, Member]:
    count, size, first = _end(content)
    members: dict[str, Member] = {}
    spans: list[tuple[int, int, str]] = []
    at = first
    for _ in range(count):
        fields = CENTRAL.unpack_from(content, at)
        name_length, extra_length, comment_length = fields[10:13]
        at, name_at = at + CENTRAL.size + name_length + extra_length + comment_length, at + CENTRAL.size
        if fields[0] != b"PK\1\2" or at > first + size:
            raise _Corrupt(f"entry {len(members) + 1} of the zip file's directory is no entry; {AGAIN}")
        raw = content[name_at : name_at + name_length]
        name = raw.decode("utf-8" if fields[3] & UTF8 else "cp437")
        extra = content[name_at + name_length : name_at + name_length + extra_length]
        if name in members or "\0" in name:
            raise _Corrupt(f"there are two members {name!r}, or its name is corrupt; {AGAIN}")
        if fields[3] & ENCRYPTED:
            raise _Corrupt(f"member {name!r} is encrypted; decrypt the file first")
        if fields[4]:
            how = METHODS.get(fields[4], f"method {fields[4]}")
            raise _Corrupt(f"member {name!r} is compressed ({how}), so it cannot be mapped; {unpacked}")
        whole, stored, header = _wide(name, extra, fields[9], fields[8], fields[16])
        after = header + LOCAL.size
        local = LOCAL.unpack_from(content, header) if after <= first else (b"",)
        if local[0] != b"PK\3\4" or content[after : after + local[9]] != raw:
            raise _Corrupt(f"member {name!r} is not where the directory says, at byte {header}; {AGAIN}")
        start = after + local[9] + local[10]
        if whole != stored or start + whole > first:
            raise _Corrupt(
                f"member {name!r} should have {whole} bytes, stored as {stored} from {start} on; the zip file's "
                f"directory begins at {first}; {AGAIN}"
            )
        members[name] = Member(start, whole, fields[7])
        spans.append((header, start + whole, name))
    if at != first + size:
        raise _Corrupt(f"{count} entries end at {at}, the zip file's directory at {first + size}; {AGAIN}")
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise _Corrupt(f"members {name!r} and {other!r} overlap at byte {begin}; {AGAIN}")
    return {name: members[name] for _, _, name in spans}


def _end(content: mmap.mmap | bytes) -> tuple[int, int, int]:
    """`(entries, bytes, offset)` of the directory."""
    at = content.rfind(b"PK\5\6", max(0, len(content) - END.size - FULL_COUNT))
    if at < 0 or at + END.size > len(content):
        raise _Corrupt(f"no zip file, or its end is missing ({len(content)} bytes); {AGAIN}")
    _, disk, first_disk, here, count, size, first, comment = END.unpack_from(content, at)
    if at + END.size + comment != len(content):
        raise _Corrupt(f"{len(content) - at - END.size - comment} bytes follow the zip file's end; {AGAIN}")
    end, wide = at, at - LOCATOR_64.size
    if (FULL_COUNT in (here, count) or FULL in (size, first)) and content[max(wide, 0) : max(wide, 0) + 4] == b"PK\6\7":
        _, _, at, _ = LOCATOR_64.unpack_from(content, wide)
        if at + END_64.size > wide:
            raise _Corrupt(f"the zip file's 64-bit end should be at byte {at} of {len(content)}; {AGAIN}")
        mark, _, _, _, disk, first_disk, here, count, size, first = END_64.unpack_from(content, at)
        end = at
        if mark != b"PK\6\6":
            raise _Corrupt(f"the zip file's 64-bit end is not at byte {at}; {AGAIN}")
    if disk or first_disk or here != count:
        raise _Corrupt("is one of several parts of a zip archive; join them first (zip -s 0 PART --out WHOLE)")
    if first + size > end or count * CENTRAL.size > size:
        raise _Corrupt(f"{count} entries in {size} bytes from {first} on do not fit {end} bytes; {AGAIN}")
    return count, size, first


def _wide(name: str, extra: bytes, *numbers: int) -> list[int]:
    """An entry's numbers, those that do not fit 32 bits out of its extra field."""
    values, at = list(numbers), 0
    while FULL in values and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            found = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                return [next(found) if value == FULL else value for value in values]
            except (StopIteration, RuntimeError):
                raise _Corrupt(f"member {name!r} lacks its 64-bit sizes; {AGAIN}") from None
        at += 4 + length
    return values


def lay(members: Mapping[str, tuple[bytes, int]], align: int = 64) -> FileLayout:
    """Where everything lies in a zip file that is written.

    Args:
        members: `{name: (its first bytes, how many follow)}`; those that follow are a place of the layout.
        align: a member begins at a multiple of it.
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
        start = header + len(local)
        fixed.append((header, local + begin))
        places[name], end = start + len(begin), start + size
        over = ([size, size] if size >= FULL else []) + ([header] if header >= FULL else [])
        extra = struct.pack(f"<2H{len(over)}Q", 1, 8 * len(over), *over) if over else b""
        if rest:
            checksums.append((start, size, header + 14, len(central) + 16))
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
    fixed.append((end, bytes(central) + last))
    written = tuple(Checksum(first, size, (local, end + place)) for first, size, local, place in checksums)
    return FileLayout(end + len(fixed[-1][1]), tuple(fixed), places, written)
