"""The methods that regress on the deltas: which covariances go into the sums, in which form, and what is told.

Sums and solve are those of `cfmerge.least_squares`, with the covariances `a_t S_t`: `S_t` is estimated from `D_t`, and
`a_t` is 1, `1/||D_t||`, `1/||D_t||^2` or `1/trace S_t` (0 where the delta is zero). While all estimates together have
fewer rows than inputs, the sums keep rows: no `in x in` matrix is built. A method is what it makes of the sums.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Note, Report
from cfmerge.covariance import Estimate, energy, of_delta, of_rank, scaled, unit_trace
from cfmerge.least_squares import GROWN, Anchor, Grams, Sums, add, full, growth, init, solve

Normalise = Literal["none", "norm", "energy", "trace"]
Form = Literal["auto", "full", "low-rank"]
Shape = tuple[int, int]  # of a dense delta, which a method's constants refer to, also where it sees cores
Solution = Callable[[Sums, Shape], tuple[Array, Report]]


def least_squares(
    solution: Solution,
    estimate: Callable[[Array], Estimate] = of_delta,
    key: Hashable = "delta",
    normalise: Normalise = "none",
    form: Form = "auto",
    rank: int | None = None,
    notes: Mapping[str, Note] | None = None,
    normalises: bool = False,
    joint: bool = True,
    shape: Shape | None = None,
) -> Method:
    """The method of a solution, `(sums, shape) -> (merged, report)`.

    Args:
        estimate: of the covariance of one delta.
        key: names the estimate; methods with the same one (and `normalise`, `form`) share their sums. None: they cannot
            be shared.
        normalise: what `a_t` is.
        form: "full" keeps Grams, "low-rank" rows (fewer than inputs, or an error), "auto" rows as long as they are
            fewer than the inputs.
        rank: a bound on the rank of the deltas, for the low-rank form.
        notes: see `Method`; normalises: see `Needs`.
        joint: it commutes with orthonormal bases of outputs and inputs.
        shape: of the dense deltas whose cores it sees; none: it sees the deltas.
    """
    estimated = functools.partial(of_rank, rank=rank) if rank else estimate

    def update(sums: Sums, delta: Float[Array, "m n"], weight: float | Array = 1.0) -> Sums:
        if form != "full" and not isinstance(weight, jax.core.Tracer):
            check(float(weight) >= 0, "least squares: a negative weight (forgetting an expert) needs form='full'")
        found = _normalised(estimated(delta), delta, normalise)
        return add(_with_room(sums, len(found.rows), form), delta, found, weight)

    def solve(sums: Sums) -> tuple[Array, Report]:
        merged, told = solution(sums, shape or sums.total.shape)  # type: ignore[arg-type]
        return merged, {**told, **_told_of(sums, merged)}

    def formed(bound: int | None) -> Method | None:
        if bound is None:
            return least_squares(solution, estimate, key, normalise, "full", None, notes, normalises, joint)
        if estimate is not of_delta or form != "auto":
            return None
        return least_squares(solution, estimate, key, normalise, "low-rank", bound, notes, normalises, joint)

    def on_cores(basis: Joint) -> Method:
        return least_squares(solution, estimate, key, normalise, "full", None, notes, normalises, joint, basis.shape)

    return Method(
        "least_squares",
        functools.partial(init, rows=form != "full"),
        update,
        solve,
        needs=Needs(weights="any" if form == "full" else "positive", normalises=normalises),
        statistic=None if key is None else ("least_squares", key, normalise, form, rank),
        by_rows=estimate is of_delta,
        form=None if form == "full" else formed,
        notes=NOTES | dict(notes or {}),
        joint=on_cores if joint else False,
    )


def solved(sums: Sums, shape: Shape, ridge: Number, anchor: Anchor | Array = "zero") -> tuple[Array, Report]:
    """The solution with a ridge relative to the mean of as many eigenvalues as a dense delta has inputs."""
    return solve(sums, ridge * (sums.total.shape[1] / shape[1]), anchor)


NOTES: dict[str, Note] = {
    "no_cholesky": (bool, "the Cholesky factorisation failed; solved by eigenvalues with a floor"),
    "factor_error": (
        lambda value: value > 1e-4,
        "a delta is not of the given rank: relative error {value:.1e}; raise rank, or leave it out",
    ),
    "ignored": (bool, "negative weights count as none on stacked rows; an expert is forgotten with form='full'"),
    "growth": (
        lambda value: value > GROWN,
        "the merged delta is up to {value:.1f} times as long as the sum of as many unrelated deltas: the estimated "
        "covariances are small where the deltas differ, as those of LoRA from one start do. Evaluate the merge; a "
        "larger ridge (ace: eps_rel=7), or dc_merge, which divides by none, may be better",
    ),
}


def _normalised(found: Estimate, delta: Float[Array, "m n"], normalise: Normalise) -> Estimate:
    """`a_t S_t`."""
    if normalise == "none":
        return found
    if normalise == "trace":
        return unit_trace(found)
    size = linalg.root(energy(delta)) if normalise == "norm" else energy(delta)
    return scaled(found, linalg.ratio(1.0, size))


def _with_room(sums: Sums, more: int, form: Form) -> Sums:
    """The sums in the form that can take so many rows more."""
    if isinstance(sums.experts, Grams):
        return sums
    rows, inputs = more + sum(len(expert.rows) for expert in sums.experts), sums.total.shape[1]
    check(
        form == "auto" or rows < inputs,
        f"least squares: the low-rank form has {rows} rows for {inputs} inputs, where it is neither cheaper nor "
        "more accurate; use form='auto'",
    )
    return sums if rows < inputs else full(sums)


def _told_of(sums: Sums, merged: Float[Array, "m n"]) -> Report:
    """The report that every solution has."""
    experts = () if isinstance(sums.experts, Grams) else sums.experts
    zero = jnp.zeros((), merged.dtype)
    return {
        "factor_error": jnp.max(jnp.stack([zero, *(expert.error for expert in experts)])),
        "ignored": jnp.any(jnp.stack([zero < 0, *(expert.weight < 0 for expert in experts)])),
        "growth": growth(merged, sums.energy, sums.weight, sums.samples / len(merged)),
    }
