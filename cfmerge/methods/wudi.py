"""WUDI and its kin: least squares on the deltas' Grams, each divided by its delta's energy, held near the sum.

WUDI (arXiv 2503.08099) starts Adam at the sum `N = sum_t w_t D_t` and stops it early on

    L(X) = sum_t w_t ||(X - D_t) D_t^T||^2 / ||D_t||^2,     dL/dX = 2 (X G - K)

with `G = sum_t w_t C_t / ||D_t||^2`, `K = sum_t w_t D_t C_t / ||D_t||^2`, `C_t = D_t^T D_t`. The effect of
stopping early comes in closed form by a ridge to `N` (`wudi`), or by a filter on the spectrum of `G` (SWUDI and ASWUDI,
arXiv 2606.07289); all of them read one statistic. OptMerge (arXiv 2505.19892) takes the loss with denoised deltas.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.covariance import energy
from cfmerge.least_squares import Anchor, Grams, Sums, stacked
from cfmerge.methods._least_squares import NOTES, Form, Shape, Solution, least_squares, solved
from cfmerge.methods._spectrum import CUT, Rule, rank_of, spectrum

FLOOR = 1e-8  # of the eigenvalues of G, whose sum is the number of experts


@register
def wudi(ridge: Number = 0.1, anchor: Anchor = "sum", form: Form = "auto") -> Method:
    """WUDI in closed form: its loss plus a ridge to the sum of the deltas, in place of Adam stopped early.

    Args:
        ridge: relative to the mean eigenvalue of the Gram; 0.1 comes closest to the published 300 steps.
        anchor: "sum" or "mean" of the deltas, or "zero".
        form: "full" builds the in x in Gram, "low-rank" works on stacked rows (fewer than inputs, or an
            error), "auto" on rows as long as they are fewer than the inputs.

    Source: R. Cheng et al., WUDI-Merging, ICML 2025, arXiv 2503.08099.
    """
    check_number("wudi: ridge", ridge, 0)
    return least_squares(
        lambda sums, shape: solved(sums, shape, ridge, anchor),
        normalise="energy",
        form=form,
        normalises=anchor == "mean",
    )


@register
def wudi_adam(steps: int = 300, learning_rate: Number = 1e-5, form: Form = "auto") -> Method:
    """WUDI as published: Adam from the sum of the deltas, stopped after some steps.

    Its steps have a fixed size in every entry, so the result depends on the deltas' scale. One step costs a product
    with the Gram, whatever the number of experts.

    Args:
        steps: steps of Adam; 300 in the paper.
        learning_rate: 1e-5 in the paper; an entry moves by about this much in a step.
        form: "full", "low-rank" or "auto", see wudi.

    Source: R. Cheng et al., WUDI-Merging, ICML 2025, arXiv 2503.08099.
    """
    check(steps >= 0, f"wudi_adam: steps must not be negative, got {steps}")
    check_number("wudi_adam: learning_rate", learning_rate, 0)

    def solution(sums: Sums, shape: Shape) -> tuple[Array, Report]:
        start, gradient = sums.total, _gradient(sums)
        adam = optax.adam(as_array(learning_rate, start.dtype), eps_root=1e-30)  # has a derivative where it rests

        def step(_: int | Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            x, moments = state
            change, moments = adam.update(gradient(x), moments)
            return x + jnp.asarray(change), moments

        merged, _ = lax.fori_loop(0, steps, step, (start, adam.init(start)))
        return merged, {}

    return least_squares(solution, normalise="energy", form=form, joint=False)  # Adam's steps are entrywise


def _gradient(sums: Sums) -> Callable[[Array], Array]:
    """`2 (X G - K)`, on the rows where they are few."""
    if isinstance(sums.experts, Grams):
        gram, cross, _ = sums.experts
        return lambda x: 2 * (linalg.matmul(x, gram) - cross)
    f, z = stacked(sums.experts)
    if 2 * f.shape[0] < f.shape[1]:
        return lambda x: 2 * linalg.matmul(linalg.matmul(x, f.T) - z, f)
    gram, cross = linalg.gram(f), linalg.matmul(z, f)
    return lambda x: 2 * (linalg.matmul(x, gram) - cross)


@register
def swudi(
    filter: Literal["exponential", "tikhonov", "landweber", "wiener", "none"] = "exponential",
    time: Number = 1300.0,
    keep: float | None = 0.65,
    anchor: Anchor = "sum",
    alpha: Number = 0.01,
    steps: Number = 150,
    step_size: Number = 0.9,
    noise: Number = 1e-4,
    form: Form = "auto",
) -> Method:
    """WUDI through a filter on the Gram's spectrum, and a cut: the effect of stopping Adam early, in closed form.

    Args:
        filter: `h(l)` of the eigenvalues: "exponential" `1 - exp(-l time)`, "tikhonov" `l / (l + alpha)`,
            "landweber" `1 - (1 - step_size l / max l)^steps`, "wiener" `l^2 / (l^2 + noise)`, "none" 1.
        time: the exponential filter's time; 1300 on ViT-B/32, 1800 on B/16, 300 on Llama (and without a cut).
        keep: share of the eigenvalues that are filtered, the largest, rounded up; below, the anchor's part stays.
            0.65 on ViT, 0.85 on Llama; none: all.
        anchor: "sum" or "mean" of the deltas, or "zero".
        alpha: the Tikhonov filter's alpha, which is an absolute ridge to the anchor (the eigenvalues' sum is the number
            of experts).
        steps: steps of Landweber's iteration.
        step_size: the step of Landweber's iteration, relative to the inverse of the largest eigenvalue.
        noise: the Wiener filter's noise; h is 1/2 at its square root.
        form: "full", "low-rank" or "auto", see wudi.

    Source: SWUDI and ASWUDI, arXiv 2606.07289.
    """
    for name, value in {"time": time, "alpha": alpha, "steps": steps, "noise": noise}.items():
        check_number(f"swudi: {name}", value, 0)
    check_number("swudi: step_size", step_size, 0, 1)
    check(keep is None or 0 < keep <= 1, f"swudi: keep must lie in (0, 1], got {keep}")

    def response(values: Array) -> Array:
        if filter == "exponential":
            return -jnp.expm1(-values * as_array(time, values.dtype))
        if filter == "tikhonov":
            return values / (values + as_array(alpha, values.dtype))
        if filter == "landweber":
            rest = 1 - as_array(step_size, values.dtype) * values / jnp.max(values)
            return 1 - jnp.maximum(rest, 0) ** as_array(steps, values.dtype)
        return values**2 / (values**2 + as_array(noise, values.dtype)) if filter == "wiener" else jnp.ones_like(values)

    def count(values: Array, *_: Any) -> Array:
        return jnp.asarray(len(values) if keep is None else max(1, int(len(values) * keep + 0.999)))

    return least_squares(_filtered(count, response, anchor), normalise="energy", form=form, notes=CUT_NOTES)


@register
def aswudi(
    rule: Rule = "participation_sqrt", share: Number = 0.9, anchor: Anchor = "sum", form: Form = "auto"
) -> Method:
    """WUDI solved exactly in the leading directions of the Gram, as many as a rule finds; the sum's part stays below.

    Args:
        rule: "participation_sqrt" `ceil((sum sqrt l)^2 / sum l)`, "participation" `ceil((sum l)^2 / sum l^2)`,
            "entropy" `ceil(exp H)`, "entropy_squared" that of the squares, "cumulative", "stable_rank"
            `ceil(sum l^2 / max l^2)`, "gavish_donoho" (for Llama), "gavish_donoho_released" with the constant of the
            authors' code, or "all".
        share: the share of the eigenvalues' sum that "cumulative" holds.
        anchor: "sum" or "mean" of the deltas, or "zero".
        form: "full", "low-rank" or "auto", see wudi.

    Source: SWUDI and ASWUDI, arXiv 2606.07289.
    """
    check_number("aswudi: share", share, 0, 1)

    def count(values: Array, samples: Array, shape: Shape) -> Array:
        return rank_of(values, rule, share, shape, samples)

    return least_squares(_filtered(count, jnp.ones_like, anchor), normalise="energy", form=form, notes=CUT_NOTES)


CUT_NOTES = {"capped": (bool, "the Gram has fewer directions than were to be kept; the rest is the anchor's")}


def _filtered(
    count: Callable[[Array, Array, Shape], Array], response: Callable[[Array], Array], anchor: Anchor
) -> Solution:
    """`X = X_a + (K - X_a G) Q diag(h/l) Q^T`, `h` the response on the `count` largest eigenvalues, else 0."""

    def solution(sums: Sums, shape: Shape) -> tuple[Array, Report]:
        found = spectrum(sums, anchor, shape)
        n = found.inputs
        values = jnp.maximum(found.values, FLOOR)
        missing = jnp.full(n - len(values), FLOOR, values.dtype)  # those that rows or cores leave out
        kept = count(jnp.concatenate([missing, values]), found.samples, shape)
        first = jnp.arange(n)[n - len(values) :] >= n - kept
        known = found.values > n * CUT * jnp.max(found.values)
        phi = jnp.where(first, response(values) / values, 0)
        if response is jnp.ones_like:
            phi = jnp.where(known, phi, 0)
        capped = (kept > jnp.sum(known)) & (jnp.max(found.values) > 0)
        return found.filtered(phi), {**found.told(phi), "kept": kept, "capped": capped}

    return solution


@register
def optmerge(rank: int | None = None, ridge: Number = 0.1, anchor: Anchor = "sum") -> Method:
    """WUDI's loss on denoised deltas, in closed form: top singular directions as inputs, and as targets.

    Args:
        rank: singular directions kept of every delta; none: min(out, in) / experts.
        ridge: relative to the mean eigenvalue of the Gram, in place of the published 300 steps of Adam.
        anchor: "sum" or "mean" of the deltas, or "zero".

    Source: Y. Wei et al., OptMerge, ICLR 2026, arXiv 2505.19892.
    """
    check(rank is None or rank >= 1, f"optmerge: rank must be at least 1, got {rank}")
    check_number("optmerge: ridge", ridge, 0)

    def denoised(
        base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"], dense: Shape | None = None
    ) -> tuple[Array, Report]:
        experts, m, n = deltas.shape
        shape = dense or (m, n)
        k = min(rank or max(1, min(shape) // experts), m, n)
        total = linalg.weighted_sum(weights, deltas)
        mean = linalg.weighted_mean(total, jnp.sum(weights))
        size = jax.vmap(energy)(deltas)
        scales = linalg.root(linalg.ratio(weights, size))

        def one(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
            delta, scale = arguments
            _, s, vt = linalg.leading(delta, k)
            factor = scale * s[:, None] * vt
            return factor, linalg.matmul(mean + linalg.truncated(delta - mean, k), factor.T)

        f, z = lax.map(one, (deltas, scales))
        f, z = f.reshape(-1, n), jnp.moveaxis(z, 0, 1).reshape(m, -1)
        grams = Grams(linalg.gram(f), linalg.matmul(z, f), jnp.sum(z * z))
        sums = Sums(total, jnp.sum(weights), jnp.dot(weights, size), m * jnp.sum(size > 0), grams)
        return solved(sums, shape, ridge, anchor)

    def on_cores(basis: Joint) -> Any:
        return functools.partial(denoised, dense=basis.shape)

    needs = Needs(weights="positive", normalises=True)
    return of_deltas(denoised, needs, notes={"no_cholesky": NOTES["no_cholesky"]}, joint=on_cores)
