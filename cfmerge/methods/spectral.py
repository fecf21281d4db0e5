"""Transforms of a delta's singular values, in front of a method or behind one. With `X = U diag(s) V^T`

    low_rank            U_k diag(s_1 .. s_k) V_k^T
    star                the least k with s_1 + .. + s_k >= eta |s|_1, rescaled to the same |s|_1      arXiv 2502.10339
    subspace_boosting   s_i -> max(s_i, s_b), b the first index whose share of s_1 + .. + s_b exceeds beta  2506.16506
    half_flatten        s_i -> (s_i / s_1)^q, rescaled to the same |s|_1: q = 1 changes nothing, q = 0 is flat
    svc                 s_i -> gamma_i s_i, gamma from how much of direction i the experts have       arXiv 2602.05536

Singular values that are zero to working precision stay zero: their vectors are arbitrary.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Needs, Seen, Transform
from cfmerge.core.registry import register
from cfmerge.methods.cart import rank_of


@register
def low_rank(rank: int | None = None, fraction: float = 0.1) -> Transform:
    """The best approximation of a rank.

    Args:
        rank: singular triplets that are kept; none: by fraction.
        fraction: the share of min(out, in) that is kept, at least 1.

    Source: Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, Psychometrika 1936.
    """
    check(rank is None or rank >= 1, f"low_rank: rank must be at least 1, got {rank}")
    check(0 < fraction <= 1, f"low_rank: fraction must lie in (0, 1], got {fraction}")

    def apply(delta: Float[Array, "m n"]) -> Float[Array, "m n"]:
        k = rank_of(fraction, delta.shape) if rank is None else min(rank, *delta.shape)
        return delta if k == min(delta.shape) else linalg.truncated(delta, k)

    def on_cores(basis: Joint) -> Transform:
        k = rank_of(fraction, basis.shape) if rank is None else rank
        return Transform("low_rank", lambda core: linalg.truncated(core, min(k, *core.shape)), needs=Needs("matrix"))

    return Transform("low_rank", apply, needs=Needs("matrix"), joint=on_cores)


@register
def star(eta: Number = 0.4) -> Transform:
    """The leading directions that hold a share of the nuclear norm, rescaled to all of it. In front of `average`.

    Args:
        eta: the share of the nuclear norm.

    Source: Lee et al., STAR: Spectral Truncation and Rescale for Model Merging, NAACL 2025, arXiv 2502.10339.
    """
    check_number("star: eta", eta, high=1, above=0)

    def apply(delta: Float[Array, "m n"]) -> Float[Array, "m n"]:
        u, s, vt, _ = _parts(delta)
        before = jnp.cumsum(s) - s
        kept = jnp.where((before < as_array(eta, s.dtype) * jnp.sum(s)) | (jnp.arange(len(s)) == 0), s, 0)
        return linalg.matmul(u * kept * linalg.ratio(jnp.sum(s), jnp.sum(kept)), vt)

    return Transform("star", apply, needs=Needs("matrix"), joint=True)


@register
def subspace_boosting(beta: Number = 0.01, energy: Literal["values", "squares"] = "values") -> Transform:
    """Raises the small singular values of a merged delta to a middle one. Behind a method.

    Args:
        beta: the cumulative share at which the level is read off; 0 raises all to the largest.
        energy: whose share: the singular values', or their squares'.

    Source: Skorobogat et al., Subspace-Boosted Model Merging, arXiv 2506.16506.
    """
    check_number("subspace_boosting: beta", beta, 0, 1)

    def apply(merged: Float[Array, "m n"]) -> Float[Array, "m n"]:
        u, s, vt, kept = _parts(merged)
        amount = s if energy == "values" else linalg.ratio(s, s[0]) ** 2
        at = jnp.sum(jnp.cumsum(amount) <= as_array(beta, s.dtype) * jnp.sum(amount))
        last = jnp.maximum(jnp.sum(kept) - 1, 0)
        level = s[jnp.minimum(at, last)]
        return linalg.matmul(u * jnp.where(kept, jnp.maximum(s, level), 0), vt)

    return Transform("subspace_boosting", apply, needs=Needs("matrix"), joint=True)


@register
def half_flatten(q: Number = 0.5) -> Transform:
    """Singular values to a power, at a fixed nuclear norm: between Iso-C's flat spectrum and no change.

    Args:
        q: the power; 0 makes all equal, 1 changes nothing.

    Source: between Iso-C (arXiv 2502.04959) and the identity; unpublished.
    """
    check_number("half_flatten: q", q, 0)

    def apply(merged: Float[Array, "m n"]) -> Float[Array, "m n"]:
        u, s, vt, kept = _parts(merged)
        relative = jnp.where(kept, linalg.ratio(s, s[0]), 1)
        powers = jnp.where(kept, relative ** as_array(q, s.dtype), 0)
        return linalg.matmul(u * powers * linalg.ratio(jnp.sum(s), jnp.sum(powers)), vt)

    return Transform("half_flatten", apply, needs=Needs("matrix"), joint=True)


@register
def svc(alpha: Number = 0.1) -> Transform:
    """Lowers the directions of a merged delta that experts have added up, raises those that they have cancelled.

    `a_i = u_i^T X`, `a_i^t = u_i^T D_t`, `p_i^t = <a_i, a_i^t> / ||a_i^t||^2`, and row i is scaled by
    `gamma_i = T / sum_t max(alpha, p_i^t)`. Behind a method; one expert that is returned as it is stays so. Experts
    with weight 0 do not count.

    Args:
        alpha: the least that an expert's share counts for: no direction is raised by more than 1 / alpha. The paper
            has 0.1, 0.2 after Iso-CTS and 1 after TSV-M and WUDI.

    Source: Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging (SVC),
        ICML 2026, arXiv 2602.05536.
    """
    check_number("svc: alpha", alpha, above=0)

    def apply(merged: Float[Array, "m n"], seen: Seen) -> Float[Array, "m n"]:
        u, _, _ = linalg.svd(merged)
        rows = linalg.matmul(u.T, merged)
        floor = as_array(alpha, merged.dtype)

        def shares(delta: Float[Array, "m n"]) -> Float[Array, " r"]:
            own = linalg.matmul(u.T, delta)
            scale = jnp.maximum(jnp.max(jnp.abs(own), axis=1), jnp.finfo(own.dtype).tiny)
            unit = own / scale[:, None]
            along = jnp.sum(rows / scale[:, None] * unit, axis=1)
            return jnp.maximum(floor, linalg.ratio(along, jnp.sum(unit**2, axis=1)))

        counts = (seen.weights != 0).astype(merged.dtype)
        gamma = linalg.ratio(jnp.sum(counts), jnp.sum(counts[:, None] * lax.map(shares, seen.deltas), axis=0), 1.0)
        return linalg.matmul(u * gamma, rows)

    return Transform("svc", apply, needs=Needs("matrix", seen=True), joint=True)


def _parts(delta: Float[Array, "m n"]) -> tuple[Array, Array, Array, Array]:
    """`U, s, V^T` and which of s are not zero to working precision; the others are set to zero."""
    u, s, vt = linalg.svd(delta)
    kept = linalg.nonzero(s, s[0], linalg.rank_cutoff(delta.shape, delta.dtype))
    return u, jnp.where(kept, s, 0), vt, kept
