"""How a tensor lies in its file (its layout), and its canonical view `(out, in)`.

A layout is one letter per axis of the stored tensor: `o` output, `i` input, `b` batch (stacked layers or
experts). Axes of one letter are folded together, in order. So a torch `Linear` is `oi`, a Flax kernel or GPT-2
`Conv1D` is `io`, a torch convolution `oiii`, a Flax one `iiio`, a Flax attention query `(embed, heads, head_dim)`
`ioo`, and dense kernels stacked by `scan` are `bio`. Methods see the canonical view and nothing else.
"""

import math
from typing import Any

from cfmerge.errors import CfmergeError

Shape = tuple[int, ...]


def check_layout(name: str, shape: Shape, layout: str) -> None:
    """Raises `CfmergeError` unless the layout has a letter for every axis, and an `o` and an `i` among them."""
    if len(layout) != len(shape) or set(layout) - set("boi") or not {"o", "i"} <= set(layout):
        raise CfmergeError(
            f"tensor {name!r} of shape {shape} cannot have layout {layout!r}: one letter per axis, "
            "o (output), i (input) or b (stacked), with at least one o and one i"
        )


def to_canonical(tensor: Any, layout: str) -> Any:
    """The stored tensor as `(batch, out, in)`; NumPy or JAX, `batch` is 1 where the layout has no `b`."""
    order = _order(layout)
    shape = _folded(tensor.shape, layout)
    return tensor.transpose(order).reshape(shape)


def from_canonical(canonical: Any, layout: str, shape: Shape) -> Any:
    """The inverse of `to_canonical`."""
    order = _order(layout)
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return canonical.reshape(tuple(shape[axis] for axis in order)).transpose(inverse)


def matrices_first(tensor: Any, layout: str) -> Any:
    """The stored tensor with its stacked axes as one, the first."""
    stacked = tuple(axis for axis, at in enumerate(layout) if at == "b")
    moved = tensor.transpose((*stacked, *(axis for axis in range(tensor.ndim) if axis not in stacked)))
    return moved.reshape(-1, *moved.shape[len(stacked) :])


def matrices_back(first: Any, layout: str, shape: Shape) -> Any:
    """The inverse of `matrices_first`, for a stored tensor of that shape."""
    stacked = tuple(axis for axis, at in enumerate(layout) if at == "b")
    order = (*stacked, *(axis for axis in range(len(layout)) if axis not in stacked))
    apart = first.reshape(tuple(shape[axis] for axis in order))
    return apart.transpose(tuple(order.index(axis) for axis in range(len(layout))))


def _order(layout: str) -> tuple[int, ...]:
    return tuple(axis for letter in "boi" for axis, at in enumerate(layout) if at == letter)


def _folded(shape: Shape, layout: str) -> tuple[int, int, int]:
    b, o, i = (math.prod(size for size, at in zip(shape, layout, strict=True) if at == letter) for letter in "boi")
    return b, o, i
