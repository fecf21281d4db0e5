"""Uniform samples of bounded size, of rows that come one after another.

A sample of size k is kept by Vitter's algorithm R: the n-th example takes place floor(u n), u uniform on [0, 1), if
that place is one of the k. Each of the n examples is then kept with probability k / n. A uniform sample of a uniform
sample is uniform again, so a share may shrink and go on. One u belongs to each example, in the order in which examples
come: the buffer is the same however they are cut into batches.
"""

from __future__ import annotations

import numpy as np

Columns = dict[str, np.ndarray]  # arrays with one leading axis in common


class Sample:
    """A uniform sample, of at most `capacity`, of the rows that were offered to it."""

    def __init__(self, capacity: int, seen: int = 0) -> None:
        self.capacity, self.seen = capacity, seen
        self.columns: Columns = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def offer(self, rows: Columns, generator: np.random.Generator) -> None:
        """Keeps some of the rows, each in the place of an earlier one once the sample is full."""
        count = len(next(iter(rows.values())))
        number = self.seen + np.arange(count)
        place = (generator.random(count) * (number + 1)).astype(np.int64)
        place = np.where(number < self.capacity, number, place)
        taken = np.flatnonzero(place < self.capacity)
        last = np.full(self.capacity, -1)
        last[place[taken]] = taken  # of several rows for one place the last stays
        places = np.flatnonzero(last >= 0)
        for name, column in rows.items():
            if name not in self.columns:
                self.columns[name] = np.empty((self.capacity, *column.shape[1:]), column.dtype)
            self.columns[name][places] = column[last[places]]
        self.seen += count

    def shrink(self, capacity: int, generator: np.random.Generator) -> None:
        """Gives up places; which rows stay is left to chance."""
        stay = np.sort(generator.permutation(len(self))[:capacity])
        fresh = {name: np.empty((capacity, *column.shape[1:]), column.dtype) for name, column in self.columns.items()}
        for name, column in self.columns.items():
            fresh[name][: len(stay)] = column[stay]
        self.columns, self.capacity = fresh, capacity

    def rows(self) -> Columns:
        """The rows that are kept, as views."""
        return {name: column[: len(self)] for name, column in self.columns.items()}
