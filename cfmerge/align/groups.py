r"""Groups: which features of several models become one, as the matrices that merge and unmerge them.

The features of all models stand side by side, `x = [model 0 | model 1 | ...]`, O of them; n groups are left.

    merge     M (n, O)   row u holds 1 / |group u| on the members of the group: f = M x is their mean
    unmerge   U (O, n)   U[i, u] = 1 where feature i is in group u: every member gets the group's value;  M U = I

The matrices are not needed to apply them: sums over the members of groups do the same.
"""

import dataclasses
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which features of several models become one.

        >>> groups = cfmerge.align.Groups(np.array([0, 1, 1, 0]), (2, 2))
        >>> groups.merge
        array([[0.5, 0. , 0. , 0.5],
               [0. , 0.5, 0.5, 0. ]])
        >>> groups.merge @ groups.unmerge
        array([[1., 0.],
               [0., 1.]])
        >>> groups.within                        # no two features of one model are in one group
        (0, 0)

    Attributes:
        partition: `(O,)`, the group of each feature; groups are numbered by their first feature. -1, which only
            `compat="official"` knows: the feature is dropped.
        widths: the number of features of each model.
        bias: is added to the size of each group that M is divided by: 1e-5 in the official code, else 0.
    """

    partition: np.ndarray
    widths: tuple[int, ...]
    bias: float = 0.0

    @property
    def width(self) -> int:
        """The number of groups, n."""
        return int(self.partition.max()) + 1

    @property
    def sizes(self) -> np.ndarray:
        """The number of members of each group, `(n,)`."""
        return np.bincount(self.partition[self.partition >= 0], minlength=self.width)

    @property
    def unmerge(self) -> np.ndarray:
        """U, `(O, n)`."""
        return (self.partition[:, None] == np.arange(self.width)).astype(np.float64)

    @property
    def merge(self) -> np.ndarray:
        """M, `(n, O)`."""
        return self.unmerge.T / (self.sizes[:, None] + self.bias)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The groups of each model's features."""
        return tuple(np.split(self.partition, np.cumsum(self.widths)[:-1]))

    @property
    def within(self) -> tuple[int, ...]:
        """How often two features of one model became one, for each model."""
        return tuple(len(part[part >= 0]) - len(np.unique(part[part >= 0])) for part in self.parts)

    @property
    def is_permutation(self) -> bool:
        """Whether each group has one feature of every model: merging is averaging the models in another order."""
        return all(np.array_equal(np.sort(part), np.arange(self.width)) for part in self.parts)

    def merged(self, values: Any, model: int, axis: int) -> np.ndarray:
        """`M_i` applied along an axis: a model's part of the means."""
        shape = [1] * np.ndim(values)
        shape[axis] = self.width
        return self.unmerged(values, model, axis) / (self.sizes + self.bias).reshape(shape)

    def unmerged(self, values: Any, model: int, axis: int) -> np.ndarray:
        """`U_i^T` applied along an axis that a tensor of the model reads: the sums over the members of each group."""
        part = self.parts[model]
        order = np.argsort(part, kind="stable")[(part < 0).sum() :]
        labels, starts = np.unique(part[order], return_index=True)
        sums = np.asarray(values).take(order, axis=axis)
        if len(labels) < len(order):
            sums = np.add.reduceat(sums, starts, axis=axis)
        if len(labels) == self.width:
            return sums
        result = np.zeros((*sums.shape[:axis], self.width, *sums.shape[axis + 1 :]), sums.dtype)
        result[(slice(None),) * axis + (labels,)] = sums
        return result


def identity_match(widths: tuple[int, ...] | list[int]) -> Groups:
    """The groups that average features of the same index: of the first model's width.

        >>> cfmerge.align.identity_match((2, 2)).partition
        array([0, 1, 0, 1])

    Args:
        widths: the number of features of each model, all the same.

    Raises:
        CfmergeError: they differ.
    """
    if len(set(widths)) != 1:
        raise CfmergeError(f"match: features of the same index need one width, found {' and '.join(map(str, widths))}")
    return Groups(np.tile(np.arange(widths[0]), len(widths)), tuple(widths))
