r"""Tensors whose spaces are mapped by matrices: soft permutations, and transport between models of other widths.

A map of a space is an array `M[k, l]`: element k of the result is `sum over l of M[k, l]` times element l. A
permutation is the map `M[k, sigma(k)] = 1`. A space with children has a map for each combination of children on an
axis, as gains have (`assignment`): `M[k, l, i, j]` for one child, whose element i in k comes from j in l.
"""

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
) -> Any:
    """A tensor with each of its spaces mapped, on the host if it is a NumPy array, else by JAX.

    Args:
        axes: of the tensor.
        tensor: the array.
        maps: `{space: its maps}`. A space that is not there stays, and a child for which there is no map.
        but: the number of an axis, and a space that stays on this axis.
        reads: the maps of axes that the tensor reads, if they are others.
    """
    for number, axis in enumerate(axes):
        if not axis.spaces:
            continue
        own = reads if axis.reads and reads is not None else maps
        before, after = tensor.shape[:number], tensor.shape[number + 1 :]
        pieces, start = [], 0
        for part in axis.parts:
            sizes = [factor.size for factor in part]
            piece = tensor[(slice(None),) * number + (slice(start, start + math.prod(sizes)),)]
            piece = piece.reshape(*before, *sizes, *after)
            for space in dict.fromkeys(factor.name for factor in part):
                if space in own and (number, space) != but:
                    piece = _mapped(piece, number, part, space, own[space])
            pieces.append(piece.reshape(*before, math.prod(piece.shape[number : number + len(part)]), *after))
            start += math.prod(sizes)
        numpy = jnp if isinstance(tensor, jax.Array) else np
        tensor = numpy.concatenate(pieces, axis=number) if len(pieces) > 1 else pieces[0]
    return tensor


def _mapped(piece: Any, first: int, part: Sequence[Factor], space: str, maps: Maps) -> Any:
    """One space of a part mapped, whose factors are the axes from `first` on."""
    key = tuple(factor.name for factor in part if factor.parent == space)
    names = (space, *(key if key in maps else ()))
    own, places = maps[names[1:]], [first + place for place, factor in enumerate(part) if factor.name in names]
    sums, front = (list(range(1, own.ndim, 2)), places), list(range(len(places)))
    if isinstance(piece, jax.Array):
        return jnp.moveaxis(jnp.tensordot(own, piece, sums, precision=linalg.HIGHEST), front, places)
    return np.moveaxis(np.tensordot(own, piece, sums), front, places)


def hard(key: tuple[str, ...], space: str, permutations: Mapping[str, np.ndarray], dtype: Any) -> np.ndarray:
    """The map of a space and of its children `key` that is a permutation, of ones and zeros."""
    sigma = permutations[space]
    sizes = [len(sigma), *(permutations[child].shape[1] for child in key)]
    places = np.indices(sizes)
    sources = [sigma[places[0]], *(permutations[child][places[0], places[n]] for n, child in enumerate(key, 1))]
    result = np.zeros([size for size in sizes for _ in (0, 1)], dtype)
    result[tuple(index for pair in zip(places, sources, strict=True) for index in pair)] = 1
    return result
