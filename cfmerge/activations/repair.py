r"""REPAIR: a merged network whose channels vary as those of its parents do.

Jordan, Sedghi, Saukh, Entezari, Neyshabur, *REPAIR: REnormalizing Permuted Activations for Interpolation Repair*,
arXiv 2211.08403, ICLR 2023. Averaged networks, aligned or not, have activations that vary too little, the less the
deeper the layer. For every layer and channel, with pre-activations `h` on the batches, and weights `w_e` of the
endpoints that sum to 1,

    mu = sum_e w_e E[h_e],    sigma = sum_e w_e std[h_e]                        goals, of the aligned endpoints
    h' = (h - E[h]) sigma / std[h] + mu                                         in the merged network

which is folded into kernel and bias. The statistics of the merged network are taken in one run, each layer being given
what the repaired layers before it make, as BatchNorm does in training: exact for one batch, nearly so for several.
A network with BatchNorm has its goals in it; `reset_norms_linen` and `reset_norms_nnx` are REPAIR for it.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.activations.channels import Channels, channels_of, over_batches, together
from cfmerge.activations.looking import LINEAR, Call, Forward, Look, in_linen, in_nnx, kernel_of
from cfmerge.activations.norms import STATISTICS
from cfmerge.activations.readers import prefix_of
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.models.spaces import Spaces

Goal = tuple[Any, Any]  # mean and standard deviation of every channel
Leaves = Mapping[str, Any]
NORMED = "the model has BatchNorm, and is repaired by new statistics of it"
DEAD = 1e-5  # a channel that varies less than so much of its mean, or of its goal, is left to vary as it does


def repair_linen(
    model: Any,
    merged: Mapping[str, Any],
    endpoints: Sequence[Any],
    batches: Iterable[Any],
    spaces: Spaces | None = None,
    *,
    match: str | Sequence[str] = "*",
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The variables of a merged linen model whose channels have mean and deviation of those of its parents.

    Args:
        model: the `flax.linen.Module`.
        merged: its variables, `{"params": ...}`.
        endpoints: variables of each model that was merged, aligned: in the order of the merged model's neurons.
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        spaces: repaired are the layers that write a space, so not the last one; none: all that match.
        match: which kernels, by name: a pattern or several.
        weights: of the endpoints, as they were merged; none: all alike.
        options: of `model.apply`, the same for all batches: `train=False`, ...

    Returns:
        `merged` with other kernels and biases. A layer without bias has the goal's deviation, not its mean; a warning
        says so.

    Raises:
        CfmergeError: no batches; a layer that is not called, or is stacked by a scan; endpoints of other widths; a
            model with BatchNorm.
    """
    for one in (merged, *endpoints):
        if "params" not in one:
            raise CfmergeError(f"repair: expected variables {{'params': ...}}, found a tree of {', '.join(one)}")
    if merged.get(STATISTICS):
        raise CfmergeError(f"repair: {NORMED}: cfmerge.activations.reset_norms_linen(model, merged, batches)")
    leaves, treedef = flatten(merged["params"])
    for number, endpoint in enumerate(endpoints):
        _check_shapes(leaves, flatten(endpoint["params"])[0], number)

    def forward(look: Callable[..., Look]) -> Forward:
        return jax.jit(in_linen(model, LINEAR, look, together, options))

    repaired = _repaired(forward, merged, endpoints, list(batches), leaves, _wanted(leaves, spaces, match), weights)
    return {**merged, "params": unflatten(treedef, repaired)}


def repair_nnx(
    model: Any,
    endpoints: Sequence[Any],
    batches: Iterable[Any],
    spaces: Spaces | None = None,
    *,
    match: str | Sequence[str] = "*",
    weights: Sequence[float] | None = None,
    method: str = "__call__",
    **options: Any,
) -> Any:
    """Parameters for a merged nnx model whose channels have mean and deviation of those of its parents.

    Args:
        model: the merged `nnx.Module`, in the mode in which it is to run (`model.eval()`); it is left as it is.
        endpoints: the `nnx.Module` of each model that was merged, aligned, in the same mode.
        batches, spaces, match, weights: as for `repair_linen`.
        method: the method that is called.
        options: arguments by name that are the same for all batches.

    Returns:
        `nnx.state(model, nnx.Param)` with other kernels and biases, for `nnx.update`.

    Raises:
        CfmergeError: as `repair_linen`; an endpoint of another architecture.
    """
    from flax import nnx

    if nnx.state(model, nnx.BatchStat):
        raise CfmergeError(f"repair: {NORMED}: nnx.update(model, cfmerge.activations.reset_norms_nnx(model, batches))")
    leaves, treedef = flatten(nnx.state(model, nnx.Param))
    graph, state = nnx.split(model)
    states = []
    for number, endpoint in enumerate(endpoints):
        other, own = nnx.split(endpoint)
        _check_shapes(leaves, flatten(nnx.state(endpoint, nnx.Param))[0], number)
        if other != graph:
            raise CfmergeError(
                f"repair: endpoint {number} is of another architecture or in another mode than the merged"
            )
        states.append(own)

    def forward(look: Callable[..., Look]) -> Forward:
        return jax.jit(in_nnx(graph, LINEAR, look, together, method, options))

    repaired = _repaired(forward, state, states, list(batches), leaves, _wanted(leaves, spaces, match), weights)
    return unflatten(treedef, repaired)


