"""Layers that a model stacks in one array, as `scan` does: which axis of a tensor is theirs.

A norm's `scale` has one axis. Where it has two, one of them is that of the layers, and every tensor below the same
module has an axis of that length at the same place: the first as Flax stacks by default, the second in MaxText.
"""

import re
from collections.abc import Iterator, Mapping

from cfmerge.models.layouts import Shape

Shapes = Mapping[str, tuple[Shape, str]]
SCALE = re.compile(r"(^|[./])scale$")


def unstacked(shapes: Shapes) -> tuple[dict[str, tuple[Shape, str]], dict[str, int]]:
    """The shapes without the axis of stacked layers, and `{name: that axis}` of the tensors that have one."""
    prefixes = _stacked_prefixes(shapes)
    axes = {}
    for name, (shape, _) in shapes.items():
        axis = next((axis for prefix, axis in prefixes.items() if name.startswith(prefix)), None)
        if axis is not None:
            axes[name] = min(axis, len(shape) - 1)
    inner = {
        name: (shape if name not in axes else shape[: axes[name]] + shape[axes[name] + 1 :], dtype)
        for name, (shape, dtype) in shapes.items()
    }
    return inner, axes


def _stacked_prefixes(shapes: Shapes) -> dict[str, int]:
    """`{prefix: axis}` of modules all of whose tensors have the axis of the layers."""
    prefixes: dict[str, int] = {}
    for name, (shape, _) in shapes.items():
        if SCALE.search(name) and len(shape) == 2 and not any(name.startswith(prefix) for prefix in prefixes):
            found = [(_stacked_below(name, shapes, axis), shape[axis], axis) for axis in (0, 1)]
            prefix, _, axis = min(found, key=lambda one: (len(one[0]), *one[1:]))  # fewer layers than features
            prefixes[prefix] = axis
    return prefixes


def _stacked_below(scale: str, shapes: Shapes, axis: int) -> str:
    """The shortest prefix of a scale below which every tensor has its length at that axis; one axis may be the only."""
    layers = shapes[scale][0][axis]
    for prefix in _prefixes(scale):
        below = [shape for name, (shape, _) in shapes.items() if name.startswith(prefix)]
        if all(shape and shape[min(axis, len(shape) - 1)] == layers for shape in below):
            return prefix
    return scale


def _prefixes(name: str) -> Iterator[str]:
    """The prefixes of a name that end with a module, from the empty one on."""
    yield ""
    yield from (name[: match.end()] for match in re.finditer(r"[./]", name))
