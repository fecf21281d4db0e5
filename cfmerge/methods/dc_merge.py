"""DC-Merge: each expert's block of a common orthonormal basis, with the cross-talk between the blocks left out.

H.-C. Zhang et al., DC-Merge, CVPR 2026, arXiv 2603.06242. With `k = floor(min(m, n) / T)` and
`Dk_t = U_t diag(s_t) V_t^T` the best approximation of rank k of `D_t`, its values smoothed or not

    Uhat = polar([U_1 .. U_T]),  Vhat = polar([V_1 .. V_T])
    M_t = Uhat^T Dk_t Vhat, all but its largest entries in magnitude set to zero
    M = where sum_t M_t is not zero, the mean of the M_t that have its sign (and are not zero)
    X = alpha Uhat (M * mask) Vhat^T,     mask: the T diagonal blocks of k x k
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
from cfmerge.methods._blocks import NOTES, cover, leading, scaled, told
from cfmerge.methods.tsv import share


@register
def dc_merge(
    alpha: Number = 1.0,
    rank: int | None = None,
    smoothing: Literal["none", "average", "linear"] = "none",
    rho: Number = 5.0,
    density: float = 0.001,
) -> Method:
    """Leading singular triplets in a common orthonormal basis, sparse cores, signs elected, no cross-talk.

    Args:
        alpha: scale of the merged delta; usually tuned.
        rank: triplets kept of each expert; none: min(out, in) / T, as for full fine-tuning (16 for adapters).
        smoothing: a change of each expert's singular values that keeps their sum: "average" makes them equal, "linear"
            lets them fall evenly. Published for adapters only.
        rho: the largest ratio of the first to the last value after linear smoothing.
        density: share of the entries of each expert's core that is kept, at least one.

    Source: Zhang et al., DC-Merge: Improving Model Merging with Directional Consistency, CVPR 2026, arXiv 2603.06242.
    """
    check_number("dc_merge: alpha", alpha)
    check_number("dc_merge: rho", rho, low=1)
    check(rank is None or rank >= 1, f"dc_merge: rank must be at least 1, got {rank}")
    check(0 < density <= 1, f"dc_merge: density must lie in (0, 1], got {density}")

    def in_one_basis(
        base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"], dense: tuple[int, int] | None = None
    ) -> tuple[Array, Report]:
        deltas = scaled(deltas, weights)
        experts, m, n = deltas.shape
        shape = dense or (m, n)
        wanted = min(rank or share(shape, experts), *shape)
        k = min(wanted, m, n)  # cores have no more triplets
        triplets = leading(deltas, k)
        bases, _ = cover(triplets, min(shape))
        cut = min(max(1, int(density * (wanted * experts) ** 2)), (k * experts) ** 2)

        def core(one: tuple[Array, Array, Array]) -> Float[Array, "kT kT"]:
            u, s, vt = one
            left, right = linalg.matmul(bases.u.T, u), linalg.matmul(bases.vt, vt.T)
            full = linalg.matmul(left * smoothed(s, smoothing, as_array(rho, s.dtype)), right.T)
            size = jnp.abs(full)
            # Entries of equal experts differ by rounding: they stay together.
            least = linalg.kth_largest(size, cut) * (1 - 256 * jnp.finfo(size.dtype).eps)
            return jnp.where(size >= least, full, 0)

        merged = elected(lax.map(core, tuple(triplets)))
        blocks = jnp.arange(k * experts) // k
        merged = jnp.where(blocks[:, None] == blocks[None], merged, 0)
        scale = as_array(alpha, deltas.dtype)
        full = scale * linalg.matmul(linalg.matmul(bases.u, merged), bases.vt)
        return full, told(bases, experts * wanted > min(shape))

    def on_cores(basis: Joint) -> Any:
        return functools.partial(in_one_basis, dense=basis.shape)

    return of_deltas(in_one_basis, notes=NOTES, joint=on_cores)


def smoothed(s: Float[Array, " k"], smoothing: str, rho: Array) -> Float[Array, " k"]:
    """Singular values of the same sum, made equal or falling evenly; those that are zero stay zero."""
    kept = s > 0
    if smoothing == "none" or len(s) == 1:
        return s
    if smoothing == "average":
        profile = kept.astype(s.dtype)
    else:
        count = jnp.sum(kept, dtype=s.dtype)
        least = jnp.min(jnp.where(kept, s, s[0]))
        first = jnp.minimum(rho, linalg.ratio(s[0], least, 1.0))
        steps = jnp.arange(len(s), dtype=s.dtype) / jnp.maximum(count - 1, 1)
        profile = jnp.where(kept, first + (1 - first) * steps, 0)
    return profile * linalg.ratio(jnp.sum(s), jnp.sum(profile))


def elected(cores: Float[Array, "T q q"]) -> Float[Array, "q q"]:
    """The mean of the entries that have the sign of their sum."""
    sign = jnp.sign(jnp.sum(cores, axis=0))
    agree = (jnp.sign(cores) == sign) & (sign != 0)
    return linalg.ratio(jnp.sum(jnp.where(agree, cores, 0), axis=0), jnp.sum(agree, axis=0).astype(cores.dtype))
