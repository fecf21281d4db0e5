"""ACE-Merging: least squares against input covariances that are read off the deltas themselves.

B. Xu et al., ACE-Merging, CVPR 2026, arXiv 2603.02945v2. For one canonical weight, with deltas `D_t` (m x n,
m outputs, n inputs), `J = I - 1 1^T / m` and weights `w_t` (1 in the paper, which has none):

    n_t = ||D_t||^2,  C_t = (J D_t)^T (J D_t),  tr_t = trace(C_t)
    gate = Var_t[ln n_t] / Mean_t[ln n_t]^2;  heterogeneous where gate > tau
    a_t = 1/tr_t if heterogeneous else 1;  S_t = a_t C_t;  R_t = S_t + e_t I
    c = (s/n) 1^T sum_t w_t S_t,  s = 1/Mean_t[n_t] if heterogeneous else 1
    X = [sum_t w_t (J D_t) R_t] [sum_t w_t R_t + 1 c]^{-1}
    heterogeneous: E = sum_t w_t D_t (S_t - mean R), U s V^T = SVD(X + E) cut at k,
                   X = X + mean(s) U V^T

Every sum is additive over experts, so the statistic is a handful of arrays whatever their number, and both
branches' sums are kept: the gate may change side with the next expert. `M = sum R_t` is symmetric positive
definite and `1 c` has rank one, so with `y = M^{-1} 1` and `lam = sum_t w_t e_t`

    c M^{-1} = (s/n) (1 - lam y)^T,     X = X_0 - (X_0 1)(c M^{-1}) / (1 + c M^{-1} 1),  X_0 = B M^{-1}.

When all deltas together have fewer rows (or rank) `q` than inputs, the same is computed from the stacked rows
`F` of the `J D_t` without ever building an `n x n` matrix: `Z F (F^T F + lam I)^{-1} = Z (F F^T + lam I)^{-1} F`.

Of cores `M_t = U^T D_t V` in a joint basis (`core/joint.py`) all of it is the same with `J = I - u u^T`, `v = V^T 1` in
place of the ones, and m and n those of the dense delta: `c M^{-1} = (s/n) (v - lam y)^T`, `y = M^{-1} v`.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check, check_number
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.covariance import centred, energy
from cfmerge.least_squares import growth
from cfmerge.methods._ace_rows import factor, gram_of_rows, solve_rows
from cfmerge.methods._ace_sums import (
    TINY,
    GramSums,
    Scalars,
    Solved,
    Statistic,
    add_gram,
    add_scalars,
    gate_of,
    gram_zeros,
    positive,
    ridges,
    scalars_of,
)
from cfmerge.methods._least_squares import NOTES as SHARED_NOTES
from cfmerge.methods._least_squares import Form

GateRule = Literal["paper", "log_variance"]
ZeroDelta = Literal["drop", "keep"]


@register
def ace(
    eps: Number | None = None,
    eps_rel: Number = 0.07,
    tau: Number = 0.3,
    k_frac: float = 0.3,
    gate: GateRule = "paper",
    zero_delta: ZeroDelta = "drop",
    form: Form = "auto",
    rank: int | None = None,
) -> Method:
    """Least squares against covariances estimated from the deltas, in closed form.

    Args:
        eps: absolute ridge, as published (1e-5 CLIP, 2e-4 RoBERTa, 4e-2 GPT-2). Means a different amount of
            shrinkage in every layer and model; none: the relative one below.
        eps_rel: ridge relative to the mean eigenvalue of the experts' mean covariance (trace / in); the default
            reproduces what 1e-5 does on CLIP ViT-B/16, and is the same shrinkage for every scale of delta.
        tau: gate above which the experts' energies count as heterogeneous.
        k_frac: share of min(out, in) whose singular directions the heterogeneous refinement strengthens.
        gate: "paper", or "log_variance", its numerator alone, which does not depend on the deltas' scale.
        zero_delta: "drop" leaves experts out that did not change the tensor (or only by the same vector in
            every output); "keep" counts them, as the published code does.
        form: "full" builds the in x in Gram, "low-rank" works on stacked rows (fewer than inputs, or an
            error), "auto" on rows as long as they are fewer than the inputs.
        rank: an upper bound on the rank of every delta (LoRA fine-tuning), for the low-rank form; none: the
            deltas' own rows.

    Source: Xu et al., ACE-Merging, CVPR 2026, arXiv 2603.02945v2.
    """
    check_number("ace: eps", eps, above=0)
    check_number("ace: eps_rel", eps_rel, above=0)
    check(0 <= k_frac <= 1, f"ace: k_frac must lie in [0, 1], got {k_frac}")
    check(rank is None or rank >= 1, f"ace: rank must be at least 1, got {rank}")
    check(not (rank and form == "full"), "ace: rank is for the low-rank form, but form is 'full'")
    return _ace(eps, eps_rel, tau, k_frac, gate, zero_delta, form, rank)


def _ace(
    eps: Number | None,
    eps_rel: Number,
    tau: Number,
    k_frac: float,
    gate: GateRule,
    zero_delta: ZeroDelta,
    form: Form,
    rank: int | None,
    basis: Joint | None = None,
) -> Method:
    """The method, or that of cores in a joint basis."""

    def init(base: Float[Array, "out in"]) -> Statistic:
        m, n = base.shape
        zero = jnp.zeros((), base.dtype)
        scalars = Scalars(*(zero,) * len(Scalars._fields))
        return Statistic(scalars, gram_zeros(m, n, base.dtype) if form == "full" else ())

    def update(statistic: Statistic, delta: Float[Array, "out in"], weight: float | Array = 1.0) -> Statistic:
        forgets = isinstance(weight, int | float) and weight < 0
        n_t = energy(delta)
        rows = _centred(delta, basis)
        trace = energy(rows)
        counts = trace > jnp.finfo(delta.dtype).eps * n_t if zero_delta == "drop" else jnp.ones((), bool)
        weight = jnp.where(counts, weight, 0).astype(delta.dtype)
        scalars = add_scalars(statistic.scalars, scalars_of(n_t, trace, weight))

        sums = statistic.sums
        if isinstance(sums, GramSums):
            return Statistic(scalars, add_gram(sums, delta, rows, trace, weight))
        check(not forgets, "ace: an expert is forgotten (negative weight) from Grams only: use form='full'")
        sums = (*sums, factor(delta, rank, weight, trace))
        if form == "auto" and sum(s.right.shape[0] for s in sums) >= delta.shape[1]:
            return Statistic(scalars, gram_of_rows(sums, *delta.shape))
        return Statistic(scalars, sums)

    def solve(statistic: Statistic) -> tuple[Float[Array, "out in"], Report]:
        scalars, sums = statistic
        gate_value, heterogeneous = gate_of(scalars, gate, tau)
        s = jnp.where(heterogeneous, 1 / (linalg.weighted_mean(scalars.energy, scalars.weight) + TINY), 1)
        if isinstance(sums, GramSums):
            solved = _solve_full(scalars, sums, heterogeneous, s, eps, eps_rel, basis)
        else:
            solved = solve_rows(scalars, sums, heterogeneous, s, eps, eps_rel)
        shape = solved.merged.shape if basis is None else basis.shape
        k = int(k_frac * min(shape) + 1e-9)
        merged, kept = lax.cond(
            heterogeneous,
            lambda x: _refine(x + solved.residual(), x, k, solved.row_space),
            lambda x: (x, linalg.filled(0, x, dtype=jnp.int32)),
            solved.merged,
        )
        spread = jnp.where(heterogeneous, 0.0 if eps is None else eps * scalars.inverse_trace, 0.0)
        return merged, {
            "gate": gate_value,
            "heterogeneous": heterogeneous,
            "ridge_ratio": solved.ridge / jnp.maximum(solved.largest, jnp.finfo(s.dtype).tiny),
            "refined": kept,
            "capped": heterogeneous & (kept < k),
            "ridge_over_energy": spread,
            "no_cholesky": ~solved.held,
            "factor_error": solved.factor_error,
            "one_output": jnp.asarray(shape[0] == 1),
            "growth": growth(merged, scalars.energy, scalars.weight, scalars.experts),
        }

    def formed(bound: int | None) -> Method | None:
        if bound is None:
            return ace(eps, eps_rel, tau, k_frac, gate, zero_delta, "full")
        return ace(eps, eps_rel, tau, k_frac, gate, zero_delta, "low-rank", bound) if form == "auto" else None

    def on_cores(joint: Joint) -> Method:
        return _ace(eps, eps_rel, tau, k_frac, gate, zero_delta, "full", None, joint)

    return Method(
        "ace",
        init,
        update,
        solve,
        needs=Needs(weights="positive"),
        statistic=("ace", zero_delta, form, rank),
        by_rows=True,
        form=None if form == "full" else formed,
        notes=NOTES,
        joint=on_cores,
    )


NOTES = {
    "ridge_over_energy": (
        lambda value: value > 1,
        "eps outweighs the energy of at least one expert (sum of eps/trace is {value:.3g}): the heterogeneous "
        "refinement changes sign there; use a smaller eps, or eps_rel",
    ),
    "capped": (
        bool,
        "the refinement was cut at the numerical rank of the merged delta, which is below k_frac",
    ),
    "one_output": (bool, "one output row: centring removes all of it, so ACE leaves the base as it is"),
    **{name: SHARED_NOTES[name] for name in ("no_cholesky", "factor_error", "growth")},
}


def _centred(delta: Array, basis: Joint | None) -> Array:
    """`J D`, or `(I - u u^T) M`."""
    return centred(delta) if basis is None else delta - jnp.outer(basis.outputs, linalg.matmul(basis.outputs, delta))


def _solve_full(
    scalars: Scalars,
    sums: GramSums,
    heterogeneous: Array,
    s: Array,
    eps: Number | None,
    eps_rel: Number,
    basis: Joint | None,
) -> Solved:
    q = sums.gram.shape[0]
    n, ones = (q, jnp.ones(q, sums.gram.dtype)) if basis is None else (basis.shape[1], basis.inputs)
    gram = jnp.where(heterogeneous, sums.scaled_gram, sums.gram)
    cross = jnp.where(heterogeneous, sums.scaled_cross, sums.cross)
    absolute, relative = ridges(scalars, heterogeneous, eps, eps_rel, n)
    lam = positive(absolute * scalars.weight + relative * scalars.inverse_trace)

    system = gram + lam * jnp.eye(q, dtype=gram.dtype)
    rhs = _centred(cross + absolute * sums.total + relative * sums.scaled_total, basis)
    solution, held = linalg.solve_right(jnp.concatenate([rhs, ones[None]]), system)
    x_0, y = solution[:-1], solution[-1]
    row = (s / n) * (ones - lam * y)
    merged = x_0 - jnp.outer(jnp.sum(x_0 * ones, axis=1), row) / (1 + jnp.sum(row * ones))

    def residual() -> Array:
        return cross - linalg.weighted_mean(linalg.matmul(sums.total, system), scalars.weight)

    largest = linalg.largest_eigenvalue(system)
    return Solved(merged, residual, lam, largest, held, None, jnp.zeros_like(lam))


def _refine(target: Array, x: Array, k: int, row_space: Array | None) -> tuple[Array, Array]:
    """`x + mean(s_1..s_k) U_k V_k^T` of `target`, with `k` cut at its numerical rank; `k = 0` adds nothing."""
    if k == 0:
        return x, linalg.filled(0, x, dtype=jnp.int32)
    u, s, vt = linalg.leading(target, min(k, *target.shape), row_space)
    keep = s > max(target.shape) * jnp.finfo(s.dtype).eps * s[0]
    kept = jnp.sum(keep)
    mean = jnp.sum(jnp.where(keep, s, 0)) / jnp.maximum(kept, 1)
    return x + mean * linalg.matmul(u * keep, vt), kept.astype(jnp.int32)
