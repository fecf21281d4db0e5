"""OPCM: experts one after the other, each without what overlaps with the model merged so far.

A. Tang et al., Merging Models on the Fly Without Retraining (orthogonal projection-based continual merging), arXiv
2501.09522. With `D` the merged delta of the experts before, `D = U diag(s) V^T`, and the new expert's delta `D_t`

    rho = the number of leading i with (s_1 + .. + s_i) / |s|_1 <= alpha
    M = U^T D_t V, its diagonal and its block M[:rho, :rho] set to zero;  clean_t = U M V^T
    D <- (lambda_{t-1} D + clean_t) / lambda_t,   lambda_t such that ||D|| = n_t = the mean of ||D_1|| .. ||D_t||
    what is not a matrix: clean_t = D_t

with norms of the whole model. `lambda_{t-1} D` is the running sum `S` before any division, and neither U, V nor rho
depends on its scale; so `S <- S + clean_t`, and only the last division, `X = S n_T / ||S||`, couples the tensors: a
survey of the whole model finds that scale. U and V are square in the paper; as rows and columns beyond min(m, n) are
never set to zero, `clean_t = D_t - U (what is set to zero) V^T` needs the thin ones only. Directions in which `D` is
numerically zero have no vectors of their own: nothing is removed from them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check_number
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Measure, Survey, xp_of


class Running(NamedTuple):
    """The sum `S`, the sum of the experts' norms (of this tensor), their number, and the newest one's norm."""

    total: Float[Array, "..."]
    norms: Float[Array, ""]
    experts: Float[Array, ""]
    newest: Float[Array, ""]


def init(base: Float[Array, "..."]) -> Running:
    zero = jnp.zeros((), base.dtype)
    return Running(jnp.zeros_like(base), zero, zero, zero)


def clean(total: Float[Array, "m n"], delta: Float[Array, "m n"], alpha: Array) -> Float[Array, "m n"]:
    """The delta without its part along, and among the leading, singular directions of the total."""
    u, s, vt = linalg.svd(total)
    shares = linalg.ratio(jnp.cumsum(s), jnp.sum(s))
    kept = linalg.nonzero(s, s[0], linalg.rank_cutoff(total.shape, total.dtype))
    leading = (shares <= alpha) & kept
    overlap = linalg.matmul(linalg.matmul(u.T, delta), vt.T)
    removed = (leading[:, None] & leading[None]) | jnp.diag(kept)
    return delta - linalg.matmul(linalg.matmul(u, jnp.where(removed, overlap, 0)), vt)


@register
def opcm(alpha: Number = 0.5, rescale: bool = True) -> Method:
    """Experts in order, each without its overlap with those before; at the mean norm of the experts.

    The order of the experts matters. Tensors that are no matrices are summed, and rescaled like the rest. Without a
    survey of the whole model (in `update` alone) the norms are those of the tensor.

    Args:
        alpha: the share of the merged delta's nuclear norm whose directions are closed to the next expert; 0 removes
            only what lies along single directions.
        rescale: divide by `lambda_T`. Without it the merged delta is the sum `S`, and the report has `energy`, the
            newest expert's `||D_T||^2`, and `merged`, `||S||^2`, of each tensor: `S` as the first of two experts goes
            on with the second.

    Source: Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual
        Model Merging, arXiv 2501.09522.
    """
    check_number("opcm: alpha", alpha, 0, 1)
    return _opcm(alpha, rescale, None)


def _opcm(alpha: Any, rescale: bool, found: Found | None) -> Method:
    def update(statistic: Running, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Running:
        total, norms, count, _ = statistic
        new = delta
        if delta.ndim == 2:  # of the first expert there is nothing to remove, and no SVD to make
            new = lax.cond(count > 0, clean, lambda *_: delta, total, delta, as_array(alpha, delta.dtype))
        norm = linalg.norm(delta).reshape(())
        return Running(total + new, norms + norm, count + 1, norm)

    def solve(statistic: Running) -> tuple[Float[Array, "..."], Report]:
        total, norms, count, newest = statistic
        if not rescale:
            return total, {"energy": newest**2, "merged": jnp.sum(total**2)}
        if found is not None:
            return as_array(found.model, total.dtype) * total, {}
        return linalg.ratio(norms, count) * linalg.unit(total), {}

    def measure(seen: Seen) -> dict[str, Array]:
        statistic = init(seen.base)
        for delta in seen.deltas:
            statistic = update(statistic, delta)
        axes = tuple(range(1, seen.deltas.ndim))
        return {"experts": jnp.sum(seen.deltas**2, axis=axes), "merged": jnp.sum(statistic.total**2)}

    def look(entries: int, own: Sequence[Any]) -> Look:
        """`n_T / ||S||`; 1 where nothing was merged."""
        energies = yield Measure(measure, joint=True)
        xp = xp_of(energies)
        merged = xp.sqrt(energies["merged"])
        return xp.where(merged > 0, xp.mean(xp.sqrt(energies["experts"])) / xp.where(merged > 0, merged, 1), 1.0)

    needs = Needs("tensor", ordered=True, weights="none")
    survey = None if found or not rescale else Survey(look, lambda known: _opcm(alpha, rescale, known))
    return Method("opcm", init, update, solve, needs=needs, additive=False, survey=survey)
