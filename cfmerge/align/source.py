"""Models whose neurons are brought into the order of one of them, as they are read.

An `Alignment` finds the permutations of all models, once, when one of them is first needed: no header tells them. Its
models are seen through `Aligned`, a source over a source.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from cfmerge.align.permuting import Permutations, check_permutations, order_of, permute_tensor
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import Source
from cfmerge.formats.wrapped import Wrapped
from cfmerge.models.spaces import Spaces


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found: `{model: permutations}` into the order of the reference, and lines that tell it."""

    permutations: Mapping[str, Permutations]
    told: tuple[str, ...] = ()


class Alignment:
    """The permutations that bring models into the order of one of them, found once.

    Args:
        spaces: of the reference.
        find: finds them; it may take a while.
        described: everything that decides what is found, for the digest of a plan.
    """

    def __init__(self, spaces: Spaces, find: Callable[[], Found], described: str):
        self.spaces, self.described = spaces, described
        self._find, self._lock = find, threading.Lock()
        self._found: Found | None = None

    def found(self) -> Found:
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def as_plain(self) -> dict[str, Any]:
        """What was found as lists and texts, for a journal."""
        lists = {
            model: {name: one.tolist() for name, one in own.items()} for model, own in self.found().permutations.items()
        }
        return {"permutations": lists, "told": list(self.found().told)}

    def recall(self, plain: Mapping[str, Any]) -> None:
        """Takes what was found before, by another process or an earlier run."""
        own = {
            model: {name: np.asarray(one) for name, one in lists.items()}
            for model, lists in plain["permutations"].items()
        }
        for one in own.values():
            check_permutations(self.spaces, one)
        with self._lock:
            self._found = Found(own, tuple(plain["told"]))


class Aligned(Wrapped):
    """A model with its neurons in the order of another.

    Args:
        inner: the model.
        alignment: which finds the permutations.
        model: its name in the alignment.
        spaces: its own, by its own names: heads that the reference lacks are permuted too.
    """

    def __init__(self, inner: Source, alignment: Alignment, model: str, spaces: Spaces):
        super().__init__(inner)
        self.alignment, self.model, self.spaces = alignment, model, spaces
        self.changed = {name: axes for name, axes in spaces.axes.items() if any(axis.spaces for axis in axes)}

    @property
    def told(self) -> str:
        """The spaces and how they are aligned, for the digest of a plan."""
        return f"{getattr(self.inner, 'told', '')} {self.alignment.described} {sorted(self.spaces.table().items())}"

    @functools.cached_property
    def _permutations(self) -> Permutations:
        return self.alignment.found().permutations[self.model]

    def prepare(self) -> None:
        self.inner.prepare()
        self.alignment.found()

    def grain(self, name: str) -> int:
        grain = self.inner.grain(name)
        return self.tensors[name].size if name in self.changed and grain > 1 else grain  # a chunk has many rows' parts

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        if name not in self.changed:
            return self.inner.read(name, first, count)
        tensor = self.inner.read(name)  # a view of the mapped file, of which only rows that are wanted are read
        if count is None:
            return permute_tensor(self.spaces, name, tensor, self._permutations)
        row = tensor[0].size if tensor.ndim > 1 else 1
        start, end = first // row, -(-(first + count) // row)
        rows = tensor[order_of(self.changed[name][0], self._permutations)[start:end]]
        rows = permute_tensor(self.spaces, name, rows, self._permutations, but=0)
        return rows.reshape(-1)[first - start * row :][:count]


def alignment_of(sources: Iterable[Source]) -> Alignment | None:
    """The alignment of the models of a merge, if there is one."""
    return next((source.alignment for source in sources if isinstance(source, Aligned)), None)


def check_same_sizes(reference: str, spaces: Spaces, model: str, other: Spaces) -> None:
    """Raises `CfmergeError` if a space of the reference has another size in a model.

    A model that lacks all tensors of a space, as a part of a model may, lacks the space.
    """
    for name, size in spaces.sizes.items():
        found = other.sizes.get(name)
        if found is None:
            there = [tensor for tensor, axes in spaces.axes.items()
                     if tensor in other.axes and any(name in axis.spaces for axis in axes)]  # fmt: skip
            if there:
                raise CfmergeError(
                    f"align: {model}: nothing writes or reads the space {name!r} but {and_more(there)}, so that it is "
                    f"an output and keeps its order; in {reference} it permutes. Leave these tensors out of the model"
                )
        elif found != size:
            raise CfmergeError(
                f"align: {model} has {found} elements in the space {name!r}, {reference} has {size}: a permutation "
                "needs the same number in both. Models of different widths are fused by cfmerge.align.ot_fusion, or "
                "zipped by cfmerge.align.zip_models"
            )
