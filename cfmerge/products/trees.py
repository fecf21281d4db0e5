"""Trees of parameters as named arrays: checks that base and experts fit together, and the work that they make."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cfmerge.core.call import Call, call_of
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten
from cfmerge.methods import Method
from cfmerge.models import Parameter, classify, is_float
from cfmerge.planning.assign import Assignment, Choose, assign
from cfmerge.planning.jobs import check_moments, settled_jobs, with_ranks
from cfmerge.planning.unsolved import unsolved
from cfmerge.planning.work import Job, Participant, Work
from cfmerge.products.leaves import Tree
from cfmerge.products.sharded import is_spread, layout_of, replicated
from cfmerge.recipe import Rule, parse_rule
from cfmerge.statistics import Statistics


class Problem(NamedTuple):
    """Trees as named arrays, the base's first, and the action on each array."""

    trees: list[Mapping[str, Any]]
    treedef: Any
    names: list[str]  # the experts'
    assignments: Sequence[Mapping[str, Assignment]]  # one for each method

    @staticmethod
    def of(
        base: Any,
        experts: Any,
        by: Sequence[Method],
        rules: Sequence[Rule | Mapping[str, Any]],
        choose: Choose | None = None,
    ) -> "Problem":
        """The problem that trees make: checked to fit together, methods assigned."""
        named = isinstance(experts, Mapping)
        trees = list(experts.values()) if named else list(experts)
        leaves, treedef = flatten(base)
        labels = list(experts) if named else [f"expert {n}" for n in range(len(trees))]
        others = [_matching(leaves, flatten(tree)[0], name) for name, tree in zip(labels, trees, strict=True)]
        shapes = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
        made = [rule if isinstance(rule, Rule) else parse_rule(dict(rule)) for rule in rules]
        parameters = classify(shapes)
        each = [assign(parameters, method, made, choose=choose) for method in by]
        for assignments, method in zip(each, by, strict=True) if choose is None else ():
            _warn_unsolved(assignments, method)
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


def _warn_unsolved(assignments: Mapping[str, Assignment], method: Method) -> None:
    for one in unsolved(assignments, method):
        way_out = f", such as {{'match': {one.glob!r}, 'layout': {one.layout!r}}}" if one.layout else ""
        warnings.warn(
            f"{len(one.names)} parameters are averaged, not solved, such as {one.names[0]!r}: {one.why}{way_out}",
            stacklevel=5,
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
        if not _any_traced((base, expert)) and not _same(base, expert):
            raise CfmergeError(
                f"{who}: integers {name!r} differ from the base's; integers are not merged. A rule "
                f"{{'match': {name!r}, 'method': 'keep-base'}} keeps the base's"
            )


def _same(a: Any, b: Any) -> bool:
    if is_spread(a) or is_spread(b):  # compared where they lie
        where = layout_of([a, b])
        return bool(jnp.array_equal(jax.device_put(a, where), jax.device_put(b, where)))
    return np.array_equal(np.asarray(a), np.asarray(b))


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
        warnings.warn(note, stacklevel=8)
    layouts = {} if traced else layouts_of(jobs, trees)
    taking_part = [
        Participant(name, f"expert {name!r}", Tree(tree, layouts), None if moment is None else _beside(moment, layouts))
        for name, tree, moment in zip(experts, trees[1:], moments or [None] * len(experts), strict=True)
    ]
    check_moments(jobs, taking_part, lambda moment, name: moment.leaves.get(name))  # type: ignore[attr-defined]
    jobs = with_ranks(jobs, taking_part, sums or statistics is not None)
    base = Participant("base", "base", Tree(trees[0], layouts))
    return Work(base, tuple(taking_part), tuple(jobs), statistics, seed, traced=traced, sums=sums, sharded=layouts)


class Arrays(NamedTuple):
    """All arrays that work is made of, as a pytree: those of a tree's caller may lie on a mesh, and be traced.

    Attributes:
        trees: the base's leaves by name, then the experts'.
        weights, moments: one for each expert, see `cfmerge.merge_params`.
        calls: of each result, the methods of its tensors, whose numbers may be arrays.
        kept: the statistics' arrays.
    """

    trees: Sequence[Mapping[str, Any]]
    weights: Sequence[Any] | None
    moments: Sequence[Any]
    calls: Sequence[Mapping[str, Call]]
    kept: Mapping[str, Any] | None

    @staticmethod
    def of(
        assignments: Sequence[Mapping[str, Assignment]],
        trees: Sequence[Mapping[str, Any]],
        weights: Sequence[Any] | None,
        moments: Sequence[Any],
        kept: Statistics | None = None,
    ) -> "Arrays":
        calls = [{name: call_of(a.method) for name, a in each.items() if a.action == "merge"} for each in assignments]
        held = kept.tensors if kept is not None and isinstance(kept.tensors, dict) else None
        return Arrays(trees, weights, moments, calls, held)

    def work(
        self,
        assignments: Sequence[Mapping[str, Assignment]],
        experts: Sequence[str],
        seed: Any,
        kept: Statistics | None = None,
        *,
        sums: bool = False,
    ) -> Work:
        """The work of these assignments and statistics with the arrays that are held here; see `work_of`."""
        own = [
            {name: _with(assignment, calls[name]) for name, assignment in each.items() if name in calls}
            for each, calls in zip(assignments, self.calls, strict=True)
        ]
        if kept is not None and self.kept is not None:
            kept = dataclasses.replace(kept, tensors=self.kept)
        return work_of(own, self.trees, experts, self.weights, self.moments, seed, kept, sums=sums)


def _with(assignment: Assignment, call: Call) -> Assignment:
    """The assignment, its method made by this call if that holds other numbers."""
    own = jax.tree.leaves(call_of(assignment.method))
    if all(a is b for a, b in zip(own, jax.tree.leaves(call), strict=True)):
        return assignment
    return dataclasses.replace(assignment, method=call.part())


def layouts_of(jobs: Sequence[Job], trees: Sequence[Mapping[str, Any]]) -> dict[str, Sharding]:
    """The layouts of the tensors that lie on several devices."""
    stacked = {job.name: [a for a, letter in enumerate(job.parameter.layout) if letter == "b"] for job in jobs}
    each = {
        job.name: layout_of([tree[job.name] for tree in trees], stacked[job.name] if job.layers_apart else ())
        for job in jobs
    }
    return {name: layout for name, layout in each.items() if layout is not None}


def _beside(moments: Mapping[str, Any], layouts: Mapping[str, Sharding]) -> Tree:
    """Moments where the tensors lie: as they are if on several devices too, else on each of them."""
    alone = {name: where for name, where in layouts.items() if name in moments and not is_spread(moments[name])}
    return Tree(moments, {name: replicated(where) for name, where in alone.items()})


def _any_traced(values: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
