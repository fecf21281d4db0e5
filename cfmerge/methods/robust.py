"""Least squares with weights that are found, and with covariances on both sides.

Cauchy product of experts (arXiv 2607.01689): regression on the output side, `L_t = D_t D_t^T`, where an expert that
the merge cannot please loses weight,

    a_t = w_t / (||D_t^T (X - D_t)||^2 + eps ||D_t||^2),    X = (sum_t a_t L_t + j I)^{-1} sum_t a_t L_t D_t,

repeated. On `D_t^T` it is a regression on the input side, and that is how it is computed.

Two-sided (MaTS, arXiv 2312.04339): `sum_t w_t A_t X B_t = sum_t w_t A_t D_t B_t` with `A_t` of outputs and `B_t` of
inputs, by conjugate gradients. Without data `A_t = (D_t D_t^T)^p`, `B_t = (D_t^T D_t)^q`, each divided by its trace:
from `D_t = U diag(s) V^T`, `A_t X B_t = U (s^{2p} (U^T X V) s^{2q}) V^T`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.covariance import energy


@register
def cauchy_poe(eps: Number = 0.1, jitter: Number = 1e-3, iterations: int = 50, tolerance: Number = 1e-5) -> Method:
    """Least squares on the outputs' side in which experts that disagree with the rest lose weight.

    Args:
        eps: how soon an expert loses weight, against its residual; 0.01 to 0.3 in the paper.
        jitter: ridge towards zero; the weighted Gram is of size 1/eps.
        iterations: at most so many.
        tolerance: relative change of the merged delta below which they end.

    Source: Cauchy product of experts, arXiv 2607.01689.
    """
    check_number("cauchy_poe: eps", eps, above=0)
    check_number("cauchy_poe: jitter", jitter, above=0)
    check_number("cauchy_poe: tolerance", tolerance, 0)
    check(iterations >= 1, f"cauchy_poe: iterations must be at least 1, got {iterations}")

    def on_rows(base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"]) -> tuple[Array, Report]:
        merged, told = _reweighted(jnp.swapaxes(deltas, 1, 2), weights, eps, jitter, iterations, tolerance)
        return merged.T, told

    notes = {
        "change": (
            lambda value: value > 1e-3,
            "the weights had not settled; the last step changed the merge by {value:.1e}; allow more iterations",
        ),
        "no_cholesky": (bool, "the Cholesky factorisation failed; solved by eigenvalues with a floor"),
    }
    return of_deltas(on_rows, Needs(weights="positive", normalises=True), notes=notes, joint=True)


class Settling(NamedTuple):
    """The state of the reweighting."""

    merged: Array
    change: Array
    steps: Array
    held: Array
    ratio: Array


def _reweighted(
    deltas: Float[Array, "T m n"],
    weights: Float[Array, " T"],
    eps: Number,
    jitter: Number,
    iterations: int,
    tolerance: Number,
) -> tuple[Float[Array, "m n"], Report]:
    """The input side: `a_t = w_t / (||(X - D_t) D_t^T||^2 + eps ||D_t||^2)`, `X = K (G + j I)^{-1}`."""
    dtype, n = deltas.dtype, deltas.shape[2]
    eps, jitter, tolerance = (as_array(value, dtype) for value in (eps, jitter, tolerance))
    tiny = jnp.finfo(dtype).tiny
    size = jax.vmap(energy)(deltas)
    grams = lax.map(linalg.gram, deltas)
    crosses = lax.map(lambda pair: linalg.times_gram(pair[0], *pair), (deltas, grams))

    def scales(x: Array) -> Array:
        def residual(arguments: tuple[Array, Array]) -> Array:
            delta, gram = arguments
            difference = x - delta
            if delta.shape[0] < n:
                return energy(linalg.matmul(difference, delta.T))
            return jnp.maximum(jnp.sum(difference * linalg.matmul(difference, gram)), 0)

        total = lax.map(residual, (deltas, grams)) + eps * size
        return jnp.where(size > 0, weights / jnp.where(size > 0, total, 1), 0)

    def step(state: Settling) -> Settling:
        a = scales(state.merged)
        gram = linalg.weighted_sum(a, grams) + jitter * jnp.eye(n, dtype=dtype)
        merged, held = linalg.solve_right(linalg.weighted_sum(a, crosses), gram)
        new, old = lax.stop_gradient((merged, state.merged))
        change = (linalg.norm(new - old) / jnp.maximum(linalg.norm(new), tiny))[0, 0]
        ratio = jitter / linalg.largest_eigenvalue(lax.stop_gradient(gram))
        return Settling(merged, change, state.steps + 1, held & state.held, ratio)

    mean = linalg.weighted_mean(linalg.weighted_sum(weights, deltas), jnp.sum(weights))
    one, steps = linalg.filled(1, mean), linalg.filled(0, mean, dtype=jnp.int32)
    state = Settling(mean, one, steps, linalg.filled(True, mean, dtype=bool), one)
    state = lax.fori_loop(  # not a while loop: that could not be differentiated backwards
        0, iterations, lambda _, s: lax.cond(s.change > tolerance, step, lambda s: s, s), state
    )
    told = {"iterations": state.steps, "change": state.change, "no_cholesky": ~state.held, "ridge_ratio": state.ratio}
    return state.merged, told


@register
def two_sided(
    output_power: Number = 0.25, input_power: Number = 0.5, iterations: int = 30, scale: Number = 1.0
) -> Method:
    """Least squares with a covariance on both sides, outputs and inputs, by conjugate gradients from the mean.

    Args:
        output_power: exponent of `D D^T`, the covariance of the outputs' gradients; 1 and 1 overshoot.
        input_power: exponent of `D^T D`, the covariance of the inputs.
        iterations: steps of conjugate gradients; to stop early is the regulariser (10 to 100).
        scale: a factor of the merged delta.

    Source: Tam et al., Merging by Matching Models in Task Subspaces (MaTS), TMLR 2024, arXiv 2312.04339; without data.
    """
    check_number("two_sided: output_power", output_power, 0, 2)
    check_number("two_sided: input_power", input_power, 0, 2)
    check_number("two_sided: scale", scale)
    check(iterations >= 0, f"two_sided: iterations must not be negative, got {iterations}")

    def matched(base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"]) -> tuple[Array, Report]:
        mean = linalg.weighted_mean(linalg.weighted_sum(weights, deltas), jnp.sum(weights))
        sides = lax.map(lambda delta: _sides(delta, output_power, input_power), deltas)

        def times(x: Array) -> Array:  # sum_t w_t A_t X B_t
            def one(total: Array, expert: tuple[Sides, Array]) -> tuple[Array, None]:
                (u, a, b, vt), weight = expert
                if len(u) <= vt.shape[1]:  # the longer side is left first and met again last
                    inner = linalg.matmul(u.T, linalg.matmul(x, vt.T))
                    return total + linalg.matmul(linalg.matmul(u * (weight * a), inner * b), vt), None
                inner = linalg.matmul(linalg.matmul(u.T, x), vt.T)
                return total + linalg.matmul(u * (weight * a), linalg.matmul(inner * b, vt)), None

            return lax.scan(one, jnp.zeros_like(x), (sides, weights))[0]

        def target(total: Array, expert: tuple[Sides, Array, Array]) -> tuple[Array, None]:
            (u, a, b, vt), weight, delta = expert
            s = jnp.sum(u * linalg.matmul(delta, vt.T), axis=0)
            return total + linalg.matmul(u * (weight * a * s * b), vt), None

        goal = lax.scan(target, jnp.zeros_like(mean), (sides, weights, deltas))[0]
        merged, residual = linalg.conjugate_gradients(times, goal, mean, iterations)
        return as_array(scale, mean.dtype) * merged, {"residual": residual}

    return of_deltas(matched, Needs(weights="positive", normalises=True), joint=True)


class Sides(NamedTuple):
    """`A = U diag(a) U^T` and `B = V diag(b) V^T` of one delta."""

    u: Float[Array, "m r"]
    a: Float[Array, " r"]
    b: Float[Array, " r"]
    vt: Float[Array, "r n"]


def _sides(delta: Float[Array, "m n"], p: Number, q: Number) -> Sides:
    u, s, vt = linalg.thin_svd(delta)
    keep = s > max(delta.shape) * jnp.finfo(s.dtype).eps * s[0]

    def powered(exponent: Number) -> Array:
        values = jnp.where(keep, (jnp.where(keep, s, 1) / jnp.where(keep[0], s[0], 1)) ** (2 * exponent), 0)
        total = jnp.sum(values)
        return values / jnp.where(total > 0, total, 1)

    return Sides(u, powered(as_array(p, s.dtype)), powered(as_array(q, s.dtype)), vt)
