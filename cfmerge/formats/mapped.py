"""Files that are mapped into memory, and read where they are looked at or ahead of that."""

import mmap
from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats.magic import is_lfs_pointer, lfs_advice

LARGE = 1 << 20  # bytes: less is read page by page, as it is looked at


def read_ahead(mapped: mmap.mmap, first: int, count: int) -> None:
    """Asks the system for some bytes of a mapped file, all at once rather than page by page.

    It returns at once. Where a system does not know how, the bytes are read as they are looked at.
    """
    if count >= LARGE and hasattr(mmap, "MADV_WILLNEED"):
        start = first - first % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, first + count - start)


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read where they are looked at."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise CfmergeError(f"{path}: is empty (0 bytes): the file was truncated; fetch the file again")
            if is_lfs_pointer(path):
                raise CfmergeError(lfs_advice(path))
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
