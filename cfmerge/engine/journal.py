"""The journal of a run, as the loop knows it: what is done, told by ranges of the output.

A unit is done if all its ranges are there. They are not told by units, so that a journal outlives another machine,
another bound of memory and other units. The loop writes a unit, and then marks it; it passes over a unit that is done.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cfmerge.engine.units import Unit
from cfmerge.planning.work import Job

Range = tuple[str, int, int]  # (tensor of the output, first entry, how many)


class Journal(Protocol):
    """What earlier runs of the same merge have done, and what this one does."""

    def done(self, ranges: Sequence[Range]) -> bool:
        """Whether all entries of the ranges are written."""
        ...

    def mark(self, ranges: Sequence[Range], told: Any = None) -> None:
        """Notes that the ranges are written, with what is told of them: plain values."""
        ...

    def told(self) -> Sequence[Any]:
        """All that earlier runs have told of ranges, in order."""
        ...

    def recall(self, key: str) -> Any:
        """The value that an earlier run remembered under the key; None: there is none."""
        ...

    def remember(self, key: str, value: Any) -> None:
        """Keeps a value for a later run: arrays in mappings, tuples and lists."""
        ...


class Forgetful:
    """A journal that keeps nothing: of merges in memory, and into a user's own sink."""

    def done(self, ranges: Sequence[Range]) -> bool:
        return False

    def mark(self, ranges: Sequence[Range], told: Any = None) -> None:
        pass

    def told(self) -> Sequence[Any]:
        return ()

    def recall(self, key: str) -> Any:
        return None

    def remember(self, key: str, value: Any) -> None:
        pass


def remembered(
    journal: Journal, key: str, measure: Callable[[], Any], fits: Callable[[Any], bool] | None = None
) -> Any:
    """The totals of a pass that an earlier run has made, if there are such, else those of `measure()`.

    Args:
        fits: whether the earlier run's totals are about the tensors as they are cut now.
    """
    totals = journal.recall(key)
    if totals is None or (fits is not None and not fits(totals)):
        totals = measure()
        journal.remember(key, totals)
    return totals


def ranges_of(unit: Unit) -> list[Range]:
    """The ranges of the output that a unit writes."""
    return [(name, s.first, s.entries) for s in unit.segments for name in s.job.writes]


def bytes_of(unit: Unit) -> dict[str, int]:
    """`{tensor: bytes}`, about: all that merging a unit would read."""
    return {
        s.job.name: s.job.bytes_read * s.entries // max(s.job.parameter.size, 1) * (1 + len(s.job.sources))
        for s in unit.segments
    }


def whole(job: Job) -> list[Range]:
    """The ranges of the output that a tensor is, under all its names."""
    return [(name, 0, job.parameter.size) for name in job.writes]
