"""SMILE in Flax: `upscale` for a model of NNX, `apply` for linen and for functions that run linen inside.

    layers = {"encoder/0/mlp/kernel": smile.Layer(up, down, router, bias), ...}     named as in merge_params
    model = upscale(base_model, layers)                                             nnx
    logits = apply(base_model, params, layers, tokens)                              linen

Layers that can be upscaled are Linear and LinearGeneral of NNX, Dense and DenseGeneral of linen, those inside
attention among them; several input axes, or several output axes, count as one each, in the kernel's order.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array

from cfmerge.compose import smile
from cfmerge.compose.smile import Layer
from cfmerge.compose.smile_layers import check_layer
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten

LINEAR = (nnx.Linear, nnx.LinearGeneral)
DENSE = (linen.Dense, linen.DenseGeneral)


# --- NNX ---------------------------------------------------------------------------------------------------------


class Expert(nnx.Variable):
    """An array of experts: no `nnx.Param`, so that an optimiser of those leaves it alone."""


class Experts(nnx.Module):
    """The arrays of a `Layer` as variables; called, what they add to the base layer's output."""

    def __init__(self, layer: Layer, top_k: int = 1):
        self.up, self.router = Expert(layer.up), Expert(layer.router)
        self.down = nnx.data(None) if layer.down is None else Expert(layer.down)
        self.bias = nnx.data(None) if layer.bias is None else Expert(layer.bias)
        self.top_k = top_k

    def layer(self) -> Layer:
        """The arrays."""
        down, bias = (None if part is None else part[...] for part in (self.down, self.bias))
        return Layer(self.up[...], down, self.router[...], bias)


class SmileLinear(nnx.Module):
    """A linear layer of NNX, `base`, and its `experts`: called as the base is, in the base's dtype and precision."""

    def __init__(self, base: nnx.Linear | nnx.LinearGeneral, layer: Layer, top_k: int = 1):
        self.base, self.experts = base, Experts(layer, top_k)

    def __call__(self, inputs: Array, **options: Any) -> Array:
        out = self.base(inputs, **options)
        return _with_experts(self.base, inputs, out, self.experts.layer(), self.experts.top_k)

    @property
    def kernel(self) -> Any:
        return self.base.kernel

    @property
    def bias(self) -> Any:
        return self.base.bias


def upscale(model: nnx.Module, layers: Mapping[str, Layer], top_k: int = 1, copy: bool = True) -> Any:
    """A new model in which each linear layer that is named has its experts; the given one stays as it is.

    A layer's variables are then called `.../base/kernel`, `.../experts/up` and so on. Under `nnx.scan` or `nnx.vmap`
    over stacked layers, `Expert` is to be split along axis 0, as `nnx.Param` is.

    Args:
        layers: by the full names of their kernels in `nnx.state(model)`, as `cfmerge.merge_params` names them; a layer
            used in several places has the name of the first. Stacked kernels have stacked arrays.
        top_k: how many experts each token has in each layer.
        copy: whether the new model has variables of its own; False: it shares them with the given one, so that
            training one of them trains both. Either way the arrays themselves take no memory twice.

    Raises:
        CfmergeError: a name that is not a linear layer's, or arrays that do not fit it.
    """
    found: dict[str, Any] = {}

    def replaced(path: tuple[Any, ...], node: Any) -> Any:
        if not (isinstance(node, nnx.Module) and hasattr(node, "kernel")):
            return node
        name = "/".join(map(str, (*path, "kernel")))
        found[name] = node
        if name not in layers or not isinstance(node, LINEAR):
            return node
        _check(name, layers[name], node, node.kernel.shape, top_k)
        return SmileLinear(node, layers[name], top_k)

    made = nnx.recursive_map(replaced, nnx.clone(model) if copy else model)
    _check_names(layers, {name for name, node in found.items() if isinstance(node, LINEAR)}, found)
    return made


# --- linen, and functions that run linen -------------------------------------------------------------------------


