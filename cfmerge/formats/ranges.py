"""Ranges of named tensors: so many entries of the flat tensor, from a first one on."""

import bisect
from collections.abc import Iterable, Iterator

Range = tuple[str, int, int]  # (tensor, first entry, how many)


class Covered:
    """The entries of named tensors that are there, however the ranges were cut that brought them.

    >>> there = Covered([("a", 0, 4), ("a", 4, 2)])
    >>> there.holds("a", 2, 4), there.holds("a", 5, 2), there.count("a")
    (True, False, 6)
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._ends: dict[str, list[tuple[int, int]]] = {}  # [start, end), apart from one another, in order
        for one in ranges:
            self.add(*one)

    def add(self, name: str, first: int, count: int) -> None:
        if count <= 0:
            return
        spans, start, end = self._ends.setdefault(name, []), first, first + count
        low = bisect.bisect_left(spans, start, key=lambda span: span[1])  # the first that touches it, or lies behind
        high = bisect.bisect_right(spans, end, key=lambda span: span[0])
        for span in spans[low:high]:
            start, end = min(start, span[0]), max(end, span[1])
        spans[low:high] = [(start, end)]

    def holds(self, name: str, first: int, count: int) -> bool:
        """Whether all entries of the range are there."""
        spans = self._ends.get(name, [])
        place = bisect.bisect_right(spans, first, key=lambda span: span[0]) - 1
        return count <= 0 or (place >= 0 and spans[place][1] >= first + count)

    def count(self, name: str) -> int:
        """How many entries of the tensor are there."""
        return sum(end - start for start, end in self._ends.get(name, []))

    def ranges(self) -> Iterator[Range]:
        """All that is there, in as few ranges as there are."""
        for name, spans in self._ends.items():
            yield from ((name, start, end - start) for start, end in spans)

    @property
    def entries(self) -> int:
        """How many entries of all tensors are there."""
        return sum(count for _, _, count in self.ranges())
