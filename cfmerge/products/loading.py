"""Tensors out of a model's files as JAX arrays: each device reads the part that it holds."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, open_checkpoint
from cfmerge.formats.base import Container
from cfmerge.formats.pytree import named_leaves, unflatten
from cfmerge.formats.trees import nested


def load(source: str | Path | Source | Container, like: Any = None, sharding: Sharding | None = None) -> Any:
    """The tensors of a model as a tree of JAX arrays.

        >>> model = cfmerge.load("base")
        >>> model["layer.weight"].shape
        (4, 3)

    Args:
        source: a path, or what `open_checkpoint` gives.
        like: a tree of arrays or `jax.ShapeDtypeStruct`s: its structure, dtypes and shardings are the result's. The
            name of a leaf is its path, joined by "/". Without it the result is a dict, nested where names have "/".
        sharding: of all arrays that `like` gives none; without it they lie on the default device.

    Raises:
        CfmergeError: the source lacks a tensor of `like`, or has it in another shape.
    """
    if isinstance(source, str | Path):
        source = open_checkpoint(source)
    wanted, treedef = named_leaves(like) if like is not None else (_whole(source), None)
    stored = {name: source.ties.get(name, name) for name in wanted}
    _check(source, wanted, stored)
    usual = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    default = sharding or SingleDeviceSharding(usual)
    arrays = {}
    for name, leaf in wanted.items():
        dtype = np.dtype(leaf.dtype)
        arrays[name] = _array(source, stored[name], dtype, getattr(leaf, "sharding", None) or default)
    narrow = [name for name, array in arrays.items() if array.dtype != wanted[name].dtype]
    if narrow:
        warnings.warn(
            f"{len(narrow)} tensors, such as {narrow[0]!r}, are {wanted[narrow[0]].dtype}, and JAX holds them as "
            f"{arrays[narrow[0]].dtype}; jax.config.update('jax_enable_x64', True) before loading keeps them",
            stacklevel=2,
        )
    return nested(arrays) if treedef is None else unflatten(treedef, arrays)


def _whole(source: Source | Container) -> dict[str, Any]:
    named = {**source.tensors, **{alias: source.tensors[name] for alias, name in source.ties.items()}}
    return {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in named.items()}


def _check(source: Source | Container, wanted: Mapping[str, Any], stored: Mapping[str, str]) -> None:
    """Raises `CfmergeError` for tensors that are not there, or of other shapes."""
    missing = [name for name, own in stored.items() if own not in source.tensors]
    if missing:
        raise CfmergeError(
            f"{source.path}: lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]!r}"
            f"{nearest(missing[0], source.tensors)}"
        )
    for name, own in stored.items():
        found, expected = tuple(source.tensors[own].shape), tuple(wanted[name].shape)
        if found != expected:
            raise CfmergeError(f"{source.path}: tensor {name!r} should have shape {expected}, and has {found}")


def _array(source: Source | Container, name: str, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """A tensor where the sharding lays it; devices that hold columns of the same rows share one reading."""
    shape = tuple(source.tensors[name].shape)
    read: dict[tuple[int, int], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if not shape or index is None:
            return source.read(name).astype(jax.dtypes.canonicalize_dtype(dtype))
        first, last, _ = index[0].indices(shape[0])
        if (first, last) not in read:
            read[first, last] = _rows(source, name, shape, first, last)
        return read[first, last][(slice(None), *index[1:])].astype(jax.dtypes.canonicalize_dtype(dtype))

    return jax.make_array_from_callback(shape, sharding, part)


def _rows(source: Source | Container, name: str, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    if (first, last) == (0, shape[0]):
        return source.read(name)
    row = math.prod(shape[1:])
    return source.read(name, first * row, (last - first) * row).reshape(last - first, *shape[1:])
