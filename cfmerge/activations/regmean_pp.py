"""RegMean++: RegMean whose Grams come from the merged model's own features.

Nguyen et al., RegMean++, arXiv 2508.03121. With the layers in groups `1 .. L` in the order of their first calls:

    for l = 1 .. L:
        for each expert t: the groups before l merged, group l and those behind it as in expert t;
                           run on the batches of expert t: Grams Sigma_t of the layers in group l
        merge group l by RegMean with these Grams
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cfmerge.activations.collect import collect, linen_forward, nnx_forward, normalised
from cfmerge.activations.looking import Forward
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.methods import Method, regmean
from cfmerge.models import classify
from cfmerge.planning.assign import Assignment, assign
from cfmerge.planning.depth import depths_of, place, settle
from cfmerge.products.in_memory import merge_leaves
from cfmerge.recipe import Rule, parse_rule

Leaves = dict[str, Any]


def regmean_pp(
    model: Any,
    base: Any,
    experts: Sequence[Any],
    batches: Sequence[Iterable[Any]],
    method: Method | None = None,
    *,
    weights: Sequence[float] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    groups: Literal["block", "layer"] | Callable[[str], str] = "block",
    collections: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Merges experts layer by layer, with Grams of what the layers merged so far make of each expert's batches.

    Runs the model on every expert's batches once for each group: L x T passes over the batches (RegMean: T).
    Parameters that are not solved get the mean of the deltas.

    Args:
        model: a `flax.linen.Module`, or an `nnx.Module` (in the mode in which it is to run).
        base: the base's parameters, `variables["params"]` of linen or a state of nnx such as
            `nnx.state(model, nnx.Param)`.
        experts: one such tree for each expert.
        batches: batches of each expert, as for `collect_linen` and `collect_nnx`; they are walked through L times.
        method: one that takes input Grams; none: `regmean(a=0.95)`.
        weights: one per expert; none: all 1.
        rules: as in `merge_params`.
        groups: the layers that are merged at once: "block", all layers with the same name up to its first part that is
            a number or ends in `_` and a number (below what all layers have in common); "layer", each by itself; or a
            function from a parameter's name to the name of its group.
        collections: the other collections that a linen model needs, such as `batch_stats`.
        options: options of the call, the same for all batches.

    Returns:
        A tree like `base`.

    Raises:
        CfmergeError: no experts, or not as many lists of batches; a layer to be solved that is never called, or is not
            of a kind that `collect_linen` and `collect_nnx` know (give it another method by a rule).
    """
    if len(experts) == 0 or len(experts) != len(batches):
        raise CfmergeError(f"regmean_pp: {len(experts)} experts and {len(batches)} lists of batches")
    method = method or regmean(a=0.95)
    if method.needs.moments != "input_gram":
        raise CfmergeError(f"regmean_pp: {method.name} takes no input Grams; give regmean or lot, or a chain of one")
    data = [list(own) for own in batches]
    leaves, treedef = flatten(base)
    own = [flatten(tree)[0] for tree in experts]
    names = [str(number) for number in range(len(own))]
    runner = _Runner(model, treedef, collections or {}, options)
    assignments = _assigned(leaves, method, rules, names)
    solved = {
        name
        for name, assignment in assignments.items()
        if assignment.action == "merge" and assignment.method.needs.moments == "input_gram"
    }

    def merged(wanted: Iterable[str], grams: Sequence[Any]) -> Leaves:
        return merge_leaves([{n: assignments[n] for n in wanted}], [leaves, *own], names, weights, grams, seed=0)[0]

    order = runner.order(own[0], data[0])
    group_of = _grouping(groups, order)
    members: dict[str, list[str]] = {}
    for name in order:
        if name in solved:
            members.setdefault(group_of(name), []).append(name)
    _warn_stacked(assignments, order)

    result = leaves | merged([name for name in leaves if name not in solved or name not in order], [None] * len(own))
    pending = set(members)
    for group, kernels in members.items():
        mixed = [{n: tree[n] if group_of(n) in pending else result[n] for n in leaves} for tree in own]
        grams = [runner.grams(tree, runs, kernels) for tree, runs in zip(mixed, data, strict=True)]
        result |= merged(kernels, grams)
        pending.remove(group)
    return unflatten(treedef, result)


