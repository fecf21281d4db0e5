"""A task's delta of one tensor, out of what a composed result keeps of it; NumPy and JAX."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import linalg
from cfmerge.compose.entries import Entry
from cfmerge.models.layouts import from_canonical


def delta_of(
    entry: Entry,
    parts: Mapping[str, Any],
    task: int,
    scale: Any = None,
    first: int = 0,
    count: int | None = None,
    dtype: Any = np.float32,
) -> Any:
    """The delta, in the tensor's stored shape; with `count` so many flat entries, from `first` on.

        shared, masks    scale masks[t] shared
        up, down         up[t] down[t], or up[t] where there is no down
        delta            the row of the task among those that have it
        bias             the row of the task
        mean             the same for all

    Args:
        task: the number of the task.
        scale: the task's number; None: 1.
    """
    if not any(isinstance(array, jax.core.Tracer) for array in parts.values()):
        parts = {part: np.asarray(array) for part, array in parts.items()}  # the same bits wherever it is computed
    shape = entry.shape if count is None else (count,)
    last = entry.size if count is None else first + count
    row = entry.tasks.index(task)
    if "masks" in parts:
        shared = parts["shared"].reshape(-1)[first:last].astype(dtype)
        kept = _bits(parts["masks"][row], first, last) * shared
        return (kept if scale is None else _as(scale, dtype) * kept).reshape(shape)
    if "up" in parts:
        whole = _product(entry, parts, task, dtype)
        return whole if count is None else whole.reshape(-1)[first:last]
    values = parts["mean"] if "mean" in parts else parts["bias"][task] if "bias" in parts else parts["delta"][row]
    return values.reshape(-1)[first:last].astype(dtype).reshape(shape)


def _bits(packed: Any, first: int, last: int) -> Any:
    """The bits from one entry up to another."""
    begin = first // 8
    xp = np if isinstance(packed, np.ndarray) else jnp
    return xp.unpackbits(packed[begin : -(-last // 8)])[first - 8 * begin : last - 8 * begin]


def _product(entry: Entry, parts: Mapping[str, Any], task: int, dtype: Any) -> Any:
    """`up[t] down[t]` as stored: on the host summed in float64, so that its bits do not depend on the library."""
    stacked = entry.layout.count("b") > 0
    up = parts["up"][:, task] if stacked else parts["up"][task]
    if "down" in parts:
        down = parts["down"][:, task] if stacked else parts["down"][task]
        if isinstance(up, jax.core.Tracer):
            up = linalg.matmul(up.astype(dtype), down.astype(dtype))
        else:
            up = np.matmul(up.astype(np.float64), down.astype(np.float64))
    up = up.astype(dtype)
    if not entry.layout:
        return up.reshape(entry.shape)
    m, n = up.shape[-2:]
    return from_canonical(up.reshape(math.prod(up.shape) // (m * n), m, n), entry.layout, entry.shape)


def _as(scale: Any, dtype: Any) -> Any:
    return scale.astype(dtype) if isinstance(scale, jax.core.Tracer) else np.asarray(scale, dtype)
