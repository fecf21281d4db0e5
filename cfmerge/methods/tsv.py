"""TSV-M: the experts' leading singular vectors, side by side, are made orthonormal together.

A. A. Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081. With `r = min(m, n)` and T experts

    k = floor(r / T);  U_t, s_t, V_t = the k largest singular triplets of D_t
    Uhat = [U_1 .. U_T],  shat = [s_1 .. s_T],  Vhat = [V_1 .. V_T]
    X = alpha polar(Uhat) diag(shat) polar(Vhat)^T

The polar factor is the partial isometry: experts that share directions share them, and an expert that did not change
the tensor takes no part. T identical experts of rank k return the expert.
"""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Report
from cfmerge.core.registry import register
from cfmerge.methods._blocks import NOTES, cover, leading, scaled, side_by_side, told


def share(shape: tuple[int, ...], experts: int) -> int:
    """`floor(min(m, n) / T)`, and at least 1: with more experts than directions there would be nothing left."""
    return max(1, min(shape) // experts)


@register
def tsv_m(alpha: Number = 1.0, variant: Literal["merge", "lossless", "low_rank"] = "merge") -> Method:
    """Leading singular triplets of every delta, their vectors made orthonormal across experts.

    Args:
        alpha: scale of the merged delta; the paper's 1 is for eight vision tasks, and it is usually tuned.
        variant: "merge"; "lossless" keeps all triplets of every expert, "low_rank" keeps the leading ones as they
            are (the sum of the truncated deltas, no orthonormal vectors).

    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025,
        arXiv 2412.00081.
    """
    check_number("tsv_m: alpha", alpha)

    def joined(
        base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"], dense: tuple[int, int] | None = None
    ) -> tuple[Array, Report]:
        deltas = scaled(deltas, weights)
        experts, *own = deltas.shape
        shape = dense or tuple(own)
        scale = as_array(alpha, deltas.dtype)
        k = min(shape) if variant == "lossless" else share(shape, experts)
        triplets = leading(deltas, min(k, *own))
        if variant == "low_rank":
            us, s, vts = side_by_side(triplets)
            return scale * linalg.matmul(us * s, vts), {}
        bases, s = cover(triplets, min(shape))
        return scale * linalg.matmul(bases.u * s, bases.vt), told(bases, experts > min(shape))

    def on_cores(basis: Joint) -> Any:
        return functools.partial(joined, dense=basis.shape)

    return of_deltas(joined, notes=NOTES, joint=on_cores)
