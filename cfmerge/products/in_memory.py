"""Merging arrays and pytrees: pure functions that work under `jit`, `vmap` and `grad`."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float

from cfmerge import methods
from cfmerge.engine import run
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import unflatten
from cfmerge.methods import Method
from cfmerge.models import Kind, Parameter
from cfmerge.planning.assign import Assignment
from cfmerge.planning.jobs import as_method
from cfmerge.products.choosing import settled
from cfmerge.products.leaves import Kept
from cfmerge.products.sharded import Outside, automatic, home, nowhere
from cfmerge.products.trees import Arrays, Problem, names_of
from cfmerge.recipe import Rule
from cfmerge.statistics import Statistics, fingerprint, full_form

NO_EXPERTS = "no experts: a merge needs at least one"


def merge_tensor(
    base: Float[Array, "out in"],
    experts: Sequence[Float[Array, "out in"]],
    method: str | Method = "ace",
    *,
    weights: Sequence[float] | None = None,
    moments: Sequence[Array] | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Float[Array, "out in"]:
    """The merged weight of one layer: the mathematics alone.

        >>> base = jnp.zeros((4, 3))
        >>> merged = cfmerge.merge_tensor(base, [base + 1, base + 3], "average")
        >>> merged.shape, float(merged[0, 0])
        ((4, 3), 2.0)

    Args:
        base: the weight `(out, in)`, acting as `y = W x`; any shape for a method that takes it. ACE and its kin
            average tensors that are not two-dimensional.
        experts: the fine-tuned weights, same shape.
        method: such as `cfmerge.methods.ace()`, or text such as `"ace(eps_rel=0.1)"`.
        weights: one for each expert; None: all 1.
        moments: measurements of each expert, for methods that need them: input Grams `(in, in)`, or diagonal Fishers
            of the weight's shape.
        seed: for random methods.
        names: the experts' names, for numbers that are given by name, and for random keys; None: "0", "1", ...

    Returns:
        The merged weight, in the base's dtype. Computed in float32, or in float64 if that is what comes in.

    Raises:
        CfmergeError: no experts, another shape, another number of weights, moments that do not fit, or, outside
            `jit`, a NaN or an infinity in a weight or in the result.
    """
    base = jnp.asarray(base)
    experts = [jnp.asarray(expert) for expert in experts]
    for number, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise CfmergeError(f"expert {number} has shape {expert.shape}, the base {base.shape}")
    method, matrix = as_method(method), base.ndim == 2
    if method.needs.scope == "matrix" and not matrix:
        method = methods.average()
    kind, layout = (Kind.MATRIX, "oi") if matrix else (Kind.VECTOR, "")
    assignment = Assignment(Parameter("tensor", base.shape, str(base.dtype), kind, layout), "merge", method)
    names = names_of(names, len(experts))
    if not experts:
        raise CfmergeError(NO_EXPERTS)
    given = [None] * len(experts) if moments is None else [{"tensor": moment} for moment in moments]
    tensors = [{"tensor": array} for array in (base, *experts)]
    return merge_leaves([{"tensor": assignment}], tensors, names, weights, given, seed)[0]["tensor"]


def merge_params(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    method: str | Method = "ace",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    moments: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """The merged pytree of parameters: dicts, FrozenDicts, `nnx.State`, any registered pytree.

        >>> base = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
        >>> experts = [jax.tree.map(lambda leaf: leaf + step, base) for step in (1.0, 3.0)]
        >>> merged = cfmerge.merge_params(base, experts, "average", weights=[3.0, 1.0])
        >>> float(merged["dense"]["bias"][0])
        1.5

    Kinds and layouts are read off names and shapes (`.../kernel` is `(in, out)`, `...weight` is `(out, in)`, see
    `cfmerge.models`); tensors of one shape are solved together. Differentiable in base, experts and weights.

    Args:
        base: the base's parameters.
        experts: one tree per expert, of the same structure; a mapping `{name: tree}` names them in errors.
        method: such as `cfmerge.methods.ace()`, or text such as `"ace(eps_rel=0.1)"`.
        weights: one for each expert: numbers, or what a recipe takes (gradients over depth, values by name); None:
            all 1. A mapping by the experts' names too: `jax.jit` hands over a dict of experts sorted by name, and a
            list in its order.
        rules: as in a recipe, on names joined by `/`: `{"match": "*/w", "layout": "io"}`.
        moments: measurements of each expert: `{name: array}`, or a tree like `base` (Fishers). In a list, or, as with
            weights, a mapping by the experts' names.
        seed: for random methods.

    Returns:
        A tree like `base`, in its dtypes. Integers, booleans and keys are the base's.

    Raises:
        CfmergeError: trees of another structure or shape, integers that do not agree, weights or moments that do not
            fit, or, outside `jit`, a NaN or an infinity in a tree or in the result.
    """
    return merge_params_by(base, experts, [method], weights=weights, rules=rules, moments=moments, seed=seed)[0]


def merge_params_by(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    by: Sequence[str | Method],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    moments: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Any]:
    """`merge_params` by several methods, which share their statistics: one tree for each."""
    problem = Problem.of(base, experts, [as_method(method) for method in by], rules)
    if not problem.names:
        raise CfmergeError(NO_EXPERTS)
    in_order = problem.by_expert(weights, "weights")
    given = problem.moments(moments)
    merged = merge_leaves(problem.assignments, problem.trees, problem.names, in_order, given, seed)
    return [unflatten(problem.treedef, dict(problem.trees[0]) | result) for result in merged]


def merge_assigned(base: Any, method: Method, kept: Statistics) -> dict[str, Array]:
    """The merged leaves of the base, by name, from statistics."""
    rules = kept.options["rules"]
    problem = Problem.of(base, {}, [method], rules)
    names = list(kept.kinds)
    known = all(name in problem.trees[0] for name in names)
    if not known or automatic(lambda leaves: fingerprint(leaves, names), problem.trees[0], nowhere) != kept.base:
        raise CfmergeError("solve: the statistics were accumulated over another base")
    for name, assignment in problem.assignments[0].items():
        if assignment.action == "merge":
            kept.check(full_form(assignment.method), name)
    return merge_leaves(problem.assignments, problem.trees, [], None, [], 0, kept)[0]


def merge_leaves(
    assignments: Sequence[Mapping[str, Assignment]],
    trees: Sequence[Mapping[str, Any]],
    experts: Sequence[str],
    weights: Sequence[Any] | None,
    given: Sequence[Any],
    seed: int,
    kept: Statistics | None = None,
) -> list[dict[str, Array]]:
    """The merged tensors by name, of each result; notes of the methods become warnings.

    Args:
        assignments: one mapping for each result.
        trees: the base's and the experts'.
        kept: statistics before the experts.
    """

    def merged(arrays: Arrays) -> list[dict[str, Array]]:
        work, chosen = settled(arrays.work(assignments, experts, seed, kept))
        sinks = [Kept(work.sharded) for _ in assignments]
        account = run.merge(work, sinks)
        about = (*account.foreign(experts), *account.twins(experts))
        for note in (*chosen, *about, *account.told(), *filter(None, map(account.warning, range(len(sinks))))):
            warnings.warn(note, stacklevel=6)
        return [sink.arrays(arrays.trees[0]) for sink in sinks]

    def homes(results: list[dict[str, Array]], mesh: Any) -> list[dict[str, Sharding | None]]:
        return [{name: home(trees[0][name], mesh) for name in result} for result in results]

    if kept is not None and not isinstance(kept.tensors, dict):
        kept = dataclasses.replace(kept, tensors=Outside(kept.tensors))
    return automatic(merged, Arrays.of(assignments, trees, weights, given, kept), homes)
