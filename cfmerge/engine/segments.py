"""Segments: runs of entries of one tensor as it is stored, and what belongs to them in models and statistics."""

import dataclasses
import math
from typing import Any

import numpy as np

from cfmerge.linalg.selection import middle_ranks
from cfmerge.models import matrices_back, matrices_first
from cfmerge.models.deltas import Delta, Dense, Factors
from cfmerge.planning.work import Job, Readable, Work


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` entries of a tensor as it is stored, from entry `first` on; the whole tensor without a count.

    Some layers of a tensor that stacks them along an axis that is not the first are counted as if it were.
    """

    job: Job
    first: int = 0
    count: int | None = None

    @property
    def entries(self) -> int:
        return self.job.parameter.size if self.count is None else self.count

    def rows(self, row: int) -> int:
        """How many rows of that length hold it."""
        return -(-self.entries // row)

    @property
    def layers(self) -> range:
        """Which canonical matrices of its tensor it holds, when it is not cut into rows."""
        if self.count is None:
            return range(self.job.matrices)
        size = math.prod(self.job.seen_shape)
        return range(self.first // size, (self.first + self.count) // size)

    def read(self, model: Readable, name: str) -> Any:
        """Its share of a model, in which the tensor has this name."""
        if self.job.is_turned:
            turned = matrices_first(model.read(name), self.job.parameter.layout)
            return turned[self.layers.start : self.layers.stop]
        return model.read(name, self.first, self.count)

    def stored(self, values: Any) -> Any:
        """Its values in the order of the file."""
        parameter = self.job.parameter
        return matrices_back(values, parameter.layout, parameter.shape) if self.job.is_turned else values

    def delta(self, work: Work, number: int) -> Delta:
        """Its share of an expert's delta."""
        tensors, name = work.experts[number].tensors, str(self.job.sources[number])
        if self.job.is_turned:  # read, not asked for as factors, which have the two axes of one matrix
            return Dense(self.read(tensors, name))
        return tensors.delta(name, self.first, self.count)

    def ranks(self, work: Work, number: int) -> np.ndarray:
        """The ranks of its entries in the rows of its tensor, of which it may begin or end within one."""
        job, end = self.job, self.first + self.entries
        row = job.row or 1
        first, last = self.first // row * row, -(-end // row) * row
        base = work.base.tensors.read(job.name, first, last - first)
        delta = work.experts[number].tensors.delta(str(job.sources[number]), first, last - first)
        moved = delta.product if isinstance(delta, Factors) else delta.tensor
        wide = np.float64 if "float64" in {moved.dtype.name, base.dtype.name} else np.float32
        moved = moved.astype(wide) - (0 if isinstance(delta, Factors) else base.astype(wide))
        if row == 1:
            return np.full(self.entries, 0.5, wide)
        ranks: Any = np.asarray(middle_ranks(np.abs(moved).reshape(-1, row)), wide) / np.asarray(row - 1, wide)
        return ranks.reshape(-1)[self.first - first : end - first]

    def share(self, leaf: Any, row: int | None) -> Any:
        """Its share of an array `(matrices, ...)` of its tensor's statistic, cut into rows of a length if one is given.

        A statistic of one number for each matrix comes once for each row.
        """
        if row is None:
            return leaf[self.layers.start : self.layers.stop]
        rows = self.rows(row)
        if leaf.ndim == 1:
            return np.repeat(leaf, rows)
        flat = np.asarray(leaf.reshape(-1)[self.first : self.first + self.entries])
        return np.pad(flat, (0, rows * row - flat.size)).reshape(rows, row)
