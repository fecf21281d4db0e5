"""Similarities from weights alone: an extension of ZipIt!, whose authors take activations.

A feature is described by weights, brought to coordinates that all models share. Two are as alike as the cosine of their
descriptions, which are

    models of one shape     all weights that write or read it, after each model is permuted to match the first
                            (weight_matching.py)
    models of other widths  the weights that write it, of tensors whose inputs are zipped already, by U; what reads it
                            is not looked at, since the features that it writes are not zipped yet

Spaces whose elements have others within take their order from that matching.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cfmerge.align.flow import reads, writes
from cfmerge.align.folding import Folds, computing
from cfmerge.align.gains import check_model
from cfmerge.align.permuting import Permutations, permute_tensor
from cfmerge.align.weight_matching import search
from cfmerge.errors import CfmergeError
from cfmerge.formats.named import Chosen
from cfmerge.models.spaces import Axis, Spaces, Use

Models = Sequence[Mapping[str, Any]]


def matched_by_weights(
    names: Sequence[str], own: Sequence[Spaces], models: Models, zipped: Sequence[str]
) -> list[Permutations] | None:
    """The permutations that bring each model near the first; None: a zipped space is wider in one of them.

    Tensors that are no numbers, or of other shapes, as the models' outputs may be, are not looked at.

    Raises:
        CfmergeError: a NaN or an infinity in a model, whose name is told.
    """
    first = own[0]
    if any(spaces.sizes[name] != first.sizes[name] for spaces in own for name in zipped):
        return None
    axes = {
        name: line for name, line in first.axes.items()
        if all(spaces.axes[name] == line for spaces in own)
        and all(jnp.issubdtype(model[name].dtype, jnp.floating) for model in models)
    }  # fmt: skip
    there = {name for line in axes.values() for axis in line for name in axis.spaces}
    known = Spaces(axes, {name: size for name, size in first.sizes.items() if name in there})
    chosen = [Chosen(model, {name: name for name in axes}) for model in models]
    for name, model in zip(names, chosen, strict=True):
        check_model(known, model, repr(name))
    return [{}, *(search(known, chosen[0], other, seed=0).permutations for other in chosen[1:])]


def order_of_flow(spaces: Spaces, zipped: Sequence[str]) -> tuple[str, ...]:
    """The zipped spaces in an order in which each has a tensor that reads only those before it.

    Raises:
        CfmergeError: there is none.
    """
    done: list[str] = []
    while left := [name for name in zipped if name not in done]:
        ready = next((name for name in left if _writers(spaces, name, done)), None)
        if ready is None:
            raise CfmergeError(
                f"zip: similarity='weights': every matrix that writes space {left[0]!r} reads a space that is not "
                "zipped before, and the models have different widths; give joint moments of the features"
            )
        done.append(ready)
    return tuple(done)


class WeightSimilarity:
    """The similarity of the features of a space by their weights.

    Args:
        models: their tensors.
        permutations: of `matched_by_weights`.
    """

    def __init__(self, models: Models, permutations: Sequence[Permutations] | None) -> None:
        self.models, self.permutations = models, permutations

    def __call__(self, space: str, folds: Folds) -> np.ndarray:
        """`(O, O)`: cosines."""
        total: np.ndarray | None = None
        for name, number in self._places(space, folds):
            rows = [self._values(name, number, model, folds) for model in range(len(self.models))]
            for part in zip(
                *(_rows(folds.spaces[m].axes[name][number], number, space, v) for m, v in rows), strict=True
            ):
                joined = np.concatenate(part, dtype=np.float64)
                gram = joined @ joined.T
                total = gram if total is None else total + gram
        if total is None:
            raise CfmergeError(f"zip: similarity='weights': no weights tell the features of space {space!r}")
        length = np.sqrt(np.diagonal(total))
        return total / np.maximum(np.outer(length, length), 1e-30)

    def _places(self, space: str, folds: Folds) -> list[Use]:
        """The tensors, and their axes, that are looked at."""
        first = folds.spaces[0]
        if self.permutations is not None:
            alike = [name for name in first.axes if all(one.axes[name] == first.axes[name] for one in folds.spaces)]
            return [use for use in first.uses(space) if use.tensor in alike]
        done = [*folds.groups, *(name for name in folds.blocks[0] if "." not in name)]
        return [
            Use(name, number) for name in _writers(first, space, done)
            for number, axis in enumerate(first.axes[name]) if space in axis.spaces
        ]  # fmt: skip

    def _values(self, name: str, number: int, model: int, folds: Folds) -> tuple[int, np.ndarray]:
        values = computing(self.models[model][name])
        if self.permutations is None:
            return model, folds.read(name, values, model)
        return model, permute_tensor(folds.spaces[model], name, values, self.permutations[model], but=number)


def _writers(spaces: Spaces, space: str, done: Sequence[str]) -> list[str]:
    """The tensors that write a space and nothing else, and read only spaces that are zipped; a matrix among them."""
    found = [
        name for name in spaces.axes if writes(spaces, name) == {space} and not reads(spaces, name) - set(done)
    ]  # fmt: skip
    return found if any(len(spaces.axes[name]) > 1 for name in found) else []


def _rows(axis: Axis, number: int, space: str, values: np.ndarray) -> Iterator[np.ndarray]:
    """`(n, d)`, for each part of an axis where a space stands: a tensor's entries of each feature."""
    start = 0
    for part in axis.parts:
        sizes = [factor.size for factor in part]
        stop = start + int(np.prod(sizes))
        names = [factor.name for factor in part]
        if [name for name in names if name] == [space]:
            piece = values[(slice(None),) * number + (slice(start, stop),)]
            split = piece.reshape(*values.shape[:number], *sizes, *values.shape[number + 1 :])
            place = names.index(space)
            yield np.moveaxis(split, number + place, 0).reshape(sizes[place], -1)
        start = stop
