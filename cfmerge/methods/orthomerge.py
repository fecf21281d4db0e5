"""OrthoMerge: the rotations of the experts are merged as rotations, the rest by another method.

S. Yang, K. Shi, W. Liu, Orthogonal Model Merging, arXiv 2602.05943. With base `W_0` and experts `W_t`

    R_t = the rotation of the inputs that brings W_0 closest to W_t: polar(W_0^T W_t)
    Q_t = (R_t + I)^-1 (R_t - I), skew;  R_t = (I + Q_t) (I - Q_t)^-1        the Cayley map
    Q = (sum_t w_t Q_t, at unit norm) * (sum_t w_t ||Q_t|| / sum_t w_t);  R = (I + Q) (I - Q)^-1
    merged weight = W_0 R + (the residuals W_t - W_0 R_t, merged)

All three below are functions of a skew Q that need one symmetric positive definite solve:

    R - I = 2 Q (I + Q) (I + Q^T Q)^-1,     Q = (2 I + R + R^T)^-1 (R - R^T)

Where `W_0^T W_t` has not full rank (fewer outputs than inputs), the rotation that changes least is taken; where R_t
turns a direction round (eigenvalue -1, or within 2 degrees of it) Q_t has no bound, and the direction is left to the
residual.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check
from cfmerge.core.part import NO_CONTEXT, Context, Method, Part, Report
from cfmerge.core.registry import register
from cfmerge.methods.sums import task_arithmetic

REFLECTED = 2.5e-4  # (1 + cos angle) / 2, up to which a direction counts as turned round


class Experts(NamedTuple):
    """The base, and what the residuals' method is to be given."""

    base: Float[Array, "m n"]
    deltas: tuple[Float[Array, "m n"], ...]
    weights: tuple[Float[Array, ""], ...]
    contexts: tuple[Context, ...]


