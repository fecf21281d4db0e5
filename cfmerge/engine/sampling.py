"""A few entries of every matrix, from what a merge reads anyway: enough to see an expert of another base, or a twin.

Of each matrix about `ENTRIES` entries at equal distances. With `W_0` and `D_t` restricted to them, an expert is unlike
the base in a matrix where the cosine of `W_0 + D_t` and `W_0` is below `FOREIGN`: fine-tuning leaves it above 0.9, and
unrelated weights have about 0. Two experts are nearly the same where their deltas are, over all matrices together. The
bounds are those of a diagnosis.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cfmerge.diagnosis.of_experts import FOREIGN, SAME
from cfmerge.engine.units import Unit
from cfmerge.models import Kind

ENTRIES = 512  # of a matrix; a cosine of unrelated ones is off by 0.04
FEWEST = 64  # a smaller matrix tells nothing
KINDS = (Kind.MATRIX, Kind.CONVOLUTION, Kind.EMBEDDING)


class Sample(NamedTuple):
    """The sums over the matrices of a unit, as plain values: a journal keeps them.

    Attributes:
        seen: the number of matrices.
        unlike: of each expert, those in which it is unlike the base.
        gram: `<D_s, D_t>` of the experts' deltas.
    """

    seen: int
    unlike: Sequence[int]
    gram: Sequence[Sequence[float]]

    def plus(self, other: "Sample") -> "Sample":
        gram = np.add(self.gram, other.gram).tolist()
        return Sample(self.seen + other.seen, np.add(self.unlike, other.unlike).tolist(), gram)


class Sampler:
    """The sample of one unit, taken while its models are read."""

    def __init__(self, unit: Unit, experts: int) -> None:
        self._unit, self._experts = unit, experts
        self._base: dict[int, np.ndarray] = {}
        self._deltas: dict[int, dict[int, np.ndarray]] = {}

    def base(self, array: Any) -> None:
        """Takes the base's share, `(stack, ...)`."""
        self._base = self._entries(array)
        self._deltas = {place: {} for place in self._base}

    def expert(self, number: int, array: Any, minus: Any) -> None:
        """Takes an expert's share, and of which tensors it is the delta: `Inputs.minus`."""
        if not isinstance(array, tuple):  # factors say nothing of a base
            each = 1 if self._unit.row is not None else len(self._unit.layers)
            for place, own in self._entries(array).items():
                taken = 1.0 if minus is None else float(minus[self._unit.spans[place].start * each])
                self._deltas[place][number] = own - taken * self._base[place]

    def _entries(self, array: Any) -> dict[int, np.ndarray]:
        """`{segment: some entries}` of those that are matrices."""
        found, host = {}, np.asarray(array)
        for place, (segment, span) in enumerate(zip(self._unit.segments, self._unit.spans, strict=True)):
            flat = host[span].reshape(-1)[: segment.entries]
            step = math.ceil(flat.size / ENTRIES) | 1  # odd: not one column of a matrix all the time
            if segment.job.parameter.kind in KINDS and flat.size >= FEWEST:
                found[place] = flat[::step].astype(np.float64)
        return found

    def told(self) -> Sample | None:
        """The sums; None where no matrix was seen."""
        if not self._base:
            return None
        unlike, gram = np.zeros(self._experts, int), np.zeros((self._experts, self._experts))
        for place, base in self._base.items():
            deltas = np.zeros((self._experts, base.size))
            for number, delta in self._deltas[place].items():
                deltas[number] = delta
            experts = base + deltas
            with np.errstate(all="ignore"):
                cosines = experts @ base / (np.linalg.norm(experts, axis=1) * np.linalg.norm(base))
            unlike += np.isfinite(cosines) & (cosines < FOREIGN)
            gram += deltas @ deltas.T
        return Sample(len(self._base), unlike.tolist(), gram.tolist())


def sampler_of(unit: Unit) -> Sampler | None:
    """A sampler where values can be looked at and lie in the host's memory; else None."""
    work = unit.work
    away = work.traced or work.sharded or (not work.from_files and jax.default_backend() != "cpu")
    return None if away or not work.experts else Sampler(unit, len(work.experts))


def foreign(sample: Sample, names: Sequence[str]) -> list[tuple[str, int]]:
    """The experts that are unlike the base in most matrices, and in how many."""
    return [(name, count) for name, count in zip(names, sample.unlike, strict=True) if 2 * count > sample.seen]


def twins(sample: Sample, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """Pairs of experts whose deltas are nearly the same, with the cosine."""
    gram = np.asarray(sample.gram)
    norms = np.sqrt(np.diagonal(gram))
    found = []
    for s, t in itertools.combinations(range(len(names)), 2):
        if norms[s] > 0 and norms[t] > 0 and gram[s, t] > SAME * max(norms[s], norms[t]) ** 2:
            found.append((names[s], names[t], float(gram[s, t] / (norms[s] * norms[t]))))
    return found
