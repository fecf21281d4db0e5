"""Merging arrays and pytrees: pure functions that work under `jit`, `vmap` and `grad`."""

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge.checkpoints.pytree import flatten, unflatten
from cfmerge.engine.assign import Assignment, assign
from cfmerge.engine.steps import steps
from cfmerge.errors import CfmergeError, nearest
from cfmerge.methods import Context, Method
from cfmerge.methods._random import key_of
from cfmerge.methods._registry import Place, of_expert, resolve
from cfmerge.parameters import classify, is_float
from cfmerge.recipe import Rule, parse_rule


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
        names: of the experts, for parameters that are given by name, and for keys; none: their numbers.

    Returns:
        The merged weight, in the base's dtype. Computed in float32, or in float64 if that is what comes in.

    Raises:
        CfmergeError: no experts, another shape, or another number of weights.
    """
    base = jnp.asarray(base)
    experts = [jnp.asarray(expert) for expert in experts]
    for number, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise CfmergeError(f"expert {number} has shape {expert.shape}, the base {base.shape}")
    if method.scope == "matrix" and base.ndim != 2:
        from cfmerge.methods import average

        method = average()
    compute = _compute_dtype(base)
    wide = base.astype(compute)
    names = names or [str(number) for number in range(len(experts))]
    method = resolve(method, Place("tensor", None, tuple(names), fnmatch.fnmatchcase))
    weights = _check_weights(len(experts), weights)
    moments = moments or [None] * len(experts)
    statistic = of_expert(method, 0).init(wide)
    for number, (expert, weight, moment) in enumerate(zip(experts, weights, moments, strict=True)):
        context = Context(key_of(seed, "tensor", names[number]), number, moment)
        delta = expert.astype(compute) - wide
        statistic = of_expert(method, number).see(statistic, delta, jnp.asarray(weight, compute), context)
    return (wide + of_expert(method, 0).solve(statistic)).astype(base.dtype)


def merge_params(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
) -> Any:
    """Merges pytrees of parameters: dicts, FrozenDicts, `nnx.State`, any registered pytree.

    Kinds and layouts are read off names and shapes (`.../kernel` is `(in, out)`, `...weight` is `(out, in)`, see
    `cfmerge.parameters`); tensors of one shape are solved together. Differentiable in base, experts and weights.

    Args:
        base: the base's parameters.
        experts: one tree per expert, of the same structure; a mapping `{name: tree}` names them in errors.
        method: such as `cfmerge.methods.ace()`.
        weights: one per expert; none: all 1.
        rules: as in a recipe, on names joined by `/`: `{"match": "*/w", "layout": "io"}`.

    Returns:
        A tree like `base`, in its dtypes. Integers, booleans and keys are the base's.

    Raises:
        CfmergeError: trees of another structure or shape, or integers that do not agree.
    """
    names = list(experts) if isinstance(experts, Mapping) else [f"expert {n}" for n in range(len(experts))]
    trees = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    weights = _check_weights(len(trees), weights)
    leaves, treedef = flatten(base)
    expert_leaves = [_matching(leaves, flatten(tree)[0], name) for name, tree in zip(names, trees, strict=True)]

    shapes = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
    made = [rule if isinstance(rule, Rule) else parse_rule(dict(rule)) for rule in rules]
    assignments = assign(classify(shapes), method, made)
    _warn_unknown(assignments, method)

    merged = dict(leaves)
    for bucket in _buckets(assignments, leaves):
        stacks = [jnp.stack([tree[name] for name in bucket]) for tree in (leaves, *expert_leaves)]
        assignment = assignments[bucket[0]]
        result = _merge_stack(assignment, stacks[0], stacks[1:], weights)
        merged |= dict(zip(bucket, result, strict=True))
    for name, assignment in assignments.items():
        if assignment.agree and not _is_key_count(name, leaves):
            _check_agrees(name, leaves[name], [tree[name] for tree in expert_leaves], names)
    return unflatten(treedef, merged)


def _merge_stack(assignment: Assignment, base: Array, experts: Sequence[Array], weights: Sequence[Any]) -> Array:
    method = assignment.method
    layout = "" if method.scope == "entry" else assignment.parameter.layout
    start, step, finish = steps(method, layout, _compute_dtype(base))
    statistics = start(base)
    for expert, weight in zip(experts, weights, strict=True):
        statistics, _ = step(statistics, base, expert, weight)
    return finish(statistics, base, str(base.dtype))[0]


def _buckets(assignments: Mapping[str, Assignment], leaves: Mapping[str, Any]) -> list[list[str]]:
    """Names of tensors that are solved together: one shape, dtype, layout and method."""
    buckets: dict[Any, list[str]] = {}
    for name, assignment in assignments.items():
        if assignment.action == "skip":
            raise CfmergeError(f"rule for {name!r}: a tree keeps all its leaves; use keep-base instead of skip")
        if assignment.action == "merge":
            leaf, layout = leaves[name], assignment.parameter.layout
            buckets.setdefault((leaf.shape, leaf.dtype, layout, assignment.method), []).append(name)
    return list(buckets.values())


def _compute_dtype(array: Array) -> str:
    return "float64" if array.dtype == jnp.float64 else "float32"


def _check_weights(count: int, weights: Sequence[float] | None) -> Sequence[Any]:
    if count == 0:
        raise CfmergeError("no experts: a merge needs at least one")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise CfmergeError(f"{len(weights)} weights for {count} experts")
    return weights


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
    if unknown and method.scope == "matrix":
        note = assignments[unknown[0]].parameter.note
        warnings.warn(
            f"{len(unknown)} parameters are averaged, not solved, such as {unknown[0]!r}: {note}", stacklevel=3
        )


def _is_key_count(name: str, leaves: Mapping[str, Any]) -> bool:
    """How many keys an nnx stream has handed out: it lies beside the stream's key, and is the base's like it."""
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
