"""Zip archives in mapped bytes: where each member lies, once all headers agree."""

import io
import struct
import zipfile
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError

ZIP = b"PK\x03\x04"
AGAIN = "fetch the file again"


class Member(NamedTuple):
    """A member of a zip archive: its place, its CRC-32, and whether its bytes stand there as they are."""

    start: int
    size: int
    crc: int
    stored: bool


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
        if start is None or name in found or at < last or start + info.compress_size > end:
            raise CfmergeError(
                f"{where}: member {name!r} is corrupt: its header at {at} and its {info.file_size} bytes do not fit "
                f"what the archive's directory says; {AGAIN}"
            )
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 0x1
        found[name], last = Member(start, info.compress_size, info.CRC, stored), start + info.compress_size
    return found


def _data_start(content: memoryview, info: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin; None if its own header is not the one that the directory tells of."""
    header = bytes(content[info.header_offset : info.header_offset + 30])
    if len(header) < 30 or not header.startswith(ZIP):
        return None
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack("<4s5H3L2H", header)
    start = info.header_offset + 30
    name = bytes(content[start : start + name_length])
    later = bool(flags & 0x8)  # CRC and sizes stand behind the data
    fits = name == info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
    fits &= method == info.compress_type and flags == info.flag_bits
    fits &= method != zipfile.ZIP_STORED or info.file_size == info.compress_size
    fits &= (later and crc == 0) or crc == info.CRC
    sizes = ((packed, info.compress_size), (size, info.file_size))
    fits &= all((later and n == 0) or n in (told, 0xFFFFFFFF) for n, told in sizes)
    return start + name_length + extra_length if fits else None


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
