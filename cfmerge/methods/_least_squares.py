"""Weighted least squares: one statistic and one solve for all methods that regress on the deltas.

For one canonical weight, with deltas `D_t` (m x n), weights `w_t`, estimates `S_t` of the input covariance scaled by
`a_t` (1, `1/||D_t||`, `1/||D_t||^2` or `1/trace S_t`; 0 where the delta is zero), an anchor `X_a` and a ridge `rho`:

    min_X  sum_t w_t a_t tr((X - D_t) S_t (X - D_t)^T) + rho ||X - X_a||^2

    G = sum_t w_t a_t S_t,   K = sum_t w_t a_t D_t S_t,   N = sum_t w_t D_t
    X = (K + rho X_a)(G + rho I)^{-1} = X_a + (K - X_a G)(G + rho I)^{-1}

and, with `G = Q diag(l) Q^T` and a filter `h(l)` instead of the ridge,

    X = X_a + (K - X_a G) Q diag(h(l)/l) Q^T.

While all estimates together have fewer rows `R` than inputs, no `n x n` matrix is built: with their stacked rows
`F = [sqrt(w_t a_t) F_t]`, `G = F^T F`, and `Z = [sqrt(w_t a_t) D_t F_t^T]`, `K = Z F`, the push-through identity gives

    X = X_a + (Z - X_a F^T)(F F^T + rho I)^{-1} F,       F F^T = U diag(l) U^T for a filter;

what lies outside the row space of `F` is the anchor's in both forms.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report
from cfmerge.covariance import Estimate, energy, of_delta, of_rank

Normalise = Literal["none", "norm", "energy", "trace"]
Form = Literal["auto", "full", "low-rank"]
Anchor = Literal["zero", "mean", "sum"]


class Grams(NamedTuple):
    """`G`, `K`, and `kappa = sum_t w_t a_t tr(D_t S_t D_t^T)`."""

    gram: Float[Array, "n n"]
    cross: Float[Array, "m n"]
    kappa: Float[Array, ""]


class Rows(NamedTuple):
    """One expert: `a_t S_t = (scale rows)^T (scale rows)`; `left = D_t rows^T` (None: the rows are `D_t` itself)."""

    rows: Float[Array, "r n"]
    left: Float[Array, "m r"] | None
    scale: Float[Array, ""]
    weight: Float[Array, ""]
    error: Float[Array, ""]


class Statistic(NamedTuple):
    """`N`, `sum_t w_t`, `sum_t w_t ||D_t||^2`, the estimates' number of rows, and `Grams` or every expert's `Rows`."""

    total: Float[Array, "m n"]
    weight: Float[Array, ""]
    energy: Float[Array, ""]
    samples: Float[Array, ""]
    experts: Grams | tuple[Rows, ...]


Solution = Callable[[Statistic], tuple[Array, Report]]


def least_squares(
    solution: Solution,
    estimate: Callable[[Array], Estimate] = of_delta,
    key: Hashable = "delta",
    normalise: Normalise = "none",
    form: Form = "auto",
    rank: int | None = None,
    notes: Mapping[str, Any] | None = None,
    normalises: bool = False,
) -> Method:
    """The method of a solution, `statistic -> (merged, report)`.

    Args:
        estimate: of the covariance of one delta.
        key: names the estimate; methods with the same one (and `normalise`, `form`) share their statistic. None:
            it cannot be shared.
        normalise: what `a_t` is.
        form: "full" builds the Gram, "low-rank" stacks rows (fewer than inputs, or an error), "auto" stacks them
            as long as they are fewer than the inputs.
        rank: a bound on the rank of the deltas, for the low-rank form.
        notes: see `Method`; normalises: see `Needs`.
    """
    estimated = functools.partial(of_rank, rank=rank) if rank else estimate

    def init(base: Float[Array, "m n"]) -> Statistic:
        zero = jnp.zeros((), base.dtype)
        return Statistic(jnp.zeros_like(base), zero, zero, zero, _no_grams(base) if form == "full" else ())

    def update(statistic: Statistic, delta: Float[Array, "m n"], weight: float | Array = 1.0) -> Statistic:
        if form != "full" and not isinstance(weight, jax.core.Tracer):
            check(float(weight) >= 0, "least squares: a negative weight (forgetting an expert) needs form='full'")
        weight = as_array(weight, delta.dtype)
        expert = _rows(estimated(delta), delta, normalise, weight, isinstance(statistic.experts, Grams))
        sums = (
            statistic.total + weight * delta,
            statistic.weight + weight,
            statistic.energy + weight * energy(delta),
            statistic.samples + jnp.where(expert.scale > 0, jnp.sign(weight), 0) * delta.shape[0],
        )
        if isinstance(statistic.experts, Grams):
            return Statistic(*sums, _add(statistic.experts, expert, delta))
        experts = (*statistic.experts, expert)
        if form == "auto" and sum(e.rows.shape[0] for e in experts) >= delta.shape[1]:
            grams = _no_grams(delta)
            for e in experts:
                grams = _add(grams, e, e.rows)
            return Statistic(*sums, grams)
        return Statistic(*sums, experts)

    def solve(statistic: Statistic) -> tuple[Array, Report]:
        merged, told = solution(statistic)
        experts = statistic.samples / statistic.total.shape[0]
        return merged, {
            **told,
            **_told_of_rows(statistic),
            **growth(merged, statistic.energy, statistic.weight, experts),
        }

    def formed(bound: int | None) -> Method | None:
        if bound is None:
            return least_squares(solution, estimate, key, normalise, "full", None, notes, normalises)
        if estimate is not of_delta or form != "auto":
            return None
        return least_squares(solution, estimate, key, normalise, "low-rank", bound, notes, normalises)

    return Method(
        "least_squares",
        init,
        update,
        solve,
        needs=Needs(weights="any" if form == "full" else "positive", normalises=normalises),
        statistic=None if key is None else ("least_squares", key, normalise, form, rank),
        form=None if form == "full" else formed,
        notes=NOTES | dict(notes or {}),
    )


NOTES: dict[str, tuple[Callable[[float], bool], str]] = {
    "no_cholesky": (bool, "the Cholesky factorisation failed; solved by eigenvalues with a floor"),
    "factor_error": (
        lambda value: value > 1e-4,
        "a delta is not of the given rank: relative error {value:.1e}; raise rank, or leave it out",
    ),
    "ignored": (bool, "negative weights count as none on stacked rows; an expert is forgotten with form='full'"),
    "growth": (
        lambda value: value > 2,
        "the merged delta is up to {value:.1f} times as long as the sum of as many unrelated deltas: the estimated "
        "covariances are small where the deltas differ, as those of LoRA from one start do. Evaluate the merge; a "
        "larger ridge (ace: eps_rel=7), or dc_merge, which divides by none, may be better",
    ),
}


def growth(merged: Array, energy: Array, weight: Array, experts: Array) -> Report:
    """`||X|| / sqrt(T mean ||D_t||^2)`: at most about 1 of a merge that keeps every expert's part once."""
    unrelated = jnp.sqrt(jnp.maximum(experts * linalg.ratio(energy, weight), 0))
    return {"growth": lax.stop_gradient(linalg.ratio(linalg.norm(merged).reshape(()), unrelated))}


