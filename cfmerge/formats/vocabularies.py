"""A model in another vocabulary: its rows of tokens taken by token, for an output whose tokens have other ids, or more.

A row that a model lacks is filled: the base's by those of the experts that have the token, an expert's by the base's,
so that its delta is 0 there.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.formats.base import Source
from cfmerge.formats.wrapped import Wrapped
from cfmerge.models.deltas import Delta, Dense, Factors
from cfmerge.models.vocabulary import ABSENT

Fill = Callable[[str, np.ndarray], np.ndarray]  # (tensor, rows of the output): these rows, first axis


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one tensor by their axis: for each row of the output the model's own, or `ABSENT`."""

    axis: int
    index: np.ndarray

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor of that shape gets."""
        return (*shape[: self.axis], len(self.index), *shape[self.axis + 1 :])


class OfVocabulary(Wrapped):
    """A checkpoint whose tensors of tokens have the rows of another vocabulary.

    Args:
        inner: the checkpoint.
        rows: the tensors that are changed.
        fill: rows that it lacks.
        side_files: those of the output, if they are others.
    """

    def __init__(
        self, inner: Source, rows: Mapping[str, Rows], fill: Fill, side_files: Mapping[str, Path] | None = None
    ):
        super().__init__(inner)
        self.rows, self._fill = rows, fill
        self.side_files = inner.side_files if side_files is None else side_files
        self.tensors = {
            name: dataclasses.replace(info, shape=rows[name].shape(info.shape)) if name in rows else info
            for name, info in inner.tensors.items()
        }

    @property
    def told(self) -> str:
        """A hash of the rows, for the digest of a plan."""
        digest = hashlib.sha256()
        for name, rows in sorted(self.rows.items()):
            digest.update(f"{name} {rows.axis} ".encode() + rows.index.tobytes())
        return digest.hexdigest()

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        if name not in self.rows:
            return self.inner.read(name, first, count)
        shape = self.tensors[name].shape
        if self.rows[name].axis:  # the first axis has no rows of tokens: all of it is made
            made = self.take(name, np.arange(len(self.rows[name].index)))
            return made if count is None else made.reshape(-1)[first : first + count]
        if count is None:
            return self.take(name, np.arange(shape[0]))
        size = max(1, math.prod(shape[1:]))
        begin, end = first // size, -(-(first + count) // size)
        return self.take(name, np.arange(begin, end)).reshape(-1)[first - begin * size :][:count]

    def take(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """These rows of a tensor of tokens, along its own axis of them."""
        axis, index = self.rows[name].axis, self.rows[name].index[wanted]
        here = index != ABSENT
        made = np.moveaxis(self.inner.read(name), axis, 0)[np.where(here, index, 0)]
        if not here.all():
            made[~here] = self._fill(name, wanted[~here]).astype(made.dtype)
        return np.ascontiguousarray(np.moveaxis(made, 0, axis))

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        if name not in self.rows:
            return self.inner.delta(name, first, count)
        whole = self.inner.delta(name)
        if isinstance(whole, Factors):
            return self._factors(whole, self.rows[name], first, count)
        return Dense(self.read(name, first, count))

    @staticmethod
    def _factors(whole: Factors, rows: Rows, first: int, count: int | None) -> Factors:
        here = rows.index != ABSENT
        index = np.where(here, rows.index, 0)
        if rows.axis:
            return Factors(whole.left, whole.right[:, index] * here.astype(whole.right.dtype), first, count)
        return Factors(whole.left[index] * here.astype(whole.left.dtype)[:, None], whole.right, first, count)


def filled_by_donors(donors: Mapping[str, list[tuple[Source, str, Rows]]]) -> Fill:
    """Rows that a base lacks: those of the only expert that has the token, else their mean; zeros where none has it.

    Args:
        donors: for each tensor of the base the experts that have it, and their rows of the output.
    """

    def fill(name: str, wanted: np.ndarray) -> np.ndarray:
        total: Any = 0
        counts = np.zeros(len(wanted), np.int64)
        for source, theirs, rows in donors.get(name, ()):
            index = rows.index[wanted]
            here = index != ABSENT
            stored = np.moveaxis(source.read(theirs), rows.axis, 0)
            own = stored[np.where(here, index, 0)].astype(np.float64)
            total = total + own * here.reshape(-1, *[1] * (own.ndim - 1))
            counts += here
        shape = (-1, *[1] * (np.ndim(total) - 1))
        return total / np.maximum(counts, 1).reshape(shape)

    return fill


def filled_by_base(base: Source, names: Mapping[str, str], axes: Mapping[str, int]) -> Fill:
    """Rows that an expert lacks: the base's, in the output's vocabulary.

    Args:
        names: the base's name for each of the expert's.
        axes: the axis of tokens, by the base's names.
    """

    def fill(name: str, wanted: np.ndarray) -> np.ndarray:
        ours = names[name]
        if isinstance(base, OfVocabulary) and ours in base.rows:
            return np.moveaxis(base.take(ours, wanted), axes[ours], 0)
        return np.moveaxis(base.read(ours), axes[ours], 0)[wanted]

    return fill
