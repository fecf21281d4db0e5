"""Input Grams of the layers of a Flax model, `X^T X / tokens`, from a few batches: what RegMean and LOT need.

    grams = [collect_linen(model, {"params": expert}, batches) ...]          linen
    grams = [collect_nnx(expert, batches) ...]                               nnx
    cfmerge.merge_params(base, experts, cfmerge.methods.regmean(), moments=grams)

A Gram is named as the kernel that the inputs are multiplied with, and ordered as its canonical view `(out, in)`: a
convolution's inputs are the patches under its window. Seen are the layers Dense, DenseGeneral and Conv of linen,
Linear, LinearGeneral and Conv of nnx, those inside attention among them. Embeddings have no inputs to speak of, and
grouped convolutions no common ones: these are left out.
"""

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import covariance
from cfmerge.activations.inputs import Seen, see, together, wide
from cfmerge.activations.looking import LINEAR, Call, Forward, Look, in_linen, in_nnx, kernel_of
from cfmerge.errors import CfmergeError
from cfmerge.formats import safetensors, shards
from cfmerge.formats.pytree import flatten

Grams = dict[str, Any]  # {kernel's name: (in, in), or (stack, in, in) where layers are stacked}


def collect_linen(
    model: Any, variables: Any, batches: Iterable[Any], *, match: str = "*", prefix: str = "", **options: Any
) -> Grams:
    """Input Grams of a linen model, named as in `variables["params"]`.

    Args:
        model: the `flax.linen.Module`.
        variables: of one expert, as for `model.apply`: `{"params": ...}`.
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        match: which kernels, by name.
        prefix: put before each name, such as `"params/"` if all of `variables` is to be merged.
        options: of `model.apply`, the same for all batches: `method`, `rngs`, `train=False`, ...

    Raises:
        CfmergeError: no batches, or no layer that is known.
    """
    forward = jax.jit(linen_forward(model, lambda name: fnmatch.fnmatchcase(name, match), options))
    return normalised(collect(forward, variables, batches), flatten(variables["params"])[0], prefix)


def collect_nnx(
    model: Any, batches: Iterable[Any], *, match: str = "*", method: str = "__call__", **options: Any
) -> Grams:
    """Input Grams of an nnx model, named as in `nnx.state(model)`. The model itself is left as it is.

    Args:
        model: the `nnx.Module` of one expert, in the mode in which it is to run (`model.eval()`).
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        match: which kernels, by name.
        method: the method that is called.
        options: arguments by name that are the same for all batches.

    Raises:
        CfmergeError: no batches, or no layer that is known.
    """
    from flax import nnx

    graph, state = nnx.split(model)
    forward = jax.jit(nnx_forward(graph, lambda name: fnmatch.fnmatchcase(name, match), method, options))
    return normalised(collect(forward, state, batches), flatten(state)[0])


def gram_of(activations: Any) -> Any:
    """`X^T X / tokens` of saved inputs: an array `(..., in)`, a mapping of such, or a safetensors file of such."""
    if isinstance(activations, str | Path):
        activations = load(activations)
    if isinstance(activations, Mapping):
        return {name: gram_of(array) for name, array in activations.items()}
    rows = jnp.asarray(activations)
    if rows.ndim < 2:
        raise CfmergeError(f"activations must have shape (tokens, in), found {rows.shape}")
    return covariance.from_activations(wide(rows).reshape(-1, rows.shape[-1]))


def save(grams: Mapping[str, Any], path: str | Path) -> None:
    """Writes Grams as one safetensors file, under their names.

    Raises:
        CfmergeError: it exists, or is not called `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.exists():
        raise CfmergeError(f"{path}: " + ("exists already" if path.exists() else "must be called .safetensors"))
    shards.save(path.parent, {name: np.asarray(g) for name, g in grams.items()}, {"holds": "input_gram"}, path.stem)


def load(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by name."""
    file = safetensors.SafetensorsFile(Path(path))
    return {name: np.array(file.read(name)) for name in file.tensors}


# --- running a model, and looking on ------------------------------------------------------------------------------


def linen_forward(model: Any, wanted: Callable[[str], bool], options: Mapping[str, Any]) -> Forward:
    """`f(variables, batch)`: what the wanted kernels of a linen model are given. To be jitted."""
    return _named(in_linen(model, LINEAR, lambda: _look(wanted), together, options), wanted)


def nnx_forward(graph: Any, wanted: Callable[[str], bool], method: str, options: Mapping[str, Any]) -> Forward:
    """`f(state, batch)`: what the wanted kernels of an nnx model are given. To be jitted."""
    return _named(in_nnx(graph, LINEAR, lambda: _look(wanted), together, method, options), wanted)


def _look(wanted: Callable[[str], bool]) -> Look:
    order = itertools.count()

    def look(call: Call) -> tuple[Any, Seen | None]:
        own = call.name is None or wanted(kernel_of(call.name))
        seen = see(call.layer, call.inputs, order) if own else None
        return call.run(), seen

    return look


def _named(forward: Forward, wanted: Callable[[str], bool]) -> Forward:
    def named(variables: Any, batch: Any) -> dict[str, Seen]:
        found = {kernel_of(name): seen for name, seen in forward(variables, batch).items()}
        return {name: seen for name, seen in found.items() if wanted(name)}

    return named


def collect(forward: Forward, variables: Any, batches: Iterable[Any]) -> dict[str, Seen]:
    """Sums over the batches."""
    total: dict[str, Seen] = {}
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        for name, seen in forward(variables, batch).items():
            total[name] = together(total.get(name), seen)
    if not total:
        layers = "no layer that is wanted was called: known are Dense, DenseGeneral and Conv, Linear and LinearGeneral"
        raise CfmergeError("no batches: Grams need at least one" if count == 0 else layers)
    return total


def normalised(total: Mapping[str, Seen], leaves: Mapping[str, Any], prefix: str = "") -> Grams:
    """`X^T X / tokens`; what belongs to the same kernel (a layer called in a loop over time) is added."""
    grams = {}
    for name, seen in total.items():
        if name not in leaves:
            raise CfmergeError(f"inputs were seen of {name!r}, which is not among the parameters")
        gram, tokens = seen.gram, seen.tokens
        tokens = tokens.reshape(tokens.shape + (1,) * (gram.ndim - tokens.ndim))
        stacked = leaves[name].ndim - int(np.ravel(seen.axes)[0])
        if stacked == 0:
            axes = tuple(range(gram.ndim - 2))
            gram, tokens = gram.sum(axis=axes), jnp.broadcast_to(tokens, (*gram.shape[:-2], 1, 1)).sum(axis=axes)
        elif stacked != gram.ndim - 2:
            raise CfmergeError(f"{name!r}: Grams of shape {gram.shape} do not fit its shape {leaves[name].shape}")
        gram = gram / jnp.maximum(tokens, 1)
        one = math.prod(gram.shape[:-2]) == 1
        grams[prefix + name] = gram.reshape(*(() if one else (-1,)), *gram.shape[-2:])
    return grams