@register
def orthomerge(residual: Part | None = None) -> Method:
    """Rotations of the base's inputs merged on their own, the rest of the deltas by another method.

    It takes full weights, not deltas: its cost is cubic in the inputs, for every expert.

    Args:
        residual: the method that merges the residuals, such as `tsv_m` or a chain; none: `task_arithmetic`.

    Source: Yang, Shi and Liu, Orthogonal Model Merging, arXiv 2602.05943.
    """
    inner: Any = residual or task_arithmetic()
    check(isinstance(inner, Method), f"orthomerge: residual must be a method, got the transform {inner.name}")
    check(inner.survey is None, f"orthomerge: {inner.name} surveys the whole model, and cannot merge residuals")

    def init(base: Float[Array, "m n"]) -> Experts:
        return Experts(base, (), (), ())

    def update(
        statistic: Experts, delta: Float[Array, "m n"], weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> Experts:
        base, deltas, weights, contexts = statistic
        weight = jnp.asarray(weight, delta.dtype)
        return Experts(base, (*deltas, delta), (*weights, weight), (*contexts, context))

    def solve(statistic: Experts) -> tuple[Array, Report]:
        base, deltas, weights = statistic.base, jnp.stack(statistic.deltas), jnp.stack(statistic.weights)
        skews, reflected = lax.map(lambda delta: skew_of(base, delta), deltas)
        residuals = lax.map(lambda pair: pair[1] - turned(base, pair[0]), (skews, deltas))
        known = inner.init(base)
        for rest, weight, context in zip(residuals, statistic.weights, statistic.contexts, strict=True):
            known = inner.see(known, rest, weight, context)
        merged, told = inner.solve(known)
        merged = merged + turned(base, merged_skew(skews, weights))
        return jnp.where(jnp.any(deltas != 0), merged, 0), {**told, "reflected": jnp.sum(reflected)}

    return Method(
        "orthomerge",
        init,
        update,
        solve,
        needs=inner.needs.but(scope="matrix", weights="positive", normalises=True),
        additive=False,
        notes={
            **inner.notes,
            "reflected": (
                lambda value: value > 0,
                "{value:.0f} directions are turned round by an expert's rotation, which the Cayley map cannot hold: "
                "they are merged as residuals",
            ),
        },
    )


def skew_of(base: Float[Array, "m n"], delta: Float[Array, "m n"]) -> tuple[Float[Array, "n n"], Array]:
    """`Q_t`, exactly zero of a delta that is zero, and the number of directions that are turned round."""
    skew, reflected = inverse_cayley(rotation(base, base + delta))
    return jnp.where(jnp.any(delta != 0), skew, 0), reflected


@jax.custom_jvp
def rotation(base: Float[Array, "m n"], expert: Float[Array, "m n"]) -> Float[Array, "n n"]:
    """The orthogonal matrix `R` that minimises `||base R - expert||` and, among those, changes least."""
    if len(base) >= base.shape[1]:
        return _of_inputs(base, expert)

    # base^T = [Q_1 N_1] [L_1; 0] and so expert: polar(Q_1 L_1 L_2^T Q_2^T) = Q_1 polar(L_1 L_2^T) Q_2^T, of m x m
    (q1, n1, l1), (q2, n2, l2) = _bases(base), _bases(expert)
    core = linalg.polar(linalg.matmul(l1, l2.T))

    def beside(factor: Array) -> Array:
        rest = linalg.polar(linalg.matmul(n1.T, n2), _half(base)).factor
        return linalg.matmul(linalg.matmul(q1, factor), q2.T) + linalg.matmul(linalg.matmul(n1, rest), n2.T)

    def apart(factor: Array) -> Array:  # some of the m directions are none
        return _completed(core._replace(factor=linalg.matmul(linalg.matmul(q1, factor), q2.T)))

    return lax.cond(core.rank == len(base), beside, apart, core.factor)


@rotation.defjvp
def _rotation_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.jvp(_of_inputs, primals, tangents)


def _of_inputs(base: Float[Array, "m n"], expert: Float[Array, "m n"]) -> Float[Array, "n n"]:
    return _completed(linalg.polar(linalg.matmul(base.T, expert)))


def _completed(found: linalg.Polar) -> Float[Array, "n n"]:
    """A polar factor, and where it is zero on either side the rotation between both that changes least."""
    eye = jnp.eye(len(found.factor), dtype=found.factor.dtype)

    def completed(part: Array) -> Array:
        outside = linalg.matmul(eye - linalg.matmul(part, part.T), eye - linalg.matmul(part.T, part))
        return part + linalg.polar(outside, _half(part)).factor

    return lax.cond(found.rank == len(eye), lambda part: part, completed, found.factor)


def _bases(wide: Float[Array, "m n"]) -> tuple[Float[Array, "n m"], Float[Array, "n n-m"], Float[Array, "m m"]]:
    """Orthonormal bases of the rows' space and of what is orthogonal to it, and the rows' coefficients, transposed."""
    basis, coefficients = linalg.complete_qr(wide.T)
    return basis[:, : len(wide)], basis[:, len(wide) :], coefficients[: len(wide)]


def _half(like: Array) -> float:
    """The cosine up to which two directions count as orthogonal: half the digits."""
    return float(jnp.finfo(like.dtype).eps) ** 0.5


def inverse_cayley(rotated: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Array]:
    """`Q`, zero in directions that are turned round, and their number."""
    eye = jnp.eye(len(rotated), dtype=rotated.dtype)
    system, odd = 2 * eye + rotated + rotated.T, rotated - rotated.T

    def by_inverse(_: Array) -> tuple[Array, Array]:
        inverse, kept, _ = linalg.pseudo_inverse(system, REFLECTED)
        return linalg.matmul(inverse, odd), jnp.asarray(len(rotated) - kept, rotated.dtype)

    def by_solve(_: Array) -> tuple[Array, Array]:
        return linalg.solve_right(odd, system)[0], linalg.filled(0, rotated)

    near = jnp.linalg.norm(system - 4 * eye) < 2  # then all eigenvalues are above 2
    skew, reflected = lax.cond(near, by_solve, by_inverse, odd)
    return (skew - skew.T) / 2, reflected


def turned(base: Float[Array, "m n"], skew: Float[Array, "n n"]) -> Float[Array, "m n"]:
    """`base (R - I)`, by the smaller side."""
    eye = jnp.eye(len(skew), dtype=skew.dtype)
    if len(base) > len(skew):
        return linalg.matmul(base, turned(eye, skew))
    image = linalg.matmul(base, skew)
    return linalg.solve_right(2 * (image + linalg.matmul(image, skew)), eye + linalg.gram(skew))[0]


def merged_skew(skews: Float[Array, "T n n"], weights: Float[Array, " T"]) -> Float[Array, "n n"]:
    """Their direction, at their mean norm."""
    total = linalg.weighted_sum(weights, skews)
    norms = linalg.norm(skews, (1, 2)).ravel()
    return linalg.unit(total) * linalg.ratio(jnp.sum(weights * norms), jnp.sum(weights))
