"""TALL masks: the sum of all deltas, and for each task a mask of the entries that matter to it.

K. Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv 2405.07813:

    N   = sum_t D_t
    M_t = [ |D_t| > lambda |N - D_t| ]            one bit an entry
    task t:  W_0 + M_t N

`lambda` is tuned for each task, 0.2 to 0.6 in the paper. `consensus` (a method, which makes one checkpoint) counts the
same masks.
"""

import functools
import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.checks import check_number
from cfmerge.core.numbers import PerExpert
from cfmerge.core.part import Composer, Needs, Report
from cfmerge.core.registry import register
from cfmerge.methods.masks import tall_masks


@register
def tall(threshold: PerExpert = 0.4) -> Composer:
    """The sum of the deltas, with a mask for each task of the entries that matter to it.

    Args:
        threshold: `lambda`, one or one for each task; the published code tries 0.2 to 0.6.

    Source: Wang et al., Localizing Task Information (TALL masks), ICML 2024, arXiv 2405.07813.
    """
    check_number("tall: threshold", threshold, 0)

    def update(seen: Seen, delta: Array, weight: float | Array = 1.0) -> Seen:
        return Seen((*seen.deltas, delta), (*seen.thresholds, jnp.asarray(threshold, delta.dtype)))

    def solve(seen: Seen) -> tuple[Mapping[str, Array], Report]:
        summed = functools.reduce(operator.add, seen.deltas)
        pairs = zip(seen.deltas, seen.thresholds, strict=True)
        masks = [tall_masks([delta], summed, threshold)[0] for delta, threshold in pairs]
        return {"shared": summed, "masks": jnp.stack(masks)}, {}

    return Composer("tall", lambda base: Seen(), update, solve, needs=Needs("entry", weights="none"), additive=False)


class Seen(NamedTuple):
    """The deltas, and the threshold of each."""

    deltas: tuple[Array, ...] = ()
    thresholds: tuple[Array, ...] = ()
