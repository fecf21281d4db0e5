"""Interpolations and means on the sphere: directions of tensors are averaged, and their lengths apart.

The tensors are the full weights `V_t = W_t`, or the deltas `V_t = D_t`; `u_t = V_t / ||V_t||`.

    slerp, nuslerp   V = sin((1-s) a)/sin(a) V_0 + sin(s a)/sin(a) V_1,     a the angle between the two; Shoemake 1985
    multislerp       V = (sum w_t ||V_t||) m / ||m||,                       m = sum w_t u_t
    karcher          the same with the point m of the sphere that minimises sum w_t angle(m, u_t)^2

Angles come from chords, `a = 2 atan2(||u - v||, ||u + v||)`: the cosine of two fine-tuned weights is 1 to working
precision. The result is needed as `X = V - W_0`, small against both, so that too is never formed as a difference:

    X = k_0 D_0 + k_1 D_1 + (k_0 + k_1 - 1) W_0,     k_0 + k_1 - 1 = 2 sin((1-s) a/2) sin(s a/2) / cos(a/2)

for slerp, and as `_sphere` says for the means.

A tensor that is zero has no direction: it is left out of `m`, and slerp is linear where one of the two is zero.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Note, Report, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Survey
from cfmerge.methods._sphere import Sphere, intrinsic_mean, look_at_sphere, normalised, shares_of, sphere_of

On = Literal["weights", "deltas"]


def _origin(base: Array, on: On) -> Array:
    """The tensor that deltas are added to: the base, or zero where deltas are interpolated."""
    return base if on == "weights" else jnp.zeros_like(base)


# --- between two --------------------------------------------------------------------------------------------------


@register
def slerp(t: Number = 0.5, on: On = "weights", threshold: Number = 0.9995) -> Method:
    """Spherical interpolation of the whole tensor: from the base to one expert, or from one expert to another.

    Args:
        t: where on the way; 0 is the base (or the first expert), 1 the expert (or the second one).
        on: the full weights, or the deltas.
        threshold: interpolation is linear where the cosine is larger than this in absolute value, as in all common
            implementations; on full weights that holds for most fine-tuned models. 1: never.

    Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; thresholds as in mergekit 0.1.4.
    """
    check_number("slerp: t", t)
    check_number("slerp: threshold", threshold, 0, 1)

    def between(base: Array, deltas: Float[Array, "T ..."], weights: Array) -> tuple[Array, Report]:
        first = deltas[0] if len(deltas) > 1 else jnp.zeros_like(base)
        return _slerp(_origin(base, on), first, deltas[-1], t, None, threshold)

    needs = Needs("tensor", ordered=True, experts=(1, 2), weights="none")
    return of_deltas(between, needs, notes={"opposite": OPPOSITE})


@register
def nuslerp(flatten: bool = True, row_wise: bool = False, on: On = "deltas") -> Method:
    """Spherical interpolation of two experts by their weights: at `w_2 / (w_1 + w_2)` of the way.

    Args:
        flatten: interpolate the tensor as one vector.
        row_wise: if not flattened, interpolate its columns (vectors along the first axis); otherwise its rows. The
            name is mergekit's.
        on: the deltas, or the full weights (mergekit without a base model).

    Source: mergekit 0.1.4, nuslerp; Shoemake, SIGGRAPH 1985.
    """

    def between(base: Array, deltas: Float[Array, "2 ..."], weights: Float[Array, "2"]) -> tuple[Array, Report]:
        (first, second), (w_0, w_1) = deltas, weights
        total = w_0 + w_1
        none = jnp.abs(total) <= 1e-6 * (jnp.abs(w_0) + jnp.abs(w_1))
        t = jnp.where(none, 0.5, w_1 / jnp.where(none, 1, total))
        axis = None if flatten or not base.ndim else 0 if row_wise else -1
        merged, told = _slerp(_origin(base, on), first, second, t, axis, 1)
        return merged, {**told, "weightless": none}

    notes = {
        "opposite": OPPOSITE,
        "weightless": (bool, "the two weights sum to 0: taken as equal, half way between the experts"),
    }
    return of_deltas(between, Needs("tensor", experts=(2, 2)), notes=notes)


OPPOSITE = (
    lambda value: value > 0,
    "two tensors (or rows) point in opposite directions, so that there is no shortest arc between them: "
    "interpolated linearly",
)


def _slerp(
    base: Array, first: Array, second: Array, t: Number, axis: int | None, threshold: Number
) -> tuple[Array, Report]:
    """`X` for `V_0 = base + first` and `V_1 = base + second`, over an axis or the whole tensor."""
    dtype = base.dtype
    t = jnp.asarray(t, dtype)
    u, v = linalg.unit(base + first, axis), linalg.unit(base + second, axis)
    directed = jnp.any(u != 0, axis, keepdims=True) & jnp.any(v != 0, axis, keepdims=True)
    chord, across = linalg.norm(u - v, axis), linalg.norm(u + v, axis)  # 2 sin(a/2), 2 cos(a/2)
    least = jnp.sqrt(2 * (1 - jnp.asarray(threshold, dtype)))
    opposite = directed & (across <= jnp.maximum(least, 32 * jnp.finfo(dtype).eps))
    linear = ~directed | opposite | (chord <= least)
    half = jnp.arctan2(jnp.where(linear, 1, chord), jnp.where(linear, 1, across))
    k_0 = jnp.where(linear, 1 - t, jnp.sin(2 * (1 - t) * half) / jnp.sin(2 * half))
    k_1 = jnp.where(linear, t, jnp.sin(2 * t * half) / jnp.sin(2 * half))
    excess = jnp.where(linear, 0, 2 * jnp.sin((1 - t) * half) * jnp.sin(t * half) / jnp.cos(half))
    return k_0 * first + k_1 * second + excess * base, {
        "cosine": jnp.mean(jnp.where(directed, 1 - chord * chord / 2, 0)),
        "opposite": jnp.sum(opposite, dtype=dtype),
    }


# --- means of several ---------------------------------------------------------------------------------------------


@register
def multislerp(normalise_weights: bool = True, on: On = "deltas", eps: Number = 0.0) -> Method:
    """The normalised weighted mean of the experts' directions, times the weighted mean of their lengths.

    mergekit projects on the tangent space there and back; the tangent sum is zero at this point, so nothing moves.

    Args:
        normalise_weights: divide the weights by their sum; without it they scale the length.
        on: the deltas, or the full weights (mergekit without a base model).
        eps: added to each length that is divided by; mergekit's is 1e-8. Not 0, short tensors count for less.

    Source: mergekit 0.1.4, multislerp (2025).
    """
    check_number("multislerp: eps", eps, 0)

    def directions(sphere: Sphere, weights: Array) -> list[Array]:
        shares, _ = shares_of(weights, sphere)
        return [normalised(shares * sphere.lengths / (sphere.lengths + eps + ~sphere.directed))]

    def mean(sphere: Sphere, weights: Float[Array, " T"]) -> tuple[Array, Report]:
        (shares,), (_, lengths), total = directions(sphere, weights), shares_of(weights, sphere), jnp.sum(weights)
        merged, opposed = sphere.merged(shares, lengths)
        if not normalise_weights:  # as many times as long, in the same direction
            merged = jnp.abs(total) * merged + (jnp.abs(total) - 1) * sphere.base
        return merged, {"opposed": opposed}

    needs = Needs("tensor", normalises=True)
    return _mean_of(
        lambda seen: seen._replace(base=_origin(seen.base, on)), directions, 1, mean, needs, {"opposed": OPPOSED}
    )


@register
def karcher(max_iter: int = 10, tol: Number = 1e-5, on: On = "weights", with_base: bool = False) -> Method:
    """The experts' intrinsic mean on the sphere, times the mean of their lengths.

    Args:
        max_iter: steps of the fixed-point iteration.
        tol: the iteration stops where the mean tangent vector is shorter than this (an angle).
        on: the full weights, or the deltas.
        with_base: the base is one more model, of weight 1, as in mergekit where a base model is named.

    Source: Karcher, Riemannian Center of Mass and Mollifier Smoothing, Comm. Pure Appl. Math. 1977; mergekit 0.1.4.
    """
    check(max_iter >= 0, f"karcher: max_iter must not be negative, got {max_iter}")
    check_number("karcher: tol", tol, 0)

    def of(seen: Seen) -> Seen:
        base, deltas, weights, contexts = seen
        if with_base:
            deltas = jnp.concatenate([jnp.zeros_like(base)[None], deltas])
            weights = jnp.concatenate([jnp.ones_like(weights[:1]), weights])
        return Seen(_origin(base, on), deltas, weights, contexts)

    def directions(sphere: Sphere, weights: Array) -> list[Array]:
        shares, _ = shares_of(weights, sphere)
        return [intrinsic_mean(shares, sphere.chords, max_iter, tol)[0], shares]

    def mean(sphere: Sphere, weights: Float[Array, " T"]) -> tuple[Array, Report]:
        shares, lengths = shares_of(weights, sphere)
        place, residual = intrinsic_mean(shares, sphere.chords, max_iter, tol)
        _, opposed = sphere.direction(shares, 1)
        merged, opposed = sphere.merged(place, lengths, opposed)
        least = jnp.maximum(jnp.asarray(tol, residual.dtype), 32 * jnp.finfo(residual.dtype).eps)
        return merged, {"opposed": opposed, "residual": residual, "unfinished": ~opposed & (residual > least)}

    notes = {
        "opposed": OPPOSED,
        "unfinished": (bool, "the mean was not reached within tol: use a larger max_iter"),
    }
    return _mean_of(of, directions, 2, mean, Needs("tensor", weights="positive", normalises=True), notes)


def _mean_of(
    of: Callable[[Seen], Seen],
    directions: Callable[[Sphere, Array], Sequence[Array]],
    means: int,
    mean: Callable[[Sphere, Array], tuple[Array, Report]],
    needs: Needs,
    notes: Mapping[str, Note],
) -> Method:
    """The method of a mean on the sphere, of whole tensors or in pieces.

    Args:
        of, directions, means: see `look_at_sphere`.
        mean: the merged delta and the report, of a sphere and the weights.
    """

    def whole(base: Array, deltas: Float[Array, "T ..."], weights: Float[Array, " T"]) -> tuple[Array, Report]:
        base, deltas, weights, _ = of(Seen(base, deltas, weights))
        return mean(sphere_of(base, deltas), weights)

    def informed(found: Found) -> Method:
        def piece(base: Array, deltas: Float[Array, "T ..."], weights: Float[Array, " T"]) -> tuple[Array, Report]:
            base, deltas, weights, _ = of(Seen(base, deltas, weights))
            return mean(found.model.sphere(base, deltas), weights)

        return of_deltas(piece, needs.but(scope="entry"), notes=notes)

    survey = Survey(lambda entries, own: look_at_sphere(of, directions, means), informed, within="tensor")
    method = of_deltas(whole, needs, notes=notes)
    return dataclasses.replace(
        method, pieces=lambda: dataclasses.replace(method, needs=needs.but(scope="entry"), survey=survey)
    )


OPPOSED = (
    bool,
    "the experts' directions cancel, so that they have no mean direction: the weighted mean was taken instead",
)
