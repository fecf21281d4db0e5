"""Merging arrays and pytrees: pure functions that work under `jit`, `vmap` and `grad`."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge import methods
from cfmerge.engine.assign import Assignment
from cfmerge.engine.batches import complete
from cfmerge.engine.plan import check_count, check_moment, check_weights
from cfmerge.engine.resolve import depths, place, same_for_stacked_layers, settle, weight_at
from cfmerge.engine.statistics import Statistics, fingerprint, full_form, stacked
from cfmerge.engine.steps import Inputs, Steps, compiled, settings_of, steps
from cfmerge.engine.survey import Stack, at_places, by_member, found_for, kind_of, survey
from cfmerge.engine.trees import Problem, names_of
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import unflatten
from cfmerge.methods import Found, Method
from cfmerge.methods._random import check_seed
from cfmerge.methods._registry import of_expert
from cfmerge.methods._several import members, several
from cfmerge.parameters import Kind, Parameter
from cfmerge.recipe import Rule

NO_EXPERTS = "no experts: a merge needs at least one"


def merge_tensor(
    base: Float[Array, "out in"],
    experts: Sequence[Float[Array, "out in"]],
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    moments: Sequence[Array] | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Float[Array, "out in"]:
    """Merges one canonical weight: the mathematics alone.

    Args:
        base: the weight `(out, in)`, acting as `y = W x`; any shape for a method that takes it. ACE and its kin
            average what is not two-dimensional.
        experts: the fine-tuned weights, same shape.
        method: such as `cfmerge.methods.ace()`.
        weights: one per expert; none: all 1.
        moments: what was measured of each expert, for methods that need it: input Grams `(in, in)`, or diagonal
            Fishers of the weight's shape.
        seed: of random methods.
        names: of the experts, for numbers that are given by name, and for random keys; none: "0", "1", ...

    Returns:
        The merged weight, in the base's dtype. Computed in float32, or in float64 if that is what comes in.

    Raises:
        CfmergeError: no experts, another shape, another number of weights, or moments that do not fit.
    """
    base = jnp.asarray(base)
    experts = [jnp.asarray(expert) for expert in experts]
    for number, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise CfmergeError(f"expert {number} has shape {expert.shape}, the base {base.shape}")
    matrix = base.ndim == 2
    if method.scope == "matrix" and not matrix:
        method = methods.average()
    kind, layout = (Kind.MATRIX, "oi") if matrix else (Kind.VECTOR, "")
    assignment = Assignment(Parameter("tensor", base.shape, str(base.dtype), kind, layout), "merge", method)
    names = names_of(names, len(experts))
    if not experts:
        raise CfmergeError(NO_EXPERTS)
    given = [None] * len(experts) if moments is None else [{"tensor": moment} for moment in moments]
    tensors = [{"tensor": array} for array in (base, *experts)]
    return merge_leaves({"tensor": assignment}, tensors, names, weights, given, seed)["tensor"]


def merge_params(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    method: Method,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    moments: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Merges pytrees of parameters: dicts, FrozenDicts, `nnx.State`, any registered pytree.

    Kinds and layouts are read off names and shapes (`.../kernel` is `(in, out)`, `...weight` is `(out, in)`, see
    `cfmerge.parameters`); tensors of one shape are solved together. Differentiable in base, experts and weights.

    Args:
        base: the base's parameters.
        experts: one tree per expert, of the same structure; a mapping `{name: tree}` names them in errors.
        method: such as `cfmerge.methods.ace()`.
        weights: one per expert: numbers, or what a recipe takes (gradients over depth, values by name); none: all 1.
            A mapping by the experts' names too: `jax.jit` hands over a dict of experts sorted by name, a list is not.
        rules: as in a recipe, on names joined by `/`: `{"match": "*/w", "layout": "io"}`.
        moments: one per expert, of what was measured of it: `{name: array}`, or a tree like `base` (Fishers). In a
            list, or, as with weights, a mapping by the experts' names.
        seed: of random methods.

    Returns:
        A tree like `base`, in its dtypes. Integers, booleans and keys are the base's.

    Raises:
        CfmergeError: trees of another structure or shape, integers that do not agree, or weights or moments that do
            not fit.
    """
    return merge_params_by(base, experts, [method], weights=weights, rules=rules, moments=moments, seed=seed)[0]


def merge_params_by(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    by: Sequence[Method],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    moments: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Any]:
    """`merge_params` by several methods, which share what they keep of the experts: one tree for each."""
    problem = Problem.of(base, experts, by, rules)
    if not problem.names:
        raise CfmergeError(NO_EXPERTS)
    in_order = problem.by_expert(weights, "weights")
    given = problem.moments(moments)
    merged = merge_leaves(_in_one(problem.assignments), problem.trees, problem.names, in_order, given, seed)
    results = [merged] if len(by) == 1 else [{n: values[k] for n, values in merged.items()} for k in range(len(by))]
    return [unflatten(problem.treedef, dict(problem.trees[0]) | result) for result in results]