# --- the statistic ------------------------------------------------------------------------------------------------


def _no_grams(like: Float[Array, "m n"]) -> Grams:
    m, n = like.shape
    return Grams(jnp.zeros((n, n), like.dtype), jnp.zeros((m, n), like.dtype), jnp.zeros((), like.dtype))


def _rows(found: Estimate, delta: Array, normalise: Normalise, weight: Array, full: bool) -> Rows:
    if normalise == "none":
        scale = jnp.ones((), delta.dtype)
    else:
        size = energy(found.rows) if normalise == "trace" else energy(delta)
        root = jnp.sqrt(jnp.where(size > 0, size, 1))
        scale = jnp.where(size > 0, 1 / (jnp.sqrt(root) if normalise == "norm" else root), 0)
    left = found.left
    if left is None and found.rows is not delta and not full:
        left = linalg.matmul(delta, found.rows.T)
    return Rows(found.rows, left, scale, weight, as_array(found.error, delta.dtype))


def _add(grams: Grams, expert: Rows, delta: Array) -> Grams:
    rows = expert.scale * expert.rows
    gram = linalg.gram(rows)
    if expert.left is None:
        cross = linalg.times_gram(delta, rows, gram)
        kappa = jnp.sum(cross * delta)
    else:
        left = expert.scale * expert.left
        cross, kappa = linalg.matmul(left, rows), jnp.sum(left * left)
    w = expert.weight
    return Grams(grams.gram + w * gram, grams.cross + w * cross, grams.kappa + w * kappa)


