"""Deltas of low rank (LoRA fine-tuning merged into the weights), recognised from a small block of each."""

from collections.abc import Iterable

import numpy as np

BLOCK = 96  # rows and columns that are looked at
LARGEST = 64  # rank up to which a block of that size tells low rank from full rank
LEAST_INPUTS = 512  # smaller problems gain nothing
CUT = 1e-4  # of the largest singular value; and the relative error that a factorisation may leave


def rank_bound(base: np.ndarray, experts: Iterable[np.ndarray], count: int) -> int | None:
    """A likely bound on the rank of every expert's delta, or None if there is none that pays.

    A block of rows and columns spread over the delta has at most its rank; so a block of full rank rules low
    rank out, and stops the search. One of low rank does not prove it: the caller must check the error of the
    factorisation. In checkpoints rounded to bfloat16 the rounding is of full rank, and nothing is found.

    Args:
        base: `(out, in)` or `(in, out)`, as stored.
        experts: the same, read one by one.
        count: number of experts; together they must stay well below the inputs.
    """
    inputs = min(base.shape)
    if inputs < LEAST_INPUTS:
        return None
    rows, columns = (np.linspace(0, size - 1, BLOCK).astype(int) for size in base.shape)
    block = np.ix_(rows, columns)
    small = base[block].astype(np.float64)
    found = 0
    for expert in experts:
        delta = expert[block].astype(np.float64) - small
        if not np.isfinite(delta).all():
            return None
        values = np.linalg.svd(delta, compute_uv=False)
        found = max(found, int(np.sum(values > CUT * values[0])))
        if found > LARGEST:
            return None
    rank = -(-max(found, 1) // 16) * 16
    return rank if 2 * rank * count <= inputs else None
