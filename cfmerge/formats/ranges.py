"""Ranges of tensors: so many entries of the flat tensor, from a first one on."""

import bisect
from collections.abc import Iterable, Iterator

import numpy as np

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


def flat_range(array: np.ndarray, first: int, count: int) -> np.ndarray:
    """So many entries of the array as it would be flat, from one on, in memory for no more than these.

    >>> flat_range(np.arange(6).reshape(3, 2).T, 1, 3)
    array([2, 4, 1])
    """
    if count == 0 or array.ndim == 0:
        return np.array(array.reshape(-1)[:count])
    if array.ndim == 1:
        return np.array(array[first : first + count])
    inner = array.size // len(array)
    low, high = -(-first // inner), (first + count) // inner  # rows that are wanted whole
    if low > high:
        return flat_range(array[high], first - high * inner, count)
    head, tail = low * inner - first, first + count - high * inner
    parts = [np.ascontiguousarray(array[low:high]).reshape(-1)]
    if head:
        parts.insert(0, flat_range(array[low - 1], inner - head, head))
    if tail:
        parts.append(flat_range(array[high], 0, tail))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
