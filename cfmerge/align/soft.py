r"""Tensors whose spaces are mapped by matrices: soft permutations, and transport between models of other widths.

A map of a space is an array `M[k, l]`: element k of the result is `sum over l of M[k, l]` times element l. A
permutation is the map `M[k, sigma(k)] = 1`. A space with children has a map for each combination of children on an
axis, as gains have (`assignment`): `M[k, l, i, j]` for one child, whose element i in k comes from j in l.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import linalg
from cfmerge.models.spaces import Axis, Factor

Maps = Mapping[tuple[str, ...], Any]
"""`{children on the axis: map}` of one space."""


def mapped(
    axes: Sequence[Axis],
    tensor: Any,
    maps: Mapping[str, Maps],
    but: tuple[int, str] | None = None,
    reads: Mapping[str, Maps] | None = None,
) -> jax.Array:
    """A tensor with each of its spaces mapped.

    Args:
        axes: of the tensor.
        tensor: the array.
        maps: `{space: its maps}`. A space that is not there stays, and a child for which there is no map.
        but: the number of an axis, and a space that stays on this axis.
        reads: the maps of axes that the tensor reads, if they are others.
    """
    plan, arrays = [], []
    for number, axis in enumerate(axes):
        parts, chosen = [], reads if axis.reads and reads is not None else maps
        for part in axis.parts:
            own = [_chosen(part, space, chosen[space]) for space in dict.fromkeys(factor.name for factor in part)
                   if space in chosen and (number, space) != but]  # fmt: skip
            arrays += [array for _, array in own]
            parts.append((tuple(factor.size for factor in part), tuple(places for places, _ in own)))
        if any(places for _, places in parts):
            plan.append((number, tuple(parts)))
    return _contracted(tensor, arrays, plan=tuple(plan))


def _chosen(part: Sequence[Factor], space: str, maps: Maps) -> tuple[tuple[int, ...], Any]:
    """Places of a part's factors that a space's map takes, and this map."""
    key = tuple(factor.name for factor in part if factor.parent == space)
    names = (space, *(key if key in maps else ()))
    return tuple(place for place, factor in enumerate(part) if factor.name in names), maps[names[1:]]


@functools.partial(jax.jit, static_argnames="plan")
def _contracted(tensor: Any, arrays: Sequence[Any], *, plan: tuple[Any, ...]) -> jax.Array:
    """The tensor with the maps applied in turn; the plan is `((axis, ((sizes, places of each map), ...)), ...)`."""
    left = list(arrays)
    for number, parts in plan:
        pieces, start = [], 0
        for sizes, chosen in parts:
            piece = jax.lax.slice_in_dim(tensor, start, start + math.prod(sizes), axis=number)
            piece = piece.reshape(*tensor.shape[:number], *sizes, *tensor.shape[number + 1 :])
            for places in chosen:
                own, axes = left.pop(0), [number + place for place in places]
                piece = jnp.tensordot(own, piece, (list(range(1, own.ndim, 2)), axes), precision=linalg.HIGHEST)
                piece = jnp.moveaxis(piece, list(range(len(axes))), axes)
            pieces.append(piece.reshape(*tensor.shape[:number], -1, *tensor.shape[number + 1 :]))
            start += math.prod(sizes)
        tensor = jnp.concatenate(pieces, axis=number)
    return jnp.asarray(tensor)


def hard(key: tuple[str, ...], space: str, permutations: Mapping[str, np.ndarray], dtype: Any) -> np.ndarray:
    """The map of a space and of its children `key` that is a permutation, of ones and zeros."""
    sigma = permutations[space]
    sizes = [len(sigma), *(permutations[child].shape[1] for child in key)]
    places = np.indices(sizes)
    sources = [sigma[places[0]], *(permutations[child][places[0], places[n]] for n, child in enumerate(key, 1))]
    result = np.zeros([size for size in sizes for _ in (0, 1)], dtype)
    result[tuple(index for pair in zip(places, sources, strict=True) for index in pair)] = 1
    return result
