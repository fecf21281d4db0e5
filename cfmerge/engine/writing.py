"""Results written by a thread of its own, in order, while others are computed."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from cfmerge.engine.journal import Journal, Range
from cfmerge.planning.work import Job, Writable

WRITE_BEHIND = 8  # finished tensors

Part = tuple[Job, int, Any]  # a tensor, or a piece of the flat one: its job, its first entry, its values


class Writer:
    """Writes what is finished, and marks it in the journal when all of it is written.

    Args:
        threaded: a thread writes; else the call itself does.
    """

    def __init__(self, journal: Journal, threaded: bool) -> None:
        self._journal = journal
        self._pool = ThreadPoolExecutor(1, "write") if threaded else None
        self._writing: deque[Future[None]] = deque()
        self._failed = False  # something could not be written: nothing is written or marked behind it

    def take(self, sinks: Sequence[Writable], parts: Sequence[Iterable[Part]], ranges: list[Range], told: Any) -> None:
        """Writes the parts of a unit, for each sink its own; waits while too much is unwritten."""
        writes = [
            partial(written, sink, *part) for sink, own in zip(sinks, parts, strict=True) for part in own
        ]  # fmt: skip
        for write in writes[:-1]:
            self._behind(write)
        self._behind(partial(self._marked, writes[-1:], ranges, told))

    def finish(self) -> None:
        """Waits until all is written."""
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """Gives up what is not yet written."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _marked(self, writes: Iterable[Callable[[], None]], ranges: list[Range], told: Any) -> None:
        for write in writes:
            write()
        self._journal.mark(ranges, told)

    def _behind(self, write: Callable[[], None]) -> None:
        if self._pool is None:
            return write()
        self._writing.append(self._pool.submit(self._in_turn, write))
        while len(self._writing) > WRITE_BEHIND:
            self._writing.popleft().result()

    def _in_turn(self, write: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True
            write()
            self._failed = False


def written(sink: Writable, job: Job, first: int, values: Any) -> None:
    """Writes a part under all names of its tensor: its values, a merged delta's factors, or a composer's arrays.

    A composer's are written once: the result knows its tensors by their own names.
    """
    if isinstance(values, dict):
        return sink.write_parts(job.name, values, first)  # type: ignore[attr-defined]
    for name in job.writes:
        if isinstance(values, tuple):
            sink.write_factors(name, *values)  # type: ignore[attr-defined]
        else:
            sink.write(name, values, first)
