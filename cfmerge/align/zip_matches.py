"""Groups and permutations of every space that is zipped, from similarities of features.

A space whose elements have elements within (attention heads) is permuted as blocks: its features are
`[element 0: its m features | element 1 | ...]`, two elements are as alike as their features are together, and a child
of m elements is assigned within each pair of them.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.align.assignment import assigned
from cfmerge.align.folding import Folds
from cfmerge.align.groups import Groups, identity_match
from cfmerge.align.moments import Moments
from cfmerge.align.permuting import Permutations, check_permutations, identity_of
from cfmerge.align.zipit import OFFICIAL, match, permutation_match
from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.models.spaces import Spaces

METHODS = ("zip", "permute", "identity")
Similarity = Callable[[str, Folds], np.ndarray]  # of a space, given what became of those before it


@dataclasses.dataclass(frozen=True)
class Rule:
    """How spaces are matched; see `zip_models`."""

    method: str
    width: Mapping[str, int] | float | None
    budget: float
    penalty: float
    compat: str | None
    permutations: Sequence[Permutations] | None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CfmergeError(f"zip: method should be one of {', '.join(METHODS)}, found {self.method!r}")
        if self.compat not in {None, OFFICIAL}:
            raise CfmergeError(f"zip: compat should be None or {OFFICIAL!r}, found {self.compat!r}")
        if self.width is not None and self.method != "zip":
            raise CfmergeError(f"zip: method {self.method!r} keeps the models' width; leave out width={self.width}")
        if not isinstance(self.width, Mapping | None) and not self.width > 0:
            raise CfmergeError(f"zip: width should be {{space: n}}, or a factor above 0; found {self.width}")

    def width_of(self, space: str, first: int) -> int:
        """How many groups are left of a space of which the first model has so many features."""
        if self.width is None or isinstance(self.width, Mapping):
            return int((self.width or {}).get(space, first))
        return max(round(first * self.width), 1)


def similarity_of(given: Any, models: Sequence[str], official: bool = False) -> Similarity:
    """What says how alike the features of a space are: moments, or a mapping by space.

    Raises:
        CfmergeError: the moments are of other models; when it is called, the space is not there.
    """
    known = getattr(given, "models", None)
    if known is not None and (len(known) != len(models) or (set(known) & set(models) and known != tuple(models))):
        raise CfmergeError(
            f"zip: the moments are of {', '.join(known)}, the models are {', '.join(models)}; give them in the order "
            "in which their features were added"
        )
    if not isinstance(given, Mapping) and not hasattr(given, "correlation"):
        raise CfmergeError(
            "zip: similarity should be joint moments, a mapping of similarities by space, or 'weights'; found "
            f"{type(given).__name__}"
        )
    spaces = told_by(given)

    def found(space: str, folds: Folds) -> np.ndarray:
        if space not in spaces:
            there = f"; there is: {', '.join(spaces)}" if len(spaces) else ""
            raise CfmergeError(
                f"zip: nothing says how alike the features of space {space!r} are; collect moments of it, stop in "
                f"front of it, or give its order in permutations{there}"
            )
        if isinstance(given, Moments) and not official:
            return given.correlation(space, dead=1.0)  # two that never fire are one at no loss
        return np.asarray(given[space] if isinstance(given, Mapping) else given.correlation(space))

    return found


def told_by(given: Any) -> Collection[str]:
    """The spaces of whose features moments, or a mapping, tell."""
    return given if isinstance(given, Mapping) else given.spaces


def matched(
    models: Sequence[str], own: Sequence[Spaces], order: Sequence[str], similarity: Similarity | None, rule: Rule
) -> Folds:
    """The groups of all spaces of `order`, matched one after the other.

    Args:
        models: their names.
        own: the spaces of each.
        order: those that are zipped.
        similarity: None: no space needs one.
        rule: how they are matched.

    Raises:
        CfmergeError: a space has no similarity, or one of other features; widths differ that must not.
    """
    _check_permutations(own, rule.permutations)
    if unknown := [space for space in (rule.width if isinstance(rule.width, Mapping) else ()) if space not in order]:
        raise CfmergeError(f"zip: width: no space {unknown[0]!r} is zipped{nearest(unknown[0], order)}")
    groups: dict[str, Groups] = {}
    blocks: list[dict[str, np.ndarray]] = [{} for _ in own]
    folds = Folds(models, own, groups, blocks)
    for space in order:
        widths = [spaces.sizes[space] for spaces in own]
        names = (space, *own[0].children(space))
        given = rule.permutations is not None and any(space in one for one in rule.permutations)
        if given or rule.method == "identity" or len(names) > 1:
            _check_widths(space, own, names)
        if given and rule.permutations is not None:
            orders = [{name: one.get(name, identity_of(own[0], name)) for name in names} for one in rule.permutations]
        elif rule.method == "identity":
            orders = [{name: identity_of(own[0], name) for name in names} for _ in own]
        elif similarity is None:
            raise CfmergeError(
                f"zip: nothing says how alike the features of space {space!r} are; give joint moments "
                "(cfmerge.activations.collect_joint_linen, collect_joint_nnx), or 'weights'"
            )
        elif len(names) > 1:
            orders = _blocks(own[0], space, similarity(space, folds), len(own))
        else:
            groups[space] = _zipped(space, similarity(space, folds), widths, rule)
            continue
        if len(names) > 1:
            for mine, one in zip(blocks, orders, strict=True):
                mine.update(one)
        else:
            groups[space] = of_permutations([one[space] for one in orders])
    return folds


def of_permutations(orders: Sequence[np.ndarray]) -> Groups:
    """The groups that average models after each is permuted."""
    first = np.argsort(orders[0])
    sizes = [len(order) for order in orders]
    groups = identity_match(sizes)
    parts = [np.asarray(order)[first] for order in orders]  # feature parts[i][j] of model i is in group j
    return dataclasses.replace(groups, partition=np.concatenate([np.argsort(part) for part in parts]))


def _zipped(space: str, similarity: np.ndarray, widths: Sequence[int], rule: Rule) -> Groups:
    if similarity.shape != (sum(widths), sum(widths)):
        raise CfmergeError(
            f"zip: space {space!r}: the similarity is of shape {similarity.shape}, and the models have "
            f"{' + '.join(map(str, widths))} features"
        )
    try:
        if rule.method == "permute":
            return permutation_match(similarity, widths, compat=rule.compat)
        width = rule.width_of(space, widths[0])
        return match(
            similarity, widths, width=width, budget=rule.budget, penalty=rule.penalty, compat=rule.compat
        )  # fmt: skip
    except CfmergeError as error:
        raise CfmergeError(f"zip: space {space!r}: {error}") from None


def _blocks(spaces: Spaces, space: str, similarity: np.ndarray, models: int) -> list[dict[str, np.ndarray]]:
    """The order of a space's elements and of those within, of each model."""
    n, children = spaces.sizes[space], spaces.children(space)
    total = len(similarity)
    within = total // (models * n)
    if similarity.shape != (total, total) or not within or total % (models * n):
        raise CfmergeError(
            f"zip: space {space!r}: the similarity is of shape {similarity.shape}, and {models} models have {n} "
            "elements each"
        )
    values = similarity.reshape(models, n, within, models, n, within)
    open_ = [child for child in children if spaces.sizes[child] > 1]
    inner = len(open_) == 1 and spaces.sizes[open_[0]] == within
    if open_ and not inner:
        sizes = ", ".join(f"{child} {spaces.sizes[child]}" for child in open_)
        raise CfmergeError(
            f"zip: space {space!r}: {within} features of each element do not tell the order of {sizes}; give their "
            "order in permutations, of cfmerge.align.weight_matching say"
        )
    orders = [{name: identity_of(spaces, name) for name in (space, *children)}]
    for model in range(1, models):
        pairs = values[0, :, :, model].transpose(0, 2, 1, 3)  # (n, n, within, within)
        assigned = np.array([[_assignment(pairs[a, b]) if inner else np.arange(within) for b in range(n)]
                             for a in range(n)])  # fmt: skip
        scores = np.take_along_axis(pairs, assigned[..., None], axis=-1).sum(axis=(2, 3))
        order = _assignment(scores)
        one = {space: order}
        for child in children:
            one[child] = assigned[np.arange(n), order] if child in open_ else identity_of(spaces, child)
        orders.append(one)
    return orders


def _assignment(scores: np.ndarray) -> np.ndarray:
    """The column of each row, each once, of the largest sum."""
    return assigned(scores)[1]


def _check_widths(space: str, own: Sequence[Spaces], names: Sequence[str]) -> None:
    for name in names:
        sizes = {spaces.sizes[name] for spaces in own}
        if len(sizes) > 1:
            raise CfmergeError(
                f"zip: space {name!r} has {' and '.join(map(str, sorted(sizes)))} elements, and is permuted: it must "
                "have as many in all models; stop in front of it"
                + ("" if name != space or len(names) > 1 else ", or zip it by a similarity")
            )


def _check_permutations(own: Sequence[Spaces], permutations: Sequence[Permutations] | None) -> None:
    if permutations is None:
        return
    if len(permutations) != len(own):
        raise CfmergeError(
            f"zip: permutations of {len(permutations)} models, expected of {len(own)}: of the first model {{}}, say"
        )
    unknown = [name for one in permutations for name in one if name not in own[0].sizes]
    if unknown:
        raise CfmergeError(f"zip: permutations: there is no space {and_more(unknown)}")
    for spaces, one in zip(own, permutations, strict=True):
        check_permutations(spaces, one)
