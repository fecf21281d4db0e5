"""Trees of parameters as named arrays: checks that base and experts fit together, and the work that they make."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.call import call_of
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten
from cfmerge.methods import Method
from cfmerge.models import Parameter, classify, is_float
from cfmerge.models.deltas import Delta, Dense
from cfmerge.planning.assign import Assignment, assign
from cfmerge.planning.jobs import check_moments, settled_jobs
from cfmerge.planning.work import Participant, Work
from cfmerge.recipe import Rule, parse_rule
from cfmerge.statistics import Statistics


class Tree(NamedTuple):
    """Named arrays as the loop reads them."""

    leaves: Mapping[str, Any]

    def read(self, name: str, first: int = 0, count: int | None = None) -> Any:
        leaf = self.leaves[name]
        return leaf if count is None else leaf.reshape(-1)[first : first + count]

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        return Dense(self.read(name, first, count))


class Kept:
    """A sink that keeps the arrays in memory."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[int, Any]]] = {}

    def write(self, name: str, values: Any, first: int = 0) -> None:
        self._pieces.setdefault(name, []).append((first, values))

    def arrays(self, like: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays by name, in the shapes of those of the same names in `like`."""
        return {name: _joined(pieces, like[name].shape) for name, pieces in self._pieces.items()}


def _joined(pieces: list[tuple[int, Any]], shape: tuple[int, ...]) -> jax.Array:
    parts = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
    if len(parts) == 1 and isinstance(parts[0], jax.Array):
        return parts[0].reshape(shape)
    with jax.enable_x64(jax.config.read("jax_enable_x64") or parts[0].dtype == np.float64):
        return jnp.concatenate([jnp.asarray(part).reshape(-1) for part in parts]).reshape(shape)


class Problem(NamedTuple):
    """Trees as named arrays, the base's first, and the action on each array."""

    trees: list[Mapping[str, Any]]
    treedef: Any
    names: list[str]  # the experts'
    assignments: Sequence[Mapping[str, Assignment]]  # one for each method

    @staticmethod
    def of(base: Any, experts: Any, by: Sequence[Method], rules: Sequence[Rule | Mapping[str, Any]]) -> "Problem":
        """The problem that trees make: checked to fit together, methods assigned."""
        named = isinstance(experts, Mapping)
        trees = list(experts.values()) if named else list(experts)
        leaves, treedef = flatten(base)
        labels = list(experts) if named else [f"expert {n}" for n in range(len(trees))]
        others = [_matching(leaves, flatten(tree)[0], name) for name, tree in zip(labels, trees, strict=True)]
        shapes = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
        made = [rule if isinstance(rule, Rule) else parse_rule(dict(rule)) for rule in rules]
        parameters = classify(shapes)
        each = [assign(parameters, method, made) for method in by]
        for assignments, method in zip(each, by, strict=True):
            _warn_unknown(assignments, method)
        for name, assignment in each[0].items():
            if assignment.action == "skip":
                raise CfmergeError(f"rule for {name!r}: a tree keeps all its leaves; use keep-base instead of skip")
            if assignment.agree and not _is_key_count(name, leaves):
                _check_agrees(name, leaves[name], [tree[name] for tree in others], labels)
        return Problem([leaves, *others], treedef, names_of(labels if named else None, len(trees)), each)

    def by_expert(self, values: Any, what: str) -> Any:
        """Values in the experts' order, if they are given by the experts' names; else as they are."""
        if not isinstance(values, Mapping):
            return values
        if set(values) != set(self.names):
            raise CfmergeError(f"{what} by name: the experts are {', '.join(self.names)}; found {', '.join(values)}")
        return [values[name] for name in self.names]

    def moments(self, given: Any) -> list[Any]:
        """The leaves of each expert's moments by name; None where there are none."""
        values = self.by_expert(given, "moments")
        return [None] * len(self.names) if values is None else [flatten(moment)[0] for moment in values]


def names_of(names: Sequence[str] | None, count: int) -> list[str]:
    if names is not None and (len(names) != count or len(set(names)) != count):
        raise CfmergeError(f"{count} experts need as many different names, found {list(names)}")
    return [str(number) for number in range(count)] if names is None else list(names)


def _matching(base: Mapping[str, Any], expert: Mapping[str, Any], who: str) -> Mapping[str, Any]:
    missing, extra = [n for n in base if n not in expert], [n for n in expert if n not in base]
    if missing:
        raise CfmergeError(f"{who} lacks {missing[0]!r}{nearest(missing[0], extra) if extra else ''}")
    if extra:
        raise CfmergeError(f"{who} has {extra[0]!r}, which the base lacks")
    for name, leaf in base.items():
        if leaf.shape != expert[name].shape:
            raise CfmergeError(
                f"{who}: {name!r} has shape {tuple(expert[name].shape)}, in the base {tuple(leaf.shape)}"
            )
    return expert


def _warn_unknown(assignments: Mapping[str, Assignment], method: Method) -> None:
    unknown = [name for name, a in assignments.items() if a.parameter.note and a.rule is None]
    if unknown and method.needs.scope == "matrix":
        note = assignments[unknown[0]].parameter.note
        warnings.warn(
            f"{len(unknown)} parameters are averaged, not solved, such as {unknown[0]!r}: {note}", stacklevel=3
        )


def _is_key_count(name: str, leaves: Mapping[str, Any]) -> bool:
    """Whether a leaf counts the keys of an nnx stream: it lies beside the stream's key, and is the base's like it."""
    key = leaves.get(name.removesuffix("count") + "key")
    return name.endswith("count") and key is not None and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _check_agrees(name: str, base: Any, experts: Sequence[Any], names: Sequence[str]) -> None:
    """Integers are the base's; where values are at hand (not traced), the experts' must be the same."""
    if is_float(str(base.dtype)) or jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
        return
    for who, expert in zip(names, experts, strict=True):
        concrete = not isinstance(base, jax.core.Tracer) and not isinstance(expert, jax.core.Tracer)
        if concrete and not np.array_equal(np.asarray(base), np.asarray(expert)):
            raise CfmergeError(
                f"{who}: integers {name!r} differ from the base's; integers are not merged. A rule "
                f"{{'match': {name!r}, 'method': 'keep-base'}} keeps the base's"
            )


def work_of(
    assignments: Sequence[Mapping[str, Assignment]],
    trees: Sequence[Mapping[str, Any]],
    experts: Sequence[str],
    weights: Sequence[Any] | None,
    moments: Sequence[Any],
    seed: Any,
    statistics: Statistics | None = None,
    *,
    sums: bool = False,
) -> Work:
    """The work that trees make.

    Args:
        assignments: one mapping for each result.
        trees: the base's leaves by name, then the experts'.
        experts: their names.
        weights, moments: one for each expert, see `cfmerge.merge_params`.
        statistics, sums: see `settled_jobs`.

    Raises:
        CfmergeError: weights, moments, or a number of experts that do not fit.
    """
    check_seed(seed)
    weights = [1.0] * len(experts) if weights is None else list(weights)
    if len(weights) != len(experts):
        raise CfmergeError(f"{len(weights)} weights for {len(experts)} experts")
    merged = [{name: a for name, a in each.items() if a.action == "merge"} for each in assignments]
    own = [call_of(a.method) for each in merged for a in each.values()]
    kept = statistics.tensors if statistics is not None and isinstance(statistics.tensors, dict) else {}
    traced = _any_traced((trees, weights, moments, own, kept))

    def dtype_of(parameter: Parameter) -> np.dtype:
        dtype = np.dtype(trees[0][parameter.name].dtype)
        return np.dtype(jax.dtypes.canonicalize_dtype(dtype)) if traced else dtype

    jobs, notes = settled_jobs(
        merged, experts, weights, before=list(statistics.experts) if statistics else [], dtype_of=dtype_of,
        statistics=statistics, sums=sums,
    )  # fmt: skip
    for note in notes:
        warnings.warn(note, stacklevel=5)
    taking_part = [
        Participant(name, f"expert {name!r}", Tree(tree), None if moment is None else Tree(moment))
        for name, tree, moment in zip(experts, trees[1:], moments or [None] * len(experts), strict=True)
    ]
    check_moments(jobs, taking_part, lambda moment, name: moment.leaves.get(name))  # type: ignore[attr-defined]
    base = Participant("base", "base", Tree(trees[0]))
    return Work(base, tuple(taking_part), tuple(jobs), statistics, seed, traced=traced)


def _any_traced(values: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
