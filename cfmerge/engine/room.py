"""The memory that units in work share: a unit waits until it fits beside the others, and gives back what it freed."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator

LARGE = 16  # a unit that needs a 16th of the memory is worth the time to give it back


class Room:
    """So many bytes for the units in work; without a bound all fit.

    A unit that is larger than the room is worked on alone.
    """

    def __init__(self, memory: int | None) -> None:
        self.memory, self._used, self._freed = memory, 0, threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """The context in which a unit of so many bytes is worked on."""
        if self.memory is None or size == 0:
            yield
            return
        memory = self.memory
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + size <= memory)
            self._used += size
        try:
            yield
        finally:
            if size * LARGE > memory:
                _give_back()
            with self._freed:
                self._used -= size
                self._freed.notify_all()


def _give_back() -> None:
    """Gives freed memory back to the system; glibc keeps it, for each thread apart, where nobody asks for it."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where there is another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows, which has no whole program to look into
        return None
