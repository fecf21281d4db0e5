r"""ZipIt!: which features of several models, or of one, become one (Stoica et al., ICLR 2024, arXiv:2305.03053).

S is the similarity of the features of all models, side by side: Pearson's correlation in the paper. Every feature is a
group at first. Until n groups are left, the pair (r, c) of the largest similarity becomes one group r, and

    S[r, :] = S[:, r] = a * min(S[r, :], S[c, :])        a: the penalty for merging a group again

A model has a budget of merges of its own features with each other, `int(((O - n) // N) b + 1e-4)` of N models with O
features in all. When it is spent, its features may not meet in a group any more.

The authors' code (`compat="official"`) differs from that rule. By default these things hold that do not hold there:

1. b = 0 means no merge within a model. There the budget is compared after the merge, so each model has one in any case.
2. No feature is lost. There, when no pair is left that may be merged, the first feature is merged with itself and
   removed. Here a group remembers all its models, at most n groups have more than one feature, and a budget is at least
   what must be merged within a model that is wider than n: so there always is a pair that may be merged.
3. a <= 0 puts the pairs of a merged group with another one of its models behind all others. There the entries that are
   cut off are those of other features, since earlier merges have moved them.
4. The penalty makes no pair more attractive: `a s` for s > 0, else `(2 - a) s`. There it is `a s`.
5. The rows' maxima are kept, and merged features are masked: O^2 in all, where they are found again, and the matrix
   is copied, at every merge.
6. M has 1 / |group|. There it is 1 / (|group| + 1e-5).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cfmerge.align.assignment import assigned
from cfmerge.align.groups import Groups
from cfmerge.errors import CfmergeError

OFFICIAL, BIAS = "official", 1e-5
TILE = 64  # rows and columns that are compared at once


def match(
    similarity: Any,
    widths: int | Sequence[int],
    *,
    width: int | None = None,
    budget: float = 0.125,
    penalty: float = 0.3,
    compat: str | None = None,
) -> Groups:
    """The groups of features that ZipIt! makes, by repeatedly merging the most similar two.

        >>> x = np.array([[1.0, 0.0, 0.1, 0.9], [2.0, 0.0, 0.1, 2.1], [0.0, 3.0, 2.9, 0.1], [1.0, 1.0, 1.0, 1.0]])
        >>> groups = cfmerge.align.match(np.corrcoef(x.T), 2)          # two models of two features
        >>> groups.partition
        array([0, 1, 1, 0])

    Args:
        similarity: S, `(O, O)`, of the features of all models, the first model's first.
        widths: the number of features of each model; one number: of models that have the same width.
        width: n, how many groups are left; None: as many as the first model has features.
        budget: b, the share of a model's merges that may be within it.
        penalty: a, at most 1; at most 0: a group is merged with a second feature of one of its models last.
        compat: "official": the decisions of the authors' code, its faults included.

    Raises:
        CfmergeError: S is not square, finite and symmetric, or has other features than widths; a number is out of its
            range.
    """
    values = _similarity(similarity)
    sizes = widths_of(widths, len(values))
    target = sizes[0] if width is None else int(width)
    _check(values, sizes, target, budget, penalty, compat)
    if compat == OFFICIAL:
        return Groups(_official(values, len(sizes), target, budget, penalty), sizes, BIAS)
    return Groups(_greedy(values, sizes, target, budget, penalty), sizes)


def permutation_match(similarity: Any, widths: int | Sequence[int], *, compat: str | None = None) -> Groups:
    """The groups of one feature of each model: the Permute baseline of ZipIt!, an assignment of each to the first.

        >>> similarity = np.array([[1, 0, 0.2, 0.9], [0, 1, 0.8, 0.9], [0.2, 0.8, 1, 0], [0.9, 0.9, 0, 1]])
        >>> cfmerge.align.permutation_match(similarity, 2).partition
        array([0, 1, 1, 0])

    Args:
        similarity: S, `(O, O)`, of the features of all models, the first model's first.
        widths: the number of features of each model, none more than the first's; or the number of models.
        compat: "official": M is divided by the size of the group plus 1e-5, as in the authors' code.

    Raises:
        CfmergeError: S is not square, finite and symmetric, has other features than widths, or a model is wider than
            the first.
    """
    values = _similarity(similarity)
    sizes = widths_of(widths, len(values))
    _check(values, sizes, sizes[0], 0, 1, compat)
    if max(sizes) > sizes[0]:
        raise CfmergeError(
            f"match: a model has {max(sizes)} features, the first {sizes[0]}: an assignment leaves some over; give the "
            "widest model first, or zip them"
        )
    parts = [np.arange(sizes[0])]
    for start, size in zip(np.cumsum(sizes)[:-1], sizes[1:], strict=True):
        rows, columns = assigned(values[: sizes[0], start : start + size])
        parts.append(rows[np.argsort(columns)])
    return Groups(np.concatenate(parts), sizes, BIAS if compat == OFFICIAL else 0.0)


def widths_of(widths: int | Sequence[int], total: int) -> tuple[int, ...]:
    """The number of features of each model, of `total` in all.

    Raises:
        CfmergeError: they are not as many.
    """
    if isinstance(widths, int | np.integer):
        if widths < 1 or total % widths:
            raise CfmergeError(f"match: {total} features are not those of {widths} models of one width; give widths")
        return (total // int(widths),) * int(widths)
    sizes = tuple(map(int, widths))
    if not sizes or min(sizes) < 1 or sum(sizes) != total:
        told = " + ".join(map(str, sizes))
        raise CfmergeError(f"match: the similarity is of {total} features, and the models have {told}")
    return sizes


def _similarity(similarity: Any) -> np.ndarray:
    """A copy in float32 or float64."""
    values = np.array(similarity)
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise CfmergeError(f"match: a similarity is square, (O, O); found shape {values.shape}")
    return values


def _check(
    values: np.ndarray, sizes: tuple[int, ...], width: int, budget: float, penalty: float, compat: str | None
) -> None:
    if compat not in {None, OFFICIAL}:
        raise CfmergeError(f"match: compat should be None or {OFFICIAL!r}, found {compat!r}")
    if not 1 <= width <= len(values):
        raise CfmergeError(f"match: {width} groups of {len(values)} features; expected 1 to {len(values)}")
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
        raise CfmergeError(f"match: the similarity of feature {bad[0]} is NaN or infinite, of {len(bad)} in all")
    if compat == OFFICIAL:
        return
    if not (budget >= 0 and penalty <= 1):
        raise CfmergeError(f"match: budget is at least 0, penalty at most 1; found {budget} and {penalty}")
    tiles = range(0, len(values), TILE)
    apart = max(np.abs(values[at : at + TILE] - values[:, at : at + TILE].T).max() for at in tiles)
    if apart > 1e-4 * max(np.abs(values).max(), 1e-30):
        raise CfmergeError(
            f"match: the similarity is not symmetric: two entries that should be equal differ by {apart}"
        )


class _Pairs(NamedTuple):
    """The similarities of pairs of groups, -inf where they may not be merged, and the maximum of each row."""

    values: np.ndarray  # (O, O)
    best: np.ndarray  # (O,)
    at: np.ndarray  # (O,) the first column that has it

    @classmethod
    def of(cls, values: np.ndarray) -> "_Pairs":
        np.fill_diagonal(values, -np.inf)
        pairs = cls(values, np.empty(len(values), values.dtype), np.empty(len(values), np.intp))
        pairs.look(np.arange(len(values)))
        return pairs

    def look(self, rows: np.ndarray) -> None:
        """The maxima of some rows are found again."""
        chosen = self.values[rows]
        self.at[rows] = chosen.argmax(axis=1)
        self.best[rows] = chosen[np.arange(len(rows)), self.at[rows]]

    def join(self, r: int, c: int, row: np.ndarray, column: np.ndarray) -> None:
        """Group c is gone; r has a new row and column."""
        values, best, at = self
        row[[r, c]] = column[[r, c]] = -np.inf
        values[r], values[:, r] = row, column
        values[c] = values[:, c] = -np.inf
        stale = ((at == r) | (at == c)) & (best > -np.inf)
        stale[r] = r != c
        stale[c] = False
        better = (column > best) | ((column == best) & (r < at) & (best > -np.inf))
        best[better], at[better] = column[better], r
        best[c], at[c] = -np.inf, c
        self.look(np.flatnonzero(stale))

    def forbid(self, groups: np.ndarray) -> None:
        """No two of these groups may be merged any more."""
        self.values[np.ix_(groups, groups)] = -np.inf
        self.look(groups)

    def largest(self, rows: np.ndarray | None = None) -> tuple[int, int]:
        """The first of the most similar pairs; of those that have one of some rows."""
        row = int(self.best.argmax() if rows is None else np.where(rows, self.best, -np.inf).argmax())
        return row, int(self.at[row])


def _greedy(values: np.ndarray, sizes: tuple[int, ...], width: int, budget: float, penalty: float) -> np.ndarray:
    """The partition, by the rule at the top."""
    total, models = len(values), len(sizes)
    behind = 4 * np.abs(values).max() + 1  # what a pair is put back by
    pairs, group, several = _Pairs.of(values), np.arange(total), np.zeros(total, bool)
    has = np.repeat(np.arange(models), sizes)[:, None] == np.arange(models)  # (O, N): which models a group is of
    own = int((total - width) // models * budget + 1e-4)
    left = np.array([max(own, size - width) for size in sizes])
    for model in np.flatnonzero(left == 0):
        pairs.forbid(np.flatnonzero(has[:, model]))
    for _ in range(total - width):
        r, c = sorted(pairs.largest(several if several.sum() == width else None))
        lower = np.minimum(pairs.values[r], pairs.values[c])
        shared = has[r] & has[c]
        has[r] |= has[c]
        has[c] = several[c] = False
        several[r] = True
        if penalty > 0:
            lower = np.where(lower > 0, penalty * lower, (2 - penalty) * lower)
        else:
            lower[(has & has[r]).any(axis=1) & (lower > -behind / 2)] -= behind
        pairs.join(r, c, lower, lower.copy())
        group[group == c] = r
        left -= shared
        for model in np.flatnonzero(shared & (left == 0)):
            pairs.forbid(np.flatnonzero(has[:, model]))
    return _numbered(group)


def _official(values: np.ndarray, models: int, width: int, budget: float, penalty: float) -> np.ndarray:
    """The partition of the authors' code, -1 for features that it drops; it takes all models to be of one width."""
    total = len(values)
    own = total // models
    origin = np.zeros(total, int)
    origin[: own * models] = np.repeat(np.arange(models), own)
    left = np.full(models, int((total - width) // models * budget + 1e-4))
    pairs, group, alive = _Pairs.of(values), np.arange(total), np.arange(total)
    for _ in range(total - width):
        lost = not np.isfinite(pairs.best.max())
        r, c = sorted(pairs.largest())
        if lost:  # every pair is forbidden: the first feature is merged with itself, and removed
            r = c = alive[0]
        row, column = (np.minimum(side[r], side[c]) for side in (pairs.values, pairs.values.T))
        rest = alive[alive != c]
        for side, places in ((row, rest), (column, alive)):
            if penalty > 0:
                side *= penalty
            else:  # the ranges that these models had before any merge
                for model in (origin[r], origin[c]):
                    side[places[model * own : (model + 1) * own]] = -np.inf
        same = origin[r] == origin[c]
        group[group == c] = -1 if lost else r
        if lost:
            pairs.join(r, c, np.full_like(row, -np.inf), np.full_like(row, -np.inf))
        else:
            pairs.join(r, c, row, column)
        alive = rest
        if same:
            model = origin[alive[0] if lost else r]
            left[model] -= 1
            if left[model] <= 0:
                pairs.forbid(alive[origin[alive] == model])
    return _numbered(group)


def _numbered(group: np.ndarray) -> np.ndarray:
    """The groups numbered by their first feature; -1 stays."""
    result = np.full(len(group), -1)
    result[group >= 0] = np.unique(group[group >= 0], return_inverse=True)[1]  # a group is called by its first feature
    return result