def _wanted(leaves: Leaves, spaces: Spaces | None, match: str | Sequence[str]) -> list[str]:
    """The layers whose kernels match, and write a space."""
    patterns = [match] if isinstance(match, str) else match
    kernels = [
        name
        for name in leaves
        if name.rpartition("/")[2] == "kernel" and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if spaces is not None:
        prefix = prefix_of(leaves, spaces)
        kernels = [n for n in kernels if any(axis.spaces and not axis.reads for axis in spaces.axes[prefix + n])]
    if not kernels:
        raise CfmergeError(f"repair: no kernel that {'writes a space' if spaces else 'is'} matches {match!r}")
    return [name.removesuffix("kernel").removesuffix("/") for name in kernels]


def _repaired(
    forward: Callable[[Callable[..., Look]], Forward],
    merged: Any,
    endpoints: Sequence[Any],
    batches: Sequence[Any],
    leaves: Leaves,
    wanted: Sequence[str],
    weights: Sequence[float] | None,
) -> dict[str, Any]:
    watch = forward(lambda: _look(wanted, {}))
    goals = _goals([over_batches(watch, own, batches) for own in endpoints], wanted, weights)
    now = over_batches(forward(lambda goals: _look(wanted, goals)), merged, batches, goals)
    return _folded(leaves, now, goals)


def _look(wanted: Sequence[str], goals: Mapping[str, Goal]) -> Look:
    """Keeps the statistics of the wanted layers' outputs, and gives those that have a goal its mean and deviation."""

    def look(call: Call) -> tuple[Any, Channels | None]:
        outputs = call.run()
        if call.name is None or call.name not in wanted:
            return outputs, None
        found = channels_of(outputs, tuple(range(-_outer(call.layer), 0)))
        if call.name in goals:
            scale, shift = _change(found, goals[call.name], call.layer.use_bias)
            outputs = (outputs * scale + shift).astype(outputs.dtype)
        return outputs, found

    return look


def _outer(layer: Any) -> int:
    """How many axes the channels of a layer's outputs are."""
    features = getattr(layer, "out_features" if hasattr(layer, "out_features") else "features")
    return 1 if isinstance(features, int) else len(features)


def _change(found: Channels, goal: Goal, bias: bool) -> tuple[Any, Any]:
    """`(a, b)` such that `a h + b` has the goal's mean and deviation; `b` is 0 without a bias to hold it."""
    mean, deviation = goal
    scale = jnp.where(_alive(found, goal), deviation / jnp.sqrt(jnp.maximum(found.variance, 1e-30)), 1.0)
    return scale, mean - scale * found.mean if bias else jnp.zeros_like(scale)


def _alive(found: Channels, goal: Goal) -> Any:
    return found.variance > DEAD**2 * jnp.maximum(jnp.square(found.mean), jnp.square(goal[1]))


def _goals(
    found: Sequence[Mapping[str, Channels]], wanted: Sequence[str], weights: Sequence[float] | None
) -> dict[str, Goal]:
    """The endpoints' means and deviations, averaged."""
    shares = np.ones(len(found)) if weights is None else np.asarray(weights, np.float64)
    if len(shares) != len(found) or not len(found) or not np.sum(shares) > 0:
        raise CfmergeError(f"repair: {len(found)} endpoints and weights {weights}; give a weight for each")
    shares = shares / shares.sum()
    goals = {}
    for name in wanted:
        own = [statistics[name] for statistics in found if name in statistics]
        if len(own) < len(found) or np.ndim(own[0].tokens):
            why = (
                "is stacked by a scan"
                if own
                else "was not called as Dense, DenseGeneral or Conv, Linear or LinearGeneral"
            )
            raise CfmergeError(f"repair: layer {name!r} {why}; leave its kernel out by spaces or match")
        mean = sum(share * one.mean for share, one in zip(shares, own, strict=True))
        deviation = sum(share * np.sqrt(one.variance) for share, one in zip(shares, own, strict=True))
        goals[name] = (jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32))
    return goals


def _folded(leaves: Leaves, now: Mapping[str, Channels], goals: Mapping[str, Goal]) -> dict[str, Any]:
    """The parameters with each layer's change in its kernel and bias."""
    result, unbiased, dead = dict(leaves), [], []
    for name, goal in goals.items():
        kernel, bias = kernel_of(name), kernel_of(name).removesuffix("kernel") + "bias"
        scale, shift = _change(now[name], goal, bias in leaves)
        result[kernel] = (leaves[kernel] * scale).astype(leaves[kernel].dtype)
        if bias in leaves:
            result[bias] = (leaves[bias] * scale + shift).astype(leaves[bias].dtype)
        else:
            unbiased.append(kernel)
        if not np.all(_alive(now[name], goal) | (goal[1] == 0)):
            dead.append(kernel)
    if unbiased:
        warnings.warn(f"repair: {and_more(unbiased)} has no bias: its channels get their deviation alone", stacklevel=4)
    if dead:
        warnings.warn(
            f"repair: {and_more(dead)} has channels that never change: they get their mean alone", stacklevel=4
        )
    return result


def _check_shapes(leaves: Leaves, endpoint: Leaves, number: int) -> None:
    wrong = [name for name in leaves if name not in endpoint or endpoint[name].shape != leaves[name].shape]
    if wrong:
        found = endpoint[wrong[0]].shape if wrong[0] in endpoint else "nothing"
        raise CfmergeError(
            f"repair: endpoint {number}: {wrong[0]!r} is {found}, expected {leaves[wrong[0]].shape} as in the merged "
            "model: endpoints have its neurons in its order"
        )
