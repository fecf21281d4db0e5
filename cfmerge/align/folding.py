r"""One tensor of a zipped model, from those of the models.

    W* = sum_i  M_i W_i U_i        M of a space that the tensor writes, U of each that it reads
    b* = sum_i  M_i b_i            a bias, or the scale of a norm, writes its space

M is that of the features of all models, side by side, so that no factor 1/N is needed. A tensor that writes several
spaces can take M once; where all of them are permutations it is the mean of the permuted tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.align.groups import Groups
from cfmerge.align.permuting import Permutations, permute_tensor
from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Axis, Factor, Spaces

Apply = Callable[[np.ndarray, Factor, int], np.ndarray]  # of an array, along a factor, which is that axis


@dataclasses.dataclass(frozen=True)
class Folds:
    """What became of the zipped spaces.

    Attributes:
        models: their names.
        spaces: those of each.
        groups: of the spaces whose features are zipped.
        blocks: for each model, the permutations of the spaces whose elements are permuted as blocks, and of their
            children.
    """

    models: Sequence[str]
    spaces: Sequence[Spaces]
    groups: Mapping[str, Groups]
    blocks: Sequence[Permutations]

    def read(self, name: str, tensor: Any, model: int) -> np.ndarray:
        """A model's tensor with U of all zipped spaces that it reads."""
        axes = self.spaces[model].axes[name]
        values = permute_tensor(self.spaces[model], name, np.asarray(tensor), self.blocks[model])

        def unmerge(array: np.ndarray, factor: Factor, axis: int) -> np.ndarray:
            return self.groups[factor.name].unmerged(array, model, axis)

        for number, axis in enumerate(axes):
            if axis.reads:
                values = self._along(values, number, axis, unmerge)
        return values

    def written(self, name: str, tensors: Sequence[Any]) -> np.ndarray:
        """The tensor that all models share, in float32 at least; `tensors` are asked for one by one.

        Raises:
            CfmergeError: it writes several spaces that are no permutations, or the models' do not fit together.
        """
        mean = self._check(name)
        total: np.ndarray | None = None
        for model, tensor in enumerate(tensors):
            part = self._merged(name, self.read(name, computing(tensor), model), model, mean)
            if total is not None and total.shape != part.shape:
                raise CfmergeError(
                    f"zip: tensor {name!r}: of model {self.models[0]!r} it comes out as {total.shape}, of "
                    f"{self.models[model]!r} as {part.shape}; axes that are `-` in the table must be as long in all"
                )
            total = part if total is None else total + part
        assert total is not None
        return total / len(tensors) if mean else total

    def _merged(self, name: str, values: np.ndarray, model: int, mean: bool) -> np.ndarray:
        def merge(array: np.ndarray, factor: Factor, axis: int) -> np.ndarray:
            groups = self.groups[factor.name]
            return groups.unmerged(array, model, axis) if mean else groups.merged(array, model, axis)

        for number, axis in enumerate(self.spaces[model].axes[name]):
            if not axis.reads:
                values = self._along(values, number, axis, merge)
        return values

    def _along(self, values: np.ndarray, number: int, axis: Axis, apply: Apply) -> np.ndarray:
        """A function applied along each factor of an axis that is a zipped space."""
        if not any(name in self.groups for name in axis.spaces):
            return values
        before, after, parts, start = values.shape[:number], values.shape[number + 1 :], [], 0
        for part in axis.parts:
            sizes = tuple(factor.size for factor in part)
            stop = start + int(np.prod(sizes))
            piece = values[(slice(None),) * number + (slice(start, stop),)].reshape(*before, *sizes, *after)
            for place, factor in enumerate(part):
                if factor.name in self.groups:
                    piece = apply(piece, factor, number + place)
            parts.append(piece.reshape(*before, -1, *after))
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=number)

    def _check(self, name: str) -> bool:
        """Whether the tensor is the mean of permuted ones; else it takes M once."""
        blocks = set().union(*self.blocks)
        written = [
            [[factor.name for factor in part if factor.name in self.groups or factor.name in blocks]
             for part in axis.parts]
            for axis in self.spaces[0].axes[name] if not axis.reads
        ]  # fmt: skip
        known = {space for axis in written for part in axis for space in part}
        if all(space in blocks or self.groups[space].is_permutation for space in known):
            return True
        counts = [max(map(len, axis)) for axis in written]
        if sum(counts) == 1 and not known & blocks and all(part for axis in written for part in axis if any(axis)):
            return False
        raise CfmergeError(
            f"zip: tensor {name!r} writes {' and '.join(sorted(known))} together, "
            f"{self.spaces[0].table()[name]!r}, which can be permuted and not zipped; match those spaces by "
            "permutations, method='permute', or stop in front of them"
        )


def computing(tensor: Any) -> np.ndarray:
    """A tensor in the dtype that sums are made in: float64, or float32 for all that is narrower."""
    values = np.asarray(tensor)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
