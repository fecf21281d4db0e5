"""The inputs of a layer in one call: their Gram, by the layer's kind."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from cfmerge import linalg


class Seen(NamedTuple):
    """The inputs of one layer: `gram = X^T X`, their number, the layer's place in the order of first calls.

    `axes` is how many axes the layer's own kernel has: those in front of them are stacked layers.
    """

    gram: Any
    tokens: Any
    order: Any
    axes: Any


def see(layer: Any, inputs: Any, order: Iterator[int]) -> Seen | None:
    """The inputs of a layer, linen or nnx, in one call; None if it has no common input matrix."""
    if hasattr(layer, "kernel_size"):
        if layer.feature_group_count != 1:
            return None
        rows, own = _patches(layer, wide(inputs)), len(_tuple(layer.kernel_size)) + 2
    else:
        stacked = len(getattr(layer, "batch_dims", ()) or getattr(layer, "batch_axis", ()))
        rows, inner = _contracted(layer, wide(inputs))
        rows = rows.reshape(*rows.shape[:stacked], -1, rows.shape[-1])
        own = inner + len(_tuple(getattr(layer, "out_features" if hasattr(layer, "out_features") else "features")))
    tokens = jnp.asarray(rows.shape[-2], rows.dtype)
    return Seen(linalg.matmul(rows.mT, rows), tokens, jnp.asarray(next(order)), jnp.asarray(own))


def rows_of(layer: Any, inputs: Any) -> Any:
    """The inputs of a layer as `(tokens, width)`, of a convolution every place's channels; None if it is grouped."""
    if hasattr(layer, "kernel_size"):
        return inputs.reshape(-1, inputs.shape[-1]) if layer.feature_group_count == 1 else None
    rows, _ = _contracted(layer, inputs)
    return rows.reshape(-1, rows.shape[-1])


def _contracted(layer: Any, inputs: Any) -> tuple[Any, int]:
    """The inputs with the axes that a dense layer sums over as the last one, and how many they are."""
    axes = sorted(axis % inputs.ndim for axis in _tuple(getattr(layer, "axis", -1)))
    rows = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
    return rows.reshape(*rows.shape[: -len(axes)], math.prod(inputs.shape[axis] for axis in axes)), len(axes)


def _patches(layer: Any, inputs: Any) -> Any:
    """`(tokens, window * channels)`: the layer's own convolution with the identity as kernel, so padded as it pads."""
    from flax import linen

    size, channels = _tuple(layer.kernel_size), inputs.shape[-1]
    width = math.prod(size) * channels
    convolution = linen.Conv(
        width,
        size,
        layer.strides,
        layer.padding,
        layer.input_dilation,
        layer.kernel_dilation,
        use_bias=False,
        precision=linalg.HIGHEST,
        parent=None,
    )
    kernel = jnp.eye(width, dtype=inputs.dtype).reshape(*size, channels, width)
    patches: Any = convolution.apply({"params": {"kernel": kernel}}, inputs)
    return patches.reshape(-1, width)


def wide(array: Any) -> Any:
    """The array in float32 at least."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def together(known: Seen | None, seen: Seen) -> Seen:
    """One layer's inputs of several calls."""
    if known is None:
        return seen
    order = jnp.minimum(known.order, seen.order)
    return Seen(known.gram + seen.gram, known.tokens + seen.tokens, order, seen.axes)
