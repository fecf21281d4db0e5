"""Means on the sphere of several experts: directions of tensors are averaged, and their lengths apart.

The tensors are the full weights `V_t = W_t`, or the deltas `V_t = D_t`; `u_t = V_t / ||V_t||`.

    multislerp       V = (sum w_t ||V_t||) m / ||m||,     m = sum w_t u_t
    karcher          the same with the point m of the sphere that minimises sum w_t angle(m, u_t)^2

The result is needed as `X = V - W_0`, small against both: `_sphere` forms it without that difference. A tensor that is
zero has no direction, and is left out of `m`.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge.core.checks import check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Note, Report, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Survey, with_pieces
from cfmerge.methods._sphere import (
    On,
    Sphere,
    intrinsic_mean,
    look_at_sphere,
    normalised,
    origin,
    shares_of,
    sphere_of,
)


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
        lambda seen: seen._replace(base=origin(seen.base, on)), directions, 1, mean, needs, {"opposed": OPPOSED}
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
        return Seen(origin(base, on), deltas, weights, contexts)

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
    return with_pieces(of_deltas(whole, needs, notes=notes), survey)


OPPOSED = (
    bool,
    "the experts' directions cancel, so that they have no mean direction: the weighted mean was taken instead",
)
