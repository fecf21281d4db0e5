"""Arrays that lie on several devices: merged one tensor at a time, as they lie.

    merged = automatic(merge, inputs, homes)    `merge(inputs)` where XLA decides on shardings, its results as `homes`
    layout_of(arrays)                           how one tensor lies while it is merged
    spread(shape, mesh)                         a sharding for an array that has none

Methods and linear algebra are written for one device. Where the axes of a mesh are Auto, XLA cuts that code for
several; where they are Explicit, the default of `jax.make_mesh`, every product would have to say how its result lies.
So the axes of the caller's mesh are Auto inside, and Explicit again behind; this moves nothing. Manual axes, those of
`shard_map` and `pmap`, stay as they are: there each device merges its own.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

# --- meshes -------------------------------------------------------------------------------------------------------


def automatic(function: Callable[[Any], Any], inputs: Any, homes: Callable[[Any, Any], Any]) -> Any:
    """`function(inputs)`, called where no mesh has Explicit axes, and its arrays laid out as `homes` says.

    Args:
        inputs: a pytree of all arrays that the function sees; it may close over none.
        homes: `homes(result, mesh)`, given the mesh with Explicit axes, or None: a tree like the result of shardings,
            None for an array that stays as it is.
    """
    leaves = jax.tree.leaves(inputs)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    here = jax.sharding.get_abstract_mesh()
    if here.empty and traced:  # under `jit` alone the types say which mesh it is
        here = next(filter(_is_explicit, map(_mesh, leaves)), here)
    mesh = here if _is_explicit(here) else None
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(_freed_mesh(mesh)):
        result = function(jax.tree.map(_freed, inputs))
    return jax.tree.map(lambda leaf, where: _laid(leaf, where, mesh), result, homes(result, mesh))


class Outside(Mapping[str, Any]):
    """A mapping of trees that are made when they are asked for: in the context of now, and then with Auto axes."""

    def __init__(self, trees: Mapping[str, Any]) -> None:
        self._trees, self._mesh = trees, jax.sharding.get_abstract_mesh()

    def __getitem__(self, name: str) -> Any:
        with contextlib.nullcontext() if self._mesh.empty else jax.sharding.use_abstract_mesh(self._mesh):
            tree = self._trees[name]
        return jax.tree.map(_freed, tree)

    def __iter__(self) -> Iterator[str]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)


def home(array: Any, mesh: Any) -> Sharding | None:
    """Where the result lies whose base this is: where it does; None if no place was chosen for it."""
    if isinstance(array, jax.core.Tracer):
        own = jax.typeof(array).sharding
        return None if mesh is None else own if _is_explicit(own.mesh) else NamedSharding(mesh, PartitionSpec())
    return array.sharding if isinstance(array, jax.Array) and (array.committed or is_spread(array)) else None


def nowhere(result: Any, mesh: Any) -> None:
    """The home of a result that holds no array."""


def _mesh(leaf: Any) -> Any:
    return jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None


def _is_explicit(mesh: Any) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _freed_mesh(mesh: Any) -> Any:
    """The mesh with Auto axes where they were Explicit."""
    kinds = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
    return mesh.update_axis_types(dict(zip(mesh.axis_names, kinds, strict=True)))


def _freed(leaf: Any) -> Any:
    """The array with Auto axes, where it lies."""
    if not _is_explicit(_mesh(leaf)):
        return leaf
    if isinstance(leaf, jax.core.Tracer):
        return jax.reshard(leaf, PartitionSpec(*[None] * leaf.ndim))
    mesh = leaf.sharding.mesh
    auto = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=_freed_mesh(mesh.abstract_mesh).axis_types)
    return jax.device_put(leaf, NamedSharding(auto, leaf.sharding.spec))


def _laid(leaf: Any, where: Sharding | None, mesh: Any) -> Any:
    """A result where it belongs, with the Explicit axes of the mesh, if it has such."""
    if isinstance(leaf, jax.core.Tracer):
        return leaf if mesh is None else jax.reshard(leaf, where or NamedSharding(mesh, PartitionSpec()))
    if where is not None:
        return jax.device_put(leaf, where)
    own = getattr(leaf, "sharding", None)
    if mesh is None or not isinstance(own, NamedSharding) or own.mesh.abstract_mesh != _freed_mesh(mesh):
        return leaf
    return jax.device_put(leaf, NamedSharding(jax.sharding.get_mesh(), own.spec))


# --- layouts ------------------------------------------------------------------------------------------------------


def is_spread(array: Any) -> bool:
    """Whether an array, whose values are known, lies on several devices."""
    return isinstance(array, jax.Array) and len(array.sharding.device_set) > 1


def layout_of(arrays: Sequence[Any], apart: Sequence[int] = ()) -> Sharding | None:
    """How a tensor lies while it is merged: as the first of these arrays that lies on several devices, if one does.

    Args:
        arrays: the base's and the experts'.
        apart: the axes of layers that are merged a few at a time: each layer lies on all devices then.
    """
    array = next(filter(is_spread, arrays), None)
    if array is None or not apart or not isinstance(array.sharding, NamedSharding):
        return None if array is None else array.sharding
    mesh, spec = array.sharding.mesh, [_names(part) for part in array.sharding.spec]
    spec += [()] * (array.ndim - len(spec))
    moved = [name for axis in apart for name in spec[axis]]
    spec = [() if axis in apart else names for axis, names in enumerate(spec)]
    return NamedSharding(
        mesh, _divided(array.shape, mesh, spec, moved, [a for a in range(array.ndim) if a not in apart])
    )


def replicated(where: Sharding) -> Sharding:
    """All of an array on each of the devices of a sharding."""
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where


def spread(shape: Sequence[int], where: Sharding) -> Sharding:
    """An array of that shape over all devices of a sharding, as far as they divide it; but for the first axis."""
    if not isinstance(where, NamedSharding):
        return where
    return NamedSharding(where.mesh, _over(shape, where.mesh))


def statistic_home(leaf: Any, mesh: Any) -> Sharding | None:
    """Where a traced statistic lies in the end: over the whole mesh with Explicit axes."""
    inside = mesh is not None and isinstance(leaf, jax.core.Tracer)
    return NamedSharding(mesh, _over(leaf.shape, mesh)) if inside else None


def _over(shape: Sequence[int], mesh: Any) -> PartitionSpec:
    names = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    return _divided(shape, mesh, [() for _ in shape], names, range(1, len(shape)))


def _divided(
    shape: Sequence[int], mesh: Any, spec: list[tuple[str, ...]], names: Sequence[str], axes: Sequence[int]
) -> PartitionSpec:
    """The spec with these axes of the mesh too, each given to the longest axis of the array that they divide."""
    for name in names:
        for axis in sorted(axes, key=lambda axis: -shape[axis] // math.prod(mesh.shape[n] for n in spec[axis])):
            if shape[axis] % math.prod(mesh.shape[n] for n in (*spec[axis], name)) == 0:
                spec[axis] = (*spec[axis], name)
                break
    return PartitionSpec(*(part or None for part in spec))


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)
