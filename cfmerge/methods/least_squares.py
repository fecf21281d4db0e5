"""Least squares against covariances of the deltas themselves: ACTMat, TACT, any anchor, any power.

The deltas `D_t` are regressed on inputs of covariance `S_t`, `X = argmin sum_t w_t a_t tr((X - D_t) S_t (X - D_t)^T)`
plus a ridge to an anchor; see `_least_squares` for the equations of the solve. With `C_t = D_t^T D_t`:

    actmat     S_t = C_t                         pseudo-inverse        arXiv 2604.01329
    tact       S_t = trim(D_t)^T trim(D_t)       pseudo-inverse        the same
    anchored   S_t = C_t / ||D_t||^2             ridge to an anchor    after arXiv 2605.12843
    power      S_t = C_t^p / trace(C_t^p)        ridge to an anchor
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.call import form_of
from cfmerge.core.checks import check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.joint import Joint, in_joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import NO_CONTEXT, Context, Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.covariance import energy, of_largest, of_power
from cfmerge.least_squares import Anchor, Sums
from cfmerge.methods._least_squares import NOTES, Form, Normalise, Shape, Solution, least_squares, solved
from cfmerge.methods._spectrum import gcv, inverse, ridge_filter, spectrum

GRID = tuple(10 ** (k / 4) for k in range(-16, 9))  # relative ridges, 1e-4 to 100


def hashable(number: Any) -> Any:
    """A number in the name of a statistic; None, which cannot be shared, for a traced one."""
    return None if isinstance(number, jax.core.Tracer) else float(number)


def _pinv_or_ridge(rtol: Number | None, ridge: Number | None) -> Solution:
    """`X = K G^+`, or with a ridge towards zero."""

    def by_pinv(sums: Sums, shape: Shape) -> tuple[Array, Report]:
        found = spectrum(sums, shape=shape)
        phi = inverse(found.values, found.inputs, rtol)
        return found.filtered(phi), found.told(phi)

    return by_pinv if ridge is None else lambda sums, shape: solved(sums, shape, ridge)


@register
def actmat(
    normalise: Literal["none", "norm", "energy"] = "none",
    ridge: Number | None = None,
    rtol: Number | None = None,
    covariance: Literal["delta", "softmax_bias"] = "delta",
    form: Form = "auto",
) -> Method:
    """Least squares with each delta's own Gram as its input covariance, solved by the pseudo-inverse.

    Args:
        normalise: the divisor of each Gram: nothing, the delta's norm, or its square ("energy"; then the result
            is the minimum of WUDI's loss).
        ridge: relative to the mean eigenvalue of the Gram, towards zero, instead of the pseudo-inverse (0.01 in the
            authors' "uniform ridge").
        rtol: eigenvalues below this share of the largest count as zero; none: inputs times float32's epsilon, in
            which the authors compute.
        covariance: "softmax_bias": `a_t C_t + (1 - a_t) I`, with `1 - a_t` the softmax of the deltas' norms over the
            experts (the authors' variant; it keeps all deltas, and takes no ridge).
        form: "full" builds the in x in Gram, "low-rank" works on stacked rows (fewer than inputs, or an
            error), "auto" on rows as long as they are fewer than the inputs.

    Source: ACTMat: Model Merging via Data-Free Covariance Estimation, COLM 2026, arXiv 2604.01329.
    """
    check_number("actmat: ridge", ridge, 0)
    check_number("actmat: rtol", rtol, 0, 1)
    if covariance == "softmax_bias":
        check(ridge is None, "actmat: the softmax bias takes the place of a ridge")
        return _softmax_bias(normalise)
    return least_squares(_pinv_or_ridge(rtol, ridge), normalise=normalise, form=form)


def _softmax_bias(normalise: Normalise) -> Method:
    """`S_t = a_t C_t + (1 - a_t) I`; the Gram is at least the identity, if the weights are 1."""
    check(normalise == "none", "actmat: the softmax bias is for normalise='none'")

    def biased(base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"]) -> tuple[Array, Report]:
        size = jax.vmap(energy)(deltas)
        norms = jnp.where(size > 0, jnp.sqrt(jnp.where(size > 0, size, 1)), 0)
        bias = jax.nn.softmax(norms)
        gram = jnp.sum(weights * bias) * jnp.eye(deltas.shape[2], dtype=deltas.dtype)
        cross = linalg.weighted_sum(weights * bias, deltas)
        for delta, scale in zip(deltas, weights * (1 - bias), strict=True):
            own = linalg.gram(delta)
            gram, cross = gram + scale * own, cross + scale * linalg.times_gram(delta, delta, own)
        merged, held = linalg.solve_right(cross, gram)
        largest = jnp.maximum(linalg.largest_eigenvalue(gram), jnp.finfo(gram.dtype).tiny)
        return merged, {"ridge_ratio": jnp.sum(weights * bias) / largest, "no_cholesky": ~held}

    return of_deltas(biased, Needs(weights="positive"), notes={"no_cholesky": NOTES["no_cholesky"]}, joint=True)


@register
def tact(k: Number = 0.5, ridge: Number | None = None, rtol: Number | None = None, form: Form = "auto") -> Method:
    """ACTMat whose covariances are estimated from each delta's largest entries; the targets stay whole.

    Args:
        k: share of the entries kept for the estimate (0.5 to 0.7 in the authors' code).
        ridge: relative to the mean eigenvalue of the Gram, towards zero, instead of the pseudo-inverse.
        rtol: eigenvalues below this share of the largest count as zero; none: inputs times float32's epsilon.
        form: "full", "low-rank" or "auto", see actmat.

    Source: ACTMat: Model Merging via Data-Free Covariance Estimation, COLM 2026, arXiv 2604.01329 (its code).
    """
    check_number("tact: k", k, 0, 1)
    check_number("tact: ridge", ridge, 0)
    check_number("tact: rtol", rtol, 0, 1)
    share = hashable(k)
    return least_squares(
        _pinv_or_ridge(rtol, ridge),
        functools.partial(of_largest, share=k),
        None if share is None else ("largest", share),
        form=form,
        joint=False,
    )


@register
def anchored(
    ridge: Number | None = 0.1,
    anchor: Anchor = "mean",
    towards: Method | None = None,
    normalise: Literal["none", "norm", "energy"] = "energy",
    form: Form = "auto",
) -> Method:
    """Least squares with a ridge to an anchor: where the deltas say little, the merge is the anchor.

    Args:
        ridge: relative to the mean eigenvalue of the Gram; none: chosen for every tensor by generalised
            cross-validation over 25 values from 1e-4 to 100.
        anchor: "mean" or "sum" of the deltas, or "zero".
        towards: a method whose merge is the anchor instead, such as iso_c or task_arithmetic.
        normalise: the divisor of each Gram: nothing, the delta's norm, or its square.
        form: "full", "low-rank" or "auto", see actmat.

    Source: Bayesian model merging, arXiv 2605.12843, with covariances of the deltas in place of activations.
    """
    check_number("anchored: ridge", ridge, 0)
    made = functools.partial(least_squares, normalise=normalise, form=form, notes=ANCHORED_NOTES)
    if towards is None:
        return made(_to_anchor(ridge, anchor), normalises=anchor == "mean")
    check(towards.survey is None, f"anchored: {towards.name} surveys the whole model; it cannot be an anchor")

    def around(merge: Array) -> Method:
        return made(_to_anchor(ridge, merge))

    return _towards(towards, made(_to_anchor(ridge, "zero")), around)


ANCHORED_NOTES = {
    "ridge_at_end": (bool, "cross-validation chose the smallest or the largest ridge that it tried"),
}


def _to_anchor(ridge: Number | None, anchor: Anchor | Array) -> Solution:
    def by_gcv(sums: Sums, shape: Shape) -> tuple[Array, Report]:
        found = spectrum(sums, anchor, shape)
        best = jnp.argmin(gcv(found, GRID))
        chosen = jnp.asarray(GRID, found.values.dtype)[best]
        phi = ridge_filter(found.values, found.ridge(chosen))
        at_end = ((best == 0) | (best == len(GRID) - 1)) & (jnp.max(found.values) > 0)
        return found.filtered(phi), {**found.told(phi), "ridge": chosen, "ridge_at_end": at_end}

    return by_gcv if ridge is None else lambda sums, shape: solved(sums, shape, ridge, anchor)


class Beside(NamedTuple):
    """The statistic of the least squares, and that of the method whose merge is the anchor."""

    own: Sums
    anchor: Any


def _towards(anchor: Method, plain: Method, around: Callable[[Array], Method], basis: Joint | None = None) -> Method:
    """The least squares `around(merge)` of the other method's merge; `plain` has the same statistic.

    Args:
        basis: the joint basis of the cores that they all see.
    """

    def update(statistic: Beside, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Beside:
        return Beside(plain.update(statistic.own, delta, weight), anchor.see(statistic.anchor, delta, weight, context))

    def solve(statistic: Beside) -> tuple[Array, Report]:
        merge, told = anchor.solve(statistic.anchor)
        made = around(merge)
        merged, own = (made if basis is None else in_joint(made, basis)).solve(statistic.own)
        return merged, {**{f"anchor_{name}": value for name, value in told.items()}, **own}

    def form(rank: int | None) -> Method | None:
        summed = form_of(anchor) if rank is None else None
        return summed and _towards(summed, form_of(plain), around)  # type: ignore[arg-type]

    def on_cores(basis: Joint) -> Method:
        return _towards(in_joint(anchor, basis), in_joint(plain, basis), around, basis)

    either = {anchor.needs.weights, plain.needs.weights}
    return Method(
        "anchored",
        lambda base: Beside(plain.init(base), anchor.init(base)),
        update,
        solve,
        needs=anchor.needs.but(scope="matrix", weights="any" if either == {"any"} else "positive"),
        additive=anchor.additive,
        form=form,
        notes={f"anchor_{name}": note for name, note in anchor.notes.items()} | dict(plain.notes),
        joint=on_cores if anchor.joint else False,
    )


@register
def power(
    exponent: Number = 0.5,
    ridge: Number = 0.25,
    anchor: Anchor = "mean",
    normalise: Normalise = "trace",
    form: Form = "auto",
) -> Method:
    """Least squares with a power of each delta's Gram as its input covariance, and a ridge to an anchor.

    Args:
        exponent: 1 takes the Gram as it is, 0 its row space alone; 1/2 is what deltas of short training suggest.
        ridge: relative to the mean eigenvalue of the Gram; `a / (1 - a)` mixes a share `a` of the identity into
            every covariance (1/4 is a fifth).
        anchor: "mean" or "sum" of the deltas, or "zero".
        normalise: the divisor of each power: nothing, its "trace", the delta's "norm", or its square ("energy").
        form: "full", "low-rank" or "auto", see actmat.

    Source: of this project, unpublished; the exponent 1 is ACTMat, arXiv 2604.01329, with a ridge.
    """
    check_number("power: exponent", exponent, 0, 2)
    check_number("power: ridge", ridge, 0)
    value = hashable(exponent)
    return least_squares(
        _to_anchor(ridge, anchor),
        functools.partial(of_power, exponent=exponent),
        None if value is None else ("power", value),
        normalise,
        form,
        normalises=anchor == "mean",
    )
