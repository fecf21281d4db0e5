"""The C library's memory in the process of a command: what is freed is kept for the next unit of work."""

import contextlib
import ctypes
import os

TRIM, MMAP = -1, -3  # parameters of glibc's `mallopt`
KEPT = 64 << 20  # bytes at the top of a heap that are not given back
LARGE = 32 << 20  # bytes of an array that is mapped by itself; glibc allows no more
ASKED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # how a user says it


def keep_freed_memory() -> None:
    """Lets glibc keep freed pages: otherwise every unit of work gets new ones, which the kernel must fill with zeros.

    For 10 checkpoints of 374M that is a fifth of the processor's time. Nothing happens where there is no glibc.
    """
    if any(name in os.environ for name in ASKED):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM, KEPT)
        mallopt(MMAP, LARGE)
