"""Input Grams of the layers of a Flax model, `X^T X / tokens`, from a few batches: what RegMean and LOT need.

    grams = [collect_linen(model, {"params": expert}, batches) ...]          linen
    grams = [collect_nnx(expert, batches) ...]                               nnx
    cfmerge.merge_params(base, experts, cfmerge.methods.regmean(), moments=grams)

A Gram is named as the kernel that the inputs are multiplied with, and ordered as its canonical view `(out, in)`: a
convolution's inputs are the patches under its window. Seen are the layers Dense, DenseGeneral and Conv of linen,
Linear, LinearGeneral and Conv of nnx, those inside attention among them. Embeddings have no inputs to speak of, and
grouped convolutions no common ones: these are left out.
"""

import contextlib
import fnmatch
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import covariance
from cfmerge.activations.inputs import Seen, see, together, wide
from cfmerge.errors import CfmergeError
from cfmerge.formats import safetensors, shards
from cfmerge.formats.pytree import flatten

Grams = dict[str, Any]  # {kernel's name: (in, in), or (stack, in, in) where layers are stacked}
Forward = Callable[[Any, Any], dict[str, Seen]]  # (variables or state, batch) -> what was seen

FIELD = "cfmerge_inputs"  # of a layer, while the model runs
COLLECTION = "intermediates"  # of linen: models that scan over layers often carry it along
PATCHING = threading.Lock()


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
    from flax import linen, traverse_util

    kinds = (linen.Dense, linen.DenseGeneral, linen.Conv)
    mutable = options.get("mutable") or ()
    mutable = mutable if mutable is True else [COLLECTION, *([mutable] if isinstance(mutable, str) else mutable)]

    def forward(variables: Any, batch: Any) -> dict[str, Seen]:
        order = itertools.count()

        def look(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            known = isinstance(layer, kinds) and context.method_name == "__call__"
            if known and layer.is_mutable_collection(COLLECTION) and wanted("/".join((*layer.path, "kernel"))):
                seen = see(layer, args[0] if args else kwargs["inputs"], order)
                if seen is not None:
                    layer.sow(COLLECTION, FIELD, seen, reduce_fn=together, init_fn=lambda: None)
            return following(*args, **kwargs)

        args, kwargs = _arguments(batch)
        with linen.intercept_methods(look):
            _, changed = model.apply(variables, *args, **kwargs, **{**options, "mutable": mutable})
        flat = traverse_util.flatten_dict(changed.get(COLLECTION, {}))
        return {"/".join((*path[:-1], "kernel")): seen for path, seen in flat.items() if path[-1] == FIELD}

    return forward


def nnx_forward(graph: Any, wanted: Callable[[str], bool], method: str, options: Mapping[str, Any]) -> Forward:
    """`f(state, batch)`: what the wanted kernels of an nnx model are given. To be jitted."""
    from flax import nnx

    def forward(state: Any, batch: Any) -> dict[str, Seen]:
        model = nnx.merge(graph, state)
        args, kwargs = _arguments(batch)
        with _looking_on(nnx, itertools.count()):
            getattr(model, method)(*args, **kwargs, **options)
        found = {
            "/".join(map(str, (*path[:-1], "kernel"))): _value(variable)
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Intermediate))
            if path[-1] == FIELD
        }
        return {name: seen for name, seen in found.items() if wanted(name)}

    return forward


def _value(variable: Any) -> Seen:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # older flax


@contextlib.contextmanager
def _looking_on(nnx: Any, order: Iterator[int]) -> Iterator[None]:
    """While it is open, layers of nnx keep what they are given, in a variable of their own."""
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Conv)

    def looking(call: Any) -> Any:
        @functools.wraps(call)
        def look(layer: Any, *args: Any, **kwargs: Any) -> Any:
            seen = see(layer, args[0] if args else kwargs["inputs"], order)
            if seen is not None:
                known = getattr(layer, FIELD, None)
                setattr(layer, FIELD, nnx.Intermediate(together(None if known is None else _value(known), seen)))
            return call(layer, *args, **kwargs)

        return look

    with PATCHING:
        calls = [kind.__call__ for kind in kinds]
        try:
            for kind, call in zip(kinds, calls, strict=True):
                kind.__call__ = looking(call)
            yield
        finally:
            for kind, call in zip(kinds, calls, strict=True):
                kind.__call__ = call


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


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