def stacked(experts: tuple[Rows, ...]) -> tuple[Float[Array, "R n"], Float[Array, "m R"]]:
    """`F` and `Z`, with `G = F^T F` and `K = Z F`."""
    f, z = [], []
    for expert in experts:
        factor = jnp.sqrt(jnp.maximum(expert.weight, 0)) * expert.scale
        left = linalg.matmul(expert.rows, expert.rows.T) if expert.left is None else expert.left
        f.append(factor * expert.rows)
        z.append(factor * left)
    rows, inputs = sum(block.shape[0] for block in f), f[0].shape[1]
    check(
        rows < inputs,
        f"least squares: the low-rank form has {rows} rows for {inputs} inputs, where it is neither cheaper nor "
        "more accurate; use form='auto'",
    )
    return jnp.concatenate(f), jnp.concatenate(z, axis=1)


def _told_of_rows(statistic: Statistic) -> Report:
    zero = jnp.zeros((), statistic.total.dtype)
    experts = () if isinstance(statistic.experts, Grams) else statistic.experts
    return {
        "factor_error": jnp.max(jnp.stack([zero, *(e.error for e in experts)])),
        "ignored": jnp.any(jnp.stack([zero < 0, *(e.weight < 0 for e in experts)])),
    }


def anchor_of(statistic: Statistic, anchor: Anchor | Array) -> Array | None:
    """The anchor `X_a`: None for zero, `N / sum_t w_t`, `N`, or the array that is given."""
    if not isinstance(anchor, str):
        return anchor
    if anchor == "mean":
        return linalg.weighted_mean(statistic.total, statistic.weight)
    return statistic.total if anchor == "sum" else None


# --- the solve ----------------------------------------------------------------------------------------------------


def solve_ridge(statistic: Statistic, ridge: Number, anchor: Anchor | Array = "zero") -> tuple[Array, Report]:
    """`X = (K + rho X_a)(G + rho I)^{-1}` by one Cholesky factorisation; `rho = ridge trace(G)/n`."""
    target = anchor_of(statistic, anchor)
    dtype, n = statistic.total.dtype, statistic.total.shape[1]
    if isinstance(statistic.experts, Grams):
        gram, cross, _ = statistic.experts
        trace = jnp.trace(gram)
    else:
        f, z = stacked(statistic.experts)
        gram = linalg.matmul(f, f.T)
        trace = jnp.trace(gram)
        cross = z if target is None else z - linalg.matmul(target, f.T)
    rho = as_array(ridge, dtype) * jnp.where(trace > 0, trace / n, 1)
    system = gram + rho * jnp.eye(len(gram), dtype=dtype)
    if isinstance(statistic.experts, Grams):
        merged, held = linalg.solve_right(cross if target is None else cross + rho * target, system)
    else:
        core, held = linalg.solve_right(cross, system)
        merged = linalg.matmul(core, f)
        merged = merged if target is None else target + merged
    merged = jnp.where(trace == 0, 0 if target is None else target, merged)
    largest = linalg.largest_eigenvalue(system)
    ratio = jnp.where(trace > 0, rho / jnp.maximum(largest, jnp.finfo(dtype).tiny), 1)
    return merged, {"ridge_ratio": ratio, "no_cholesky": ~held & (trace > 0)}