def apply(
    model: linen.Module | Callable[..., Any],
    params: Any,
    layers: Mapping[str, Layer],
    *inputs: Any,
    top_k: int = 1,
    **options: Any,
) -> Any:
    """What the model returns for the inputs when each linear layer that is named has its experts.

    For linen, whose models are functions of their parameters: nothing is changed, and `jit`, `vmap` and `grad` work
    over all of it. Layers that linen scans over (`nn.scan`) are not covered, as all of them have one name.

    Args:
        model: a linen module, or a function `f(params, *inputs, **options)` that runs one, `model.apply` for one.
        params: the base's: `variables["params"]`, or for a module all of `variables`.
        layers: by the full names of their kernels in `params`, as `cfmerge.merge_params` names them.
        inputs: of `model.apply` behind the variables, as the options are.

    Raises:
        CfmergeError: a name that is not a linear layer's, or arrays that do not fit it.
    """
    inner = params["params"] if isinstance(params, Mapping) and "params" in params else params
    kernels = flatten(inner)[0]
    _check_names(layers, {name for name in kernels if name.endswith("kernel")}, {})

    def add(following: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out, dense = following(*args, **kwargs), context.module
        name = "/".join((*dense.path, "kernel"))
        if context.method_name != "__call__" or name not in layers:
            return out
        if not isinstance(dense, DENSE):
            _check_names(layers, kernels.keys() - {name}, {name: dense})
        _check(name, layers[name], dense, kernels[name].shape, top_k)
        return _with_experts(dense, args[0] if args else kwargs["inputs"], out, layers[name], top_k)

    with linen.intercept_methods(add):
        if not isinstance(model, linen.Module):
            return model(params, *inputs, **options)
        return model.apply(params if inner is not params else {"params": params}, *inputs, **options)


# --- both --------------------------------------------------------------------------------------------------------


def _with_experts(linear: Any, inputs: Array, out: Array, layer: Layer, top_k: int) -> Array:
    """The output of a linear layer, and what its experts add to it, in the output's dtype."""
    axes = [axis % inputs.ndim for axis in _tuple(getattr(linear, "axis", -1))]
    rows = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
    rows = rows.reshape(*rows.shape[: -len(axes)], -1)
    down, bias = (None if part is None else part.astype(out.dtype) for part in (layer.down, layer.bias))
    layer = Layer(layer.up.astype(out.dtype), down, layer.router, bias)
    added = smile.added(rows.astype(out.dtype), layer, top_k, linear.precision)
    return out + added.reshape(out.shape)


def _check(name: str, layer: Layer, linear: Any, kernel: tuple[int, ...], top_k: int) -> None:
    """Raises an error unless a layer's arrays fit a linear layer whose kernel has this shape."""
    if getattr(linear, "batch_axis", None) or getattr(linear, "batch_dims", None):
        raise CfmergeError(f"smile: {name!r} has axes that are a batch of kernels, which have no experts yet")
    inputs = len(_tuple(getattr(linear, "axis", -1)))
    outputs = len(_tuple(linear.out_features if hasattr(linear, "out_features") else linear.features))
    own = kernel[-inputs - outputs :]
    stacked = kernel[: -inputs - outputs]
    if stacked and isinstance(linear, linen.Module):
        raise CfmergeError(f"smile: {name!r} holds {stacked[0]} stacked layers, over which linen scans: not covered")
    check_layer(name, layer, kernel, math.prod(own[inputs:]), math.prod(own[:inputs]), stacked)
    smile.check_top_k(top_k, layer.router.shape[-3])


def _check_names(layers: Iterable[str], linear: Iterable[str], others: Mapping[str, Any]) -> None:
    """Raises an error if a layer is none of the linear ones; others have kernels, and are of another kind."""
    linear = set(linear)
    unknown = [name for name in layers if name not in linear]
    if not unknown:
        return
    name, more = unknown[0], f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    if name in others:
        kind = type(others[name]).__name__
        raise CfmergeError(
            f"smile: {name!r}{more} is a {kind}'s kernel; layers that have experts are linear: leave it out"
        )
    raise CfmergeError(f"smile: {name!r}{more} is not the kernel of a linear layer of the model{nearest(name, linear)}")


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
