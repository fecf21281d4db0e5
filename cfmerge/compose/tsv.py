"""TSV-Compress: of every task's delta the leading singular triplets, and of what is no matrix the delta itself.

A. A. Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv 2412.00081.
For each matrix and task, with `r = min(m, n)` and T tasks:

    D_t = U_t diag(s_t) V_t^T,   k = max(1, floor(r ratio))          ratio = 1/T: all tasks take as much as one delta
    up_t = U_t[:, :k] diag(s_t[:k])        down_t = V_t[:, :k]^T
    task t:  W_0 + up_t down_t
"""

import math
from collections.abc import Mapping

from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.compose.slots import in_slots, outside, resized
from cfmerge.core.checks import check_number
from cfmerge.core.joint import Joint
from cfmerge.core.part import Composer, Needs
from cfmerge.core.registry import register

NEEDS = Needs("tensor", weights="none", factors="used")


@register
def tsv_c(ratio: float | None = None, experts: int = 1) -> Composer:
    """The leading singular triplets of every task's delta.

    Args:
        ratio: the share of the triplets that is kept; none: one over the number of experts.
        experts: the number of experts.

    Source: Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081.
    """
    check_number("tsv_c: ratio", ratio, 0, 1)

    def composer(basis: Joint | None = None) -> Composer:
        def keep(base: Array, delta: Float[Array, "m n"]) -> Mapping[str, Array]:
            k = triplets(delta.shape if basis is None else basis.shape, ratio, experts)
            u, s, vt = linalg.leading(delta, min(k, *delta.shape))
            return {"up": resized(u * s, 1, k), "down": resized(vt, 0, k)}

        return in_slots(keep, experts, NEEDS, joint=composer, out_of=outside)

    return composer()


def triplets(shape: tuple[int, ...], ratio: float | None, experts: int) -> int:
    """`k`: how many triplets of a matrix are kept.

    Example:
        >>> triplets((768, 3072), None, 8), triplets((4, 3), 0.1, 8)
        (96, 1)
    """
    least = min(shape)
    return max(1, least // experts if ratio is None else math.floor(least * ratio))
