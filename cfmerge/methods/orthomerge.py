"""OrthoMerge: what experts rotated is merged as rotations, the rest by another method.

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

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg, singular
from cfmerge.methods._base import NO_CONTEXT, Context, Method, Part, Report
from cfmerge.methods._registry import check, register
from cfmerge.methods._stack import ratio
from cfmerge.methods.sums import task_arithmetic

REFLECTED = 2.5e-4  # (1 + cos angle) / 2, up to which a direction counts as turned round


class Seen(NamedTuple):
    """The base, and what the residuals' method is to be given."""

    base: Float[Array, "m n"]
    deltas: tuple[Float[Array, "m n"], ...]
    weights: tuple[Float[Array, ""], ...]
    contexts: tuple[Context, ...]


@register
def orthomerge(residual: Part | None = None) -> Method:
    """Rotations of the base's inputs merged on their own, what is not a rotation by another method.

    It takes full weights, not deltas: its cost is cubic in the inputs, for every expert.

    Args:
        residual: the method that merges the residuals, such as `tsv_m` or a chain; none: `task_arithmetic`.

    Source: Yang, Shi and Liu, Orthogonal Model Merging, arXiv 2602.05943.
    """
    inner: Any = residual or task_arithmetic()
    check(isinstance(inner, Method), f"orthomerge: residual must be a method, got the transform {inner.name}")
    check(inner.survey is None, f"orthomerge: {inner.name} surveys the whole model, and cannot merge residuals")

    def init(base: Float[Array, "m n"]) -> Seen:
        return Seen(base, (), (), ())

    def update(
        statistic: Seen, delta: Float[Array, "m n"], weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> Seen:
        base, deltas, weights, contexts = statistic
        weight = jnp.asarray(weight, delta.dtype)
        return Seen(base, (*deltas, delta), (*weights, weight), (*contexts, context))

    def report(statistic: Seen) -> tuple[Array, Report]:
        base, deltas, weights = statistic.base, jnp.stack(statistic.deltas), jnp.stack(statistic.weights)
        skews, reflected = lax.map(lambda delta: skew_of(base, delta), deltas)
        residuals = lax.map(lambda pair: pair[1] - linalg.matmul(base, cayley(pair[0])), (skews, deltas))
        known = inner.init(base)
        for rest, weight, context in zip(residuals, statistic.weights, statistic.contexts, strict=True):
            known = inner.see(known, rest, weight, context)
        merged, told = inner.solve_with_report(known)
        merged = merged + linalg.matmul(base, cayley(merged_skew(skews, weights)))
        return jnp.where(jnp.any(deltas != 0), merged, 0), {**told, "reflected": jnp.sum(reflected)}

    return Method(
        "orthomerge",
        init,
        update,
        lambda statistic: report(statistic)[0],
        report,
        random=inner.random,
        additive=False,
        ordered=inner.ordered,
        experts=inner.experts,
        weights="positive",
        normalises=True,
        moments=inner.moments,
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


def rotation(base: Float[Array, "m n"], expert: Float[Array, "m n"]) -> Float[Array, "n n"]:
    """The orthogonal matrix `R` that minimises `||base R - expert||` and, among those, changes least."""
    found = singular.polar(linalg.matmul(base.T, expert))
    part, eye = found.factor, jnp.eye(base.shape[1], dtype=base.dtype)

    def completed(part: Array) -> Array:
        outside = linalg.matmul(eye - linalg.matmul(part, part.T), eye - linalg.matmul(part.T, part))
        return part + singular.polar(outside, float(jnp.finfo(part.dtype).eps) ** 0.5).factor

    return lax.cond(found.rank == base.shape[1], lambda part: part, completed, part)


def inverse_cayley(rotated: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Array]:
    """`Q`, zero in directions that are turned round, and their number."""
    eye = jnp.eye(len(rotated), dtype=rotated.dtype)
    inverse, kept, _ = linalg.pseudo_inverse(2 * eye + rotated + rotated.T, REFLECTED)
    skew = linalg.matmul(inverse, rotated - rotated.T)
    return (skew - skew.T) / 2, len(rotated) - kept


def cayley(skew: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`R - I`."""
    eye = jnp.eye(len(skew), dtype=skew.dtype)
    numerator = 2 * linalg.matmul(skew, eye + skew)
    return linalg.solve_right(numerator, eye + linalg.matmul(skew.T, skew))[0]


def merged_skew(skews: Float[Array, "T n n"], weights: Float[Array, " T"]) -> Float[Array, "n n"]:
    """Their direction, at their mean norm."""
    total = jnp.tensordot(weights, skews, 1, precision=linalg.HIGHEST)
    norms = linalg.norm(skews, (1, 2)).ravel()
    return linalg.unit(total) * ratio(jnp.sum(weights * norms), jnp.sum(weights))