def merge_assigned(base: Any, method: Method, kept: Statistics) -> dict[str, Array]:
    """The merged leaves of the base, by name, from what was kept of experts."""
    rules = kept.options["rules"]
    problem = Problem.of(base, {}, [method], rules)
    names = list(kept.kinds)
    if any(name not in problem.trees[0] for name in names) or fingerprint(problem.trees[0], names) != kept.base:
        raise CfmergeError("solve: the statistics were accumulated over another base")
    for name, assignment in problem.assignments[0].items():
        if assignment.action == "merge":
            kept.check(full_form(assignment.method), name)
    return merge_leaves(problem.assignments[0], problem.trees, [], None, [], 0, kept)


def _in_one(each: Sequence[Mapping[str, Assignment]]) -> Mapping[str, Assignment]:
    """Assignments to methods that do what all the given ones do."""
    if len(each) == 1:
        return each[0]
    return {
        name: dataclasses.replace(assignment, method=several(tuple(other[name].method for other in each)))
        for name, assignment in each[0].items()
    }


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tensors that are merged together: one shape, dtype, layout and method (but for its numbers)."""

    assignments: tuple[Assignment, ...]
    weights: tuple[tuple[Any, ...], ...]  # of each tensor, one for each expert
    before: int = 0  # experts that were seen before these
    traced: bool = False  # some of what it is merged from: then the caller compiles

    @property
    def names(self) -> list[str]:
        return [assignment.parameter.name for assignment in self.assignments]

    @property
    def layout(self) -> str:
        return "" if self.assignments[0].method.scope == "entry" else self.assignments[0].parameter.layout

    @property
    def matrices(self) -> int:
        return self.assignments[0].parameter.canonical[0] if self.layout else 1

    def stack(
        self, trees: Sequence[Mapping[str, Any]], given: Sequence[Any], experts: Sequence[str], seed: int
    ) -> Stack:
        layers = [(name, layer) for name in self.names for layer in range(self.matrices)]
        method = self.assignments[0].method

        def inputs(number: int) -> Inputs:
            weight = jnp.repeat(jnp.stack([jnp.asarray(own[number]) for own in self.weights]), self.matrices)
            made = Inputs(weight, self.before + number, seed=seed)
            moment = None
            if method.moments:
                moment = jnp.stack([jnp.asarray(given[number][name]) for name in self.names])
            return complete(made, method, self.names, self.matrices, experts[number], moment)

        def arrays(number: int) -> Array:
            return jnp.stack([trees[number][name] for name in self.names])

        return Stack(method, tuple(layers), self.layout, arrays(0), lambda number: arrays(number + 1), inputs)


def merge_leaves(
    assignments: Mapping[str, Assignment],
    trees: Sequence[Mapping[str, Any]],
    experts: Sequence[str],
    weights: Sequence[Any] | None,
    given: Sequence[Any],
    seed: int,
    kept: Statistics | None = None,
) -> dict[str, Array]:
    """The merged tensors by name; `trees` are the base's and the experts', `kept` is of experts before them."""
    merged: dict[str, Array] = {}
    for bucket, stack, found in prepared(assignments, trees, experts, weights, given, seed, kept):
        result, reports = _merge_stack(bucket, stack, found, experts, kept)
        _tell(bucket, reports)
        merged |= dict(zip(bucket.names, result, strict=True))
    return merged


def prepared(
    assignments: Mapping[str, Assignment],
    trees: Sequence[Mapping[str, Any]],
    experts: Sequence[str],
    weights: Sequence[Any] | None,
    given: Sequence[Any],
    seed: int,
    kept: Statistics | None = None,
    sums: bool = False,
) -> Iterator[tuple[Bucket, Stack, Found | None]]:
    """The tensors in buckets, with their arrays, and what surveys of the whole model found for their method."""
    weights = _check_weights(len(experts), weights)
    check_seed(seed)
    if sums or kept is not None:  # in the form whose statistic is a sum of fixed size
        assignments = {
            name: dataclasses.replace(a, method=full_form(a.method)) if a.action == "merge" else a
            for name, a in assignments.items()
        }
    traced = _any_traced((trees, weights, given))
    buckets = _buckets(assignments, trees[0], experts, weights, list(kept.experts) if kept else [], traced)
    for bucket in buckets:
        for member in members(bucket.assignments[0].method):
            check_count(member, len(experts) + bucket.before)
        _check_moments(bucket, given, experts)
    stacks = [bucket.stack(trees, given, experts, seed) for bucket in buckets]
    found: dict[Any, Found | None] = {}
    for kind, (method, numbers) in by_member([stack.method for stack in stacks]).items():
        own = [stacks[number] for number in numbers]
        double = any(stack.base.dtype == jnp.float64 for stack in own)
        found[kind] = survey(method, len(experts), lambda own=own: own, "float64" if double else "float32")  # type: ignore[misc]
    for bucket, stack in zip(buckets, stacks, strict=True):
        yield bucket, stack, found_for(stack.method, found)


def statistics_of(
    bucket: Bucket, stack: Stack, found: Found | None, experts: Sequence[str], kept: Statistics | None
) -> Any:
    """The statistics of an additive method when all experts were seen."""
    by, settings = _steps(bucket, stack, found, experts)
    if kept is None:
        statistics = by.start(settings[0], stack.base)
    else:
        method, parameter = of_expert(bucket.assignments[0].method, 0), bucket.assignments[0].parameter
        shape = parameter.canonical[1:] if bucket.layout else parameter.shape
        own = [kept.tensors[name] for name in bucket.names]
        statistics = stacked(own, method, shape, _compute_dtype(stack.base), None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # where rows become a Gram
        for t in range(len(experts)):
            statistics, _ = by.step(settings[t + 1], statistics, stack.base, stack.expert(t), stack.inputs(t))
    return statistics


def _steps(bucket: Bucket, stack: Stack, found: Found | None, experts: Sequence[str]) -> tuple[Steps, list[Any]]:
    """The steps, compiled where nothing is traced; and the settings of start and solve, and then of each expert."""
    rules = [assignment.method for assignment in bucket.assignments]
    found = at_places(found, stack.places)
    numbers = [0, *range(bucket.before, bucket.before + len(experts))]
    settings = [settings_of([of_expert(rule, t) for rule in rules], bucket.matrices, found) for t in numbers]
    made = steps if bucket.traced or _any_traced(settings) else compiled
    return made(of_expert(rules[0], 0), stack.layout, _compute_dtype(stack.base)), settings


def _merge_stack(
    bucket: Bucket, stack: Stack, found: Found | None, experts: Sequence[str], kept: Statistics | None
) -> tuple[Array, dict[str, Array]]:
    by, settings = _steps(bucket, stack, found, experts)
    out = str(stack.base.dtype)
    if bucket.assignments[0].method.additive:
        statistics = statistics_of(bucket, stack, found, experts, kept)
        return by.finish(settings[0], statistics, stack.base, out)[:2]
    numbers = range(len(experts))
    others, inputs = [stack.expert(t) for t in numbers], [stack.inputs(t) for t in numbers]
    return by.together(settings[1:], stack.base, others, inputs, out)[:2]


def _any_traced(values: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _tell(bucket: Bucket, reports: Mapping[str, Array]) -> None:
    """Warnings of what a method did that one would not expect; nothing while values are traced."""
    for key, (condition, message) in bucket.assignments[0].method.notes.items():
        values = reports.get(key)
        if values is None or isinstance(values, jax.core.Tracer):
            continue
        largest = np.asarray(values).reshape(len(bucket.names), -1).max(axis=1)
        told = [name for name, value in zip(bucket.names, largest, strict=True) if condition(float(value))]
        if told:
            warnings.warn(f"{and_more(told)}: {message.format(value=float(largest.max()))}", stacklevel=5)


def _buckets(
    assignments: Mapping[str, Assignment],
    leaves: Mapping[str, Any],
    experts: Sequence[str],
    weights: Sequence[Any],
    before: Sequence[str],
    traced: bool,
) -> list[Bucket]:
    buckets: dict[Any, list[tuple[Assignment, tuple[Any, ...]]]] = {}
    depth_of = depths(assignments)
    for told in same_for_stacked_layers(assignments, depth_of, weights, [*before, *experts]):
        warnings.warn(told, stacklevel=6)
    for name, assignment in assignments.items():
        if assignment.action != "merge":
            continue
        where = place(name, depth_of[name], [*before, *experts])
        settled = dataclasses.replace(assignment, method=settle(assignment.method, where))
        own = tuple(weight_at(w, where, expert) for w, expert in zip(weights, experts, strict=True))
        for member in members(settled.method):
            check_weights(member, dict(zip(experts, own, strict=True)), name)
        layout = "" if assignment.method.scope == "entry" else assignment.parameter.layout
        key = (leaves[name].shape, leaves[name].dtype, layout, kind_of(settled.method))
        buckets.setdefault(key, []).append((settled, own))
    return [
        Bucket(tuple(settled for settled, _ in members), tuple(own for _, own in members), len(before), traced)
        for members in buckets.values()
    ]


def _check_moments(bucket: Bucket, given: Sequence[Any], experts: Sequence[str]) -> None:
    for assignment in bucket.assignments:
        method, parameter = assignment.method, assignment.parameter
        if method.moments:
            for expert, moment in zip(experts, given, strict=True):
                found = None if moment is None else moment.get(parameter.name)
                check_moment(method.moments, parameter, found, method.name, f"expert {expert!r}")


def _compute_dtype(array: Array) -> str:
    return "float64" if array.dtype == jnp.float64 else "float32"


def _check_weights(count: int, weights: Sequence[float] | None) -> Sequence[Any]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise CfmergeError(f"{len(weights)} weights for {count} experts")
    return weights
