"""ACE's statistic, and the parts that its solves share. Symbols and equations: `ace.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cfmerge import linalg
from cfmerge.core.numbers import Number

TINY = 1e-12  # the published code adds it to every trace, energy and denominator
Scalar = Float[Array, ""]


class Scalars(NamedTuple):
    """Sums over the experts that count (see `zero_delta`). The gate is unweighted, the rest is weighted."""

    weight: Scalar  # sum w_t
    energy: Scalar  # sum w_t n_t
    trace: Scalar  # sum w_t tr_t
    inverse_trace: Scalar  # sum w_t / tr_t
    experts: Scalar
    log_energy: Scalar  # sum ln n_t
    log_energy_squared: Scalar


class GramSums(NamedTuple):
    """The full form: sums with `a_t = 1`, and the same with `a_t = 1/tr_t` (`scaled_`)."""

    gram: Float[Array, "in in"]  # sum w_t a_t C_t
    cross: Float[Array, "out in"]  # sum w_t a_t D_t C_t, not centred
    total: Float[Array, "out in"]  # sum w_t a_t D_t
    scaled_gram: Float[Array, "in in"]
    scaled_cross: Float[Array, "out in"]
    scaled_total: Float[Array, "out in"]


class Rows(NamedTuple):
    """One expert of the narrow form, `D = left @ right`; `left` is the identity where it is None."""

    left: Float[Array, "out r"] | None
    right: Float[Array, "r in"]
    weight: Scalar  # 0 for an expert that does not count
    trace: Scalar
    error: Scalar  # relative error of the factorisation


class Statistic(NamedTuple):
    """ACE's statistic of the experts that it has seen."""

    scalars: Scalars
    sums: GramSums | tuple[Rows, ...]


class Solved(NamedTuple):
    """The result of either form, for the refinement and the report."""

    merged: Array  # X without refinement
    residual: Callable[[], Array]  # E, needed by the heterogeneous branch alone
    ridge: Array  # lam
    largest: Array  # largest eigenvalue of the system, from below
    held: Array
    row_space: Array | None
    factor_error: Array


def scalars_of(n_t: Array, trace: Array, weight: Array) -> Scalars:
    """One expert's share of the sums."""
    sign = jnp.sign(weight)  # -1 forgets an expert, 0 is one that does not count
    log = jnp.log(n_t + TINY)
    return Scalars(weight, weight * n_t, weight * trace, weight / (trace + TINY), sign, sign * log, sign * log * log)


def add_scalars(a: Scalars, b: Scalars) -> Scalars:
    return Scalars(*(x + y for x, y in zip(a, b, strict=True)))


def gate_of(scalars: Scalars, kind: str, tau: Number) -> tuple[Scalar, Bool[Array, ""]]:
    """`Var[ln n] / (Mean[ln n]^2 + 1e-12)` with the unbiased variance; one expert is homogeneous."""
    count = scalars.experts
    mean = linalg.weighted_mean(scalars.log_energy, count)
    variance = (scalars.log_energy_squared - count * mean**2) / jnp.maximum(count - 1, 1)
    value = jnp.maximum(variance, 0) / ((mean**2 + TINY) if kind == "paper" else 1)
    value = jnp.where(count > 1, value, 0)
    return value, value > tau


def ridges(scalars: Scalars, heterogeneous: Array, eps: Number | None, eps_rel: Number, n: int) -> tuple[Array, Array]:
    """`e_t = absolute + relative / tr_t` for every expert: the two numbers `(absolute, relative)`."""
    if eps is None:
        scale = linalg.weighted_mean(scalars.trace, scalars.weight) / n
        return jnp.where(heterogeneous, eps_rel / n, eps_rel * scale), jnp.zeros_like(scale)
    eps_array = jnp.asarray(eps, scalars.weight.dtype)
    return jnp.where(heterogeneous, 0, eps_array), jnp.where(heterogeneous, eps_array, 0)


def positive(ridge: Array) -> Array:
    """The ridge, or 1 where no expert counted (all sums are zero and so is the solution)."""
    return jnp.where(ridge > 0, ridge, 1)


def gram_zeros(m: int, n: int, dtype: jnp.dtype) -> GramSums:
    square, flat = jnp.zeros((n, n), dtype), jnp.zeros((m, n), dtype)
    return GramSums(square, flat, flat, square, flat, flat)


def add_gram(sums: GramSums, delta: Array, rows: Array, trace: Array, weight: Array) -> GramSums:
    """One more expert, of delta `D_t`, centred rows `J D_t` and centred trace `tr_t`."""
    covariance = linalg.gram(rows)
    one = (covariance, linalg.times_gram(delta, rows, covariance), delta)
    scaled = weight / (trace + TINY)
    return GramSums(
        *(total + weight * term for total, term in zip(sums[:3], one, strict=True)),
        *(total + scaled * term for total, term in zip(sums[3:], one, strict=True)),
    )
