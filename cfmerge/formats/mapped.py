"""Reading mapped files ahead."""

import mmap

LARGE = 1 << 20  # bytes: less is read page by page, as it is looked at


def read_ahead(mapped: mmap.mmap, first: int, count: int) -> None:
    """Asks the system for some bytes of a mapped file, all at once rather than page by page.

    It returns at once. Where a system does not know how, the bytes are read as they are looked at.
    """
    if count >= LARGE and hasattr(mmap, "MADV_WILLNEED"):
        start = first - first % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, first + count - start)
