"""Whether a tangent fits its base: leaves by name, shapes, and dtypes that have tangents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten
from cfmerge.models.patterns import patterns


def fitted(who: str, base: Any, tangent: Any) -> dict[str, Any]:
    """The leaves of a tangent by name, without those of integers.

    Raises:
        CfmergeError: the base has no such leaf, or in another shape, or as integers; or there is no leaf at all.
    """
    leaves, _ = flatten(base)
    found, _ = flatten(tangent)
    unknown = [name for name in found if name not in leaves]
    if unknown:
        told = ", ".join(map(str, patterns(unknown, leaves)))
        raise CfmergeError(
            f"{who}: a component is a tree like the base, or of some of its leaves, and the base has no {told}"
            f"{nearest(unknown[0], leaves)}"
        )
    for name, array in found.items():
        if np.shape(array) != leaves[name].shape:
            raise CfmergeError(
                f"{who}: leaf {name!r} has shape {np.shape(array)}, the base's {leaves[name].shape}; it belongs to "
                "another base"
            )
    kept = {name: array for name, array in found.items() if not _is_nothing(who, name, leaves[name], array)}
    if not kept:
        raise CfmergeError(f"{who}: it has no leaf that moves; leaves of the base: {', '.join(list(leaves)[:6])}")
    return kept


def _is_nothing(who: str, name: str, leaf: Any, array: Any) -> bool:
    """Whether it is the tangent of an integer leaf, which there is none of."""
    if array.dtype == jax.dtypes.float0:
        return True
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        if not np.can_cast(_kind(array.dtype), _kind(leaf.dtype)):
            raise CfmergeError(f"{who}: leaf {name!r} is {array.dtype}, and the base's is {leaf.dtype}")
        return False
    if isinstance(array, jax.core.Tracer) or np.any(np.asarray(array)):
        raise CfmergeError(
            f"{who}: leaf {name!r} is {leaf.dtype} in the base, so that it has no tangent; leave it out, or zero"
        )
    return True


def _kind(dtype: Any) -> Any:
    return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
