"""Numbers of a whole model, out of those of its tensors: what findings rest on."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from cfmerge.diagnosis.result import Measured

WEIGHTS = {"matrix", "convolution", "embedding"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The tensors of a diagnosis, and sums over them; T experts."""

    experts: Sequence[str]
    tensors: Mapping[str, Measured]

    @functools.cached_property
    def gram(self) -> np.ndarray:
        """`<D_s, D_t>` of whole models `(T, T)`."""
        zero = np.zeros((len(self.experts),) * 2)
        return sum((one.gram for one in self.tensors.values()), zero)

    @functools.cached_property
    def norms(self) -> np.ndarray:
        """`||D_t||` of whole models `(T,)`."""
        return np.sqrt(np.maximum(np.diagonal(self.gram), 0))

    @functools.cached_property
    def base_norm(self) -> float:
        return math.sqrt(sum(one.base_norm**2 for one in self.tensors.values()))

    @functools.cached_property
    def cosines(self) -> np.ndarray:
        """Of whole deltas `(T, T)`; 0 where one is zero."""
        return ratio(self.gram, np.outer(self.norms, self.norms))

    @functools.cached_property
    def conflicts(self) -> np.ndarray:
        """The share of opposite signs `(T, T)`: the mean over the tensors that both experts changed, by size."""
        above, below = np.zeros_like(self.gram), np.zeros_like(self.gram)
        for one in self.tensors.values():
            size = math.prod(one.shape) * np.outer(one.norms > 0, one.norms > 0)
            above, below = above + size * one.conflicts, below + size
        return ratio(above, below)

    @functools.cached_property
    def weights(self) -> Mapping[str, Measured]:
        """Matrices, convolutions and embeddings that are not zero in the base; without any all such tensors."""
        there = {name: one for name, one in self.tensors.items() if one.base_norm > 0}
        return {name: one for name, one in there.items() if one.kind in WEIGHTS} or there

    @functools.cached_property
    def matrices(self) -> Mapping[str, Measured]:
        """The tensors with ranks and spectra."""
        return {name: one for name, one in self.tensors.items() if one.is_matrix}

    def changed(self, *numbers: int) -> Iterator[tuple[str, Measured]]:
        """The matrices that all of these experts changed."""
        return ((name, one) for name, one in self.matrices.items() if all(one.norms[t] > 0 for t in numbers))

    def pairs(self, among: Iterable[int] | None = None) -> Iterator[tuple[int, int]]:
        """Every two experts whose deltas are not zero."""
        there = [t for t in (range(len(self.experts)) if among is None else among) if self.norms[t] > 0]
        return ((s, t) for place, s in enumerate(there) for t in there[place + 1 :])


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, 0 where `below` is zero."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=np.asarray(below) > 0)


def cosine_to_base(one: Measured) -> np.ndarray:
    """`<W_t, W_0> / (||W_t|| ||W_0||)` of each expert."""
    square = one.base_norm**2
    own = np.maximum(square + 2 * one.inner_base + one.norms**2, 0)
    return ratio(square + one.inner_base, one.base_norm * np.sqrt(own))


def common_dimension(one: Measured, overlap: float, s: int, t: int) -> float:
    """The dimension in which two spaces of random directions would overlap so much.

    For random directions among d, `<A_s, A_t> = tr A_s tr A_t / d` on average: so `d = tr A_s tr A_t / <A_s, A_t>`.
    The traces are `||D||^2`, and `||A||^2` is the sum of the fourth powers of the singular values, of which those that
    are kept leave nothing out where the rank is low.
    """
    assert one.spectra is not None
    sizes = [np.sqrt(np.sum(one.spectra[number] ** 4)) for number in (s, t)]
    inner = overlap * sizes[0] * sizes[1]
    return float(one.norms[s] ** 2 * one.norms[t] ** 2 / inner) if inner > 0 else math.inf


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Numbers below `count` that pairs join, each group in order; those in no pair are in none."""
    of = list(range(count))
    for s, t in pairs:
        old, new = sorted((of[s], of[t]), reverse=True)
        of = [new if group == old else group for group in of]
    found = [[number for number in range(count) if of[number] == group] for group in sorted(set(of))]
    return [group for group in found if len(group) > 1]