class _Runner:
    """The model of either kind, run with other parameters, given by name."""

    def __init__(self, model: Any, treedef: Any, collections: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from flax import linen, nnx

        self.forward: Callable[[Callable[[str], bool]], Forward]
        self.variables: Callable[[Leaves], Any]
        if isinstance(model, linen.Module):
            self.forward = lambda wanted: linen_forward(model, wanted, options)
            self.variables = lambda leaves: {**collections, "params": unflatten(treedef, leaves)}
            return
        if not isinstance(model, nnx.Module):
            raise CfmergeError(f"regmean_pp: the model is neither of linen nor of nnx, but {type(model).__name__}")
        graph, state = nnx.split(model)
        rest, whole = flatten(state)
        self.forward = lambda wanted: nnx_forward(graph, wanted, "__call__", options)
        self.variables = lambda leaves: unflatten(whole, {name: leaves.get(name, leaf) for name, leaf in rest.items()})

    def order(self, leaves: Leaves, batches: Sequence[Any]) -> list[str]:
        """Names of the kernels, in the order of their first calls."""
        forward = self.forward(lambda name: True)

        def orders(variables: Any, batch: Any) -> dict[str, Any]:
            return {name: jnp.min(seen.order) for name, seen in forward(variables, batch).items()}

        if not batches:
            raise CfmergeError("regmean_pp: an expert has no batches")
        found = jax.jit(orders)(self.variables(leaves), batches[0])
        unknown = [name for name in found if name not in leaves]
        if unknown:
            raise CfmergeError(f"inputs were seen of {unknown[0]!r}, which is not among the base's parameters")
        return sorted(found, key=lambda name: int(found[name]))

    def grams(self, leaves: Leaves, batches: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        return normalised(collect(self._compiled(frozenset(names)), self.variables(leaves), batches), leaves)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _compiled(self, names: frozenset[str]) -> Forward:
        return jax.jit(self.forward(lambda name: name in names))


def _assigned(
    leaves: Leaves, method: Method, rules: Sequence[Rule | Mapping[str, Any]], experts: Sequence[str]
) -> dict[str, Assignment]:
    """The action on every parameter, its method with the numbers that are its own."""
    shapes = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
    made = [rule if isinstance(rule, Rule) else parse_rule(dict(rule)) for rule in rules]
    found = assign(classify(shapes), method, made)
    depth_of = depths_of(found)
    return {
        name: dataclasses.replace(a, method=settle(a.method, place(name, depth_of[name], experts)))
        for name, a in found.items()
    }


def _grouping(groups: Any, names: Sequence[str]) -> Callable[[str], str]:
    """`f(name)`: the group of a parameter."""
    if callable(groups):
        return groups
    if groups == "layer":
        return lambda name: name.rpartition("/")[0]
    parts = [name.split("/")[:-1] for name in names]
    common = next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    numbered = re.compile(r"(.*_)?\d+")
    if not any(numbered.fullmatch(part) for path in parts for part in path[common:]):
        common = 0

    def block(name: str) -> str:
        path = name.split("/")[:-1]
        for n, part in enumerate(path):
            if n >= common and numbered.fullmatch(part):
                return "/".join(path[: n + 1])
        return "/".join(path)

    return block


def _warn_stacked(assignments: Mapping[str, Assignment], names: Iterable[str]) -> None:
    stacked = [name for name in names if "b" in assignments[name].parameter.layout]
    if stacked:
        warnings.warn(
            f"{len(stacked)} kernels hold layers that are stacked, such as {stacked[0]!r}: these are merged at once, "
            "as by RegMean; unstack them to merge them one after the other",
            stacklevel=3,
        )
