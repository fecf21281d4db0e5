"""Similarities from weights alone: an extension of ZipIt!, whose authors take activations.

A feature is described by the weights that write it: its rows of all matrices whose inputs are matched already, brought
to common coordinates by U, and its entries of biases and norms. Two are as alike as the cosine of these rows. Weights
that read the feature are not looked at, since what they write is not matched yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.align.flow import reads, writes
from cfmerge.align.folding import Folds, computing
from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Spaces


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
                "matched before; give joint moments of the features"
            )
        done.append(ready)
    return tuple(done)


class WeightSimilarity:
    """The similarity of the features of a space, from the weights that write it."""

    def __init__(self, models: Sequence[Mapping[str, Any]]) -> None:
        self.models = models

    def __call__(self, space: str, folds: Folds) -> np.ndarray:
        """`(O, O)`: cosines.

        Raises:
            CfmergeError: the space has others within its elements.
        """
        if folds.spaces[0].children(space):
            raise CfmergeError(
                f"zip: similarity='weights' does not tell the order of space {space!r}, whose elements have others "
                "within; give it in permutations, of cfmerge.align.weight_matching say"
            )
        done = [*folds.groups, *(name for name in folds.blocks[0] if "." not in name)]
        rows = []
        for model, tensors in enumerate(self.models):
            spaces = folds.spaces[model]
            own = [
                _rows(spaces, space, name, folds.read(name, computing(tensors[name]), model))
                for name in _writers(spaces, space, done)
            ]
            rows.append(np.concatenate(own, axis=1, dtype=np.float64))
        if len({own.shape[1] for own in rows}) > 1:
            raise CfmergeError(f"zip: space {space!r}: the models' weights that write it have inputs of several sizes")
        joined = np.concatenate(rows)
        joined /= np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-30)
        return joined @ joined.T


def _writers(spaces: Spaces, space: str, done: Sequence[str]) -> list[str]:
    """The tensors that write a space and nothing else, and read only spaces that are matched; a matrix among them."""
    found = [
        name for name in spaces.axes if writes(spaces, name) == {space} and not reads(spaces, name) - set(done)
    ]  # fmt: skip
    return found if any(len(spaces.axes[name]) > 1 for name in found) else []


def _rows(spaces: Spaces, space: str, name: str, values: np.ndarray) -> np.ndarray:
    """`(n, d)`: a tensor's entries of each feature."""
    for number, axis in enumerate(spaces.axes[name]):
        if space in axis.spaces:
            part = axis.parts[0] if len(axis.parts) == 1 else ()
            place = [factor.name for factor in part].index(space) if part else None
            if place is None:
                break
            sizes = [factor.size for factor in part]
            split = values.reshape(*values.shape[:number], *sizes, *values.shape[number + 1 :])
            return np.moveaxis(split, number + place, 0).reshape(sizes[place], -1)
    raise CfmergeError(f"zip: similarity='weights': tensor {name!r} writes {space!r} in parts that lie end to end")
