"""Iso-C and Iso-CTS: merged deltas with a flat spectrum.

D. Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959. With `N = sum_t w_t D_t = U diag(s) V^T`,
`r = min(m, n)`, T experts and a fraction `f`

    Iso-C:    X = alpha mean(s) polar(N),     mean(s) = <polar(N), N> / r over all r values
    Iso-CTS:  nt = round((r - floor(r f)) / T);  kc = r - nt T
              U_c, s_c, V_c = the kc largest triplets of N
              U_t, s_t, V_t = the nt largest triplets of (I - U_c U_c^T) D_t
              X = alpha mean([s_1 .. s_T, s_c]) polar([U_1 .. U_T U_c]) polar([V_1 .. V_T V_c])^T

Only the left common space is projected out. Values are the sum's in the common block, the residuals' in the others.
The polar factor is the partial isometry: deltas of low rank (adapters) are flattened over what they span, where the
published code spreads them over arbitrary directions besides. One expert is not returned, but flattened.
"""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Report
from cfmerge.core.registry import register
from cfmerge.methods._blocks import NOTES, leading, orthonormal, scaled, side_by_side, told
from cfmerge.methods.sums import Sum, init, update


@register
def iso_c(alpha: Number = 1.0, target: Literal["mean", "rms", "largest", "one"] = "mean") -> Method:
    """The sum of the deltas with all its singular values made equal.

    Args:
        alpha: scale of the merged delta; usually tuned (about 1 to 1.9 in the paper).
        target: the value that the singular values get: the mean of all min(out, in) of them, their root mean square
            (keeps the norm), the largest, or 1.

    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces,
        ICML 2025, arXiv 2502.04959.
    """
    check_number("iso_c: alpha", alpha)

    return _iso_c(alpha, target)


def _iso_c(alpha: Number, target: str, r: int | None = None) -> Method:
    """The method; of cores, where a dense delta has `r` singular values."""

    def value(total: Float[Array, "m n"], polar: Float[Array, "m n"]) -> Float[Array, ""]:
        count = r or min(total.shape)
        if target == "mean":
            return jnp.sum(polar * total) / count
        if target == "rms":
            return linalg.norm(total).reshape(()) / count**0.5
        if target == "largest":
            return linalg.leading(total, 1)[1][0]
        return jnp.ones((), total.dtype)

    def solve(statistic: Sum) -> tuple[Array, Report]:
        total = statistic.total
        polar = linalg.polar(total)
        merged = as_array(alpha, total.dtype) * value(total, polar.factor) * polar.factor
        return merged, {"null_space": lax.stop_gradient((r or min(total.shape)) - polar.rank)}

    notes = {
        "null_space": (
            lambda missing: missing > 0,
            "the sum of the deltas has not full rank ({value:.0f} directions missing): it was made flat where it is "
            "not zero, on a level that counts all of min(out, in)",
        )
    }

    def on_cores(basis: Joint) -> Method:
        return _iso_c(alpha, target, min(basis.shape))

    return Method("iso_c", init, update, solve, statistic="sum", notes=notes, joint=on_cores)


def dimensions(shape: tuple[int, ...], experts: int, common: float) -> tuple[int, int]:
    """`kc, nt`: dimensions of the common space and of each expert's own. Halves are rounded to even, as published."""
    r = min(shape)
    own = min(round((r - int(r * common)) / experts), r // experts)
    return r - own * experts, own


@register
def iso_cts(alpha: Number = 1.0, common: float = 0.8) -> Method:
    """The leading directions of the sum and, in place of its last, some of each expert, all with one singular value.

    Args:
        alpha: scale of the merged delta; usually tuned.
        common: share of min(out, in) that the sum's directions get; what is left is shared by the experts.

    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces,
        ICML 2025, arXiv 2502.04959.
    """
    check_number("iso_cts: alpha", alpha)
    check(0 <= common <= 1, f"iso_cts: common must lie in [0, 1], got {common}")

    def flattened(
        base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"], dense: tuple[int, int] | None = None
    ) -> tuple[Array, Report]:
        deltas = scaled(deltas, weights)
        total = jnp.sum(deltas, axis=0)
        shape, most = dense or total.shape, min(total.shape)
        kc, nt = dimensions(shape, len(deltas), common)
        u_c, s_c, vt_c = (part[0] for part in leading(total[None], min(kc, most)))
        us, s, vts = [], [], []
        if nt:
            beside = lax.map(lambda delta: delta - linalg.matmul(u_c, linalg.matmul(u_c.T, delta)), deltas)
            u_t, s_t, vt_t = side_by_side(leading(beside, min(nt, most), linalg.norm(deltas, (1, 2)).ravel()))
            us, s, vts = [u_t], [s_t], [vt_t]
        values = jnp.concatenate([*s, s_c])
        count = jnp.sum(values > 0, dtype=values.dtype)
        bases = orthonormal(jnp.concatenate([*us, u_c], axis=1), jnp.concatenate([*vts, vt_c]), count, min(shape))
        level = as_array(alpha, values.dtype) * jnp.sum(values) / (kc + nt * len(deltas))
        return level * linalg.matmul(bases.u, bases.vt), told(bases)

    def on_cores(basis: Joint) -> Any:
        return functools.partial(flattened, dense=basis.shape)

    return of_deltas(flattened, notes=NOTES, joint=on_cores)
