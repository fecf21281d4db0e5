"""Running statistics of BatchNorm, estimated again from batches: those of a merged model are none of the experts'.

    variables = reset_norms_linen(model, {"params": merged, "batch_stats": any}, batches, train=False)
    nnx.update(merged, reset_norms_nnx(merged, batches))

Every BatchNorm normalises by the statistics of the batch while the model runs, as in training, so that the next one is
given what it will be given; the rest of the model runs as it is told to. Over batches of `n_b` tokens of mean `m_b` and
variance `v_b`, with no momentum,

    mean = sum_b n_b m_b / n,       var = sum_b n_b (v_b + m_b^2) / n - mean^2,       n = sum_b n_b

So one batch gives exactly its own statistics, and more batches of a few hundred examples give nearly those of all.
(Izmailov et al., arXiv 1803.05407, section 3.2; Jordan et al., REPAIR, arXiv 2211.08403, section 3.)
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cfmerge.activations.channels import Channels, channels_of, over_batches, together
from cfmerge.activations.looking import NORMS, Call, Look, in_linen, in_nnx
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import flatten, unflatten

STATISTICS = "batch_stats"  # linen's collection
SET_ASIDE = ("use_running_average", "axis_name")  # attributes of a layer that do not hold while it runs as in training


def reset_norms_linen(
    model: Any, variables: Mapping[str, Any], batches: Iterable[Any], *, match: str = "*", **options: Any
) -> dict[str, Any]:
    """The variables of a linen model with running statistics of its BatchNorm layers that are those of the batches.

    Args:
        model: the `flax.linen.Module`.
        variables: as for `model.apply`; the values in `variables["batch_stats"]` do not matter.
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        match: which layers, by name; the others keep their statistics and use them.
        options: of `model.apply`, the same for all batches, such as `train=False`, so that dropout is off: BatchNorm
            uses the batch's statistics all the same.

    Raises:
        CfmergeError: no batches; the model has no BatchNorm; one is never called.
    """
    leaves, treedef = flatten(variables.get(STATISTICS, {}))
    wanted = _wanted(leaves, match, f"variables[{STATISTICS!r}]")
    options = {**options, "mutable": [STATISTICS]}
    forward = jax.jit(in_linen(model, NORMS, lambda: _look(match), together, options))
    found = over_batches(forward, variables, batches)
    return {**variables, STATISTICS: unflatten(treedef, _replaced(leaves, wanted, found))}


def reset_norms_nnx(
    model: Any, batches: Iterable[Any], *, match: str = "*", method: str = "__call__", **options: Any
) -> Any:
    """Running statistics of the BatchNorm layers of an nnx model that are those of the batches, for `nnx.update`.

    Args:
        model: the `nnx.Module`, in the mode in which it is to run (`model.eval()`: dropout is off, and BatchNorm uses
            the batch's statistics all the same); it is left as it is.
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        match: which layers, by name; the others keep their statistics and use them.
        method: the method that is called.
        options: arguments by name that are the same for all batches.

    Returns:
        `nnx.state(model, nnx.BatchStat)` with other values.

    Raises:
        CfmergeError: no batches; the model has no BatchNorm; one is never called.
    """
    from flax import nnx

    graph, state = nnx.split(model)
    leaves, treedef = flatten(nnx.state(model, nnx.BatchStat))
    wanted = _wanted(leaves, match, "nnx.state(model, nnx.BatchStat)")
    forward = jax.jit(in_nnx(graph, NORMS, lambda: _look(match), together, method, options))
    return unflatten(treedef, _replaced(leaves, wanted, over_batches(forward, state, batches)))


def _wanted(leaves: Mapping[str, Any], match: str, where: str) -> list[str]:
    """The names of the layers that match."""
    layers = [name.removesuffix("mean").rstrip("/") for name in leaves if name.rpartition("/")[2] == "mean"]
    found = [name for name in layers if fnmatch.fnmatchcase(name, match)]
    if not found:
        told = f"none matches {match!r}; there is: {', '.join(layers)}" if layers else f"there is none in {where}"
        raise CfmergeError(f"BatchNorm's statistics cannot be estimated: {told}")
    return found


def _look(match: str) -> Look:
    def look(call: Call) -> tuple[Any, Channels | None]:
        if call.name is not None and not fnmatch.fnmatchcase(call.name, match):
            return call.run(), None
        axes = call.layer.axis
        own = channels_of(call.inputs, (axes,) if isinstance(axes, int) else tuple(axes), call.options.get("mask"))
        with _as_in_training(call.layer):
            return call.run(use_running_average=False), own

    return look


@contextlib.contextmanager
def _as_in_training(layer: Any) -> Iterator[None]:
    """While it is open, a layer takes `use_running_average` from its call alone, and is not one of several devices'."""
    before = {name: getattr(layer, name) for name in SET_ASIDE}
    try:
        for name in SET_ASIDE:
            object.__setattr__(layer, name, None)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


def _replaced(leaves: Mapping[str, Any], wanted: list[str], found: Mapping[str, Channels]) -> dict[str, Any]:
    unseen = [name for name in wanted if name not in found]
    if unseen:
        raise CfmergeError(
            f"BatchNorm's statistics cannot be estimated: layer {and_more([repr(name) for name in unseen])} was not "
            "called on these batches; choose the layers by match"
        )
    result = dict(leaves)
    for name in wanted:
        for part, value in (("mean", found[name].mean), ("var", found[name].variance)):
            leaf = leaves[f"{name}/{part}" if name else part]
            result[f"{name}/{part}" if name else part] = jnp.asarray(value.reshape(leaf.shape), leaf.dtype)
    return result
