"""Interpolation on the sphere between two: from the base to an expert, or from one expert to another.

The tensors are the full weights `V_t = W_t`, or the deltas `V_t = D_t`, with the angle `a` between them; Shoemake 1985:

    slerp, nuslerp   V = sin((1-s) a)/sin(a) V_0 + sin(s a)/sin(a) V_1

Angles come from chords, `a = 2 atan2(||u - v||, ||u + v||)`: the cosine of two fine-tuned weights is 1 to working
precision. The result is needed as `X = V - W_0`, small against both, so that too is never formed as a difference:

    X = k_0 D_0 + k_1 D_1 + (k_0 + k_1 - 1) W_0,     k_0 + k_1 - 1 = 2 sin((1-s) a/2) sin(s a/2) / cos(a/2)

It is linear where one of the two is zero, and so has no direction.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge import linalg
from cfmerge.core.checks import check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Note, Report, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Survey, with_pieces
from cfmerge.methods._sphere import On, look_at_arc, origin


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

    def two(seen: Seen) -> Seen:
        first = seen.deltas[0] if len(seen.deltas) > 1 else jnp.zeros_like(seen.base)
        return seen._replace(base=origin(seen.base, on), deltas=jnp.stack([first, seen.deltas[-1]]))

    return _slerp_of(
        two, lambda seen: (t, {}), threshold, Needs("tensor", ordered=True, experts=(1, 2), weights="none")
    )


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

    def share(seen: Seen) -> tuple[Array, Report]:
        w_0, w_1 = seen.weights
        total = w_0 + w_1
        none = jnp.abs(total) <= 1e-6 * (jnp.abs(w_0) + jnp.abs(w_1))
        return jnp.where(none, 0.5, w_1 / jnp.where(none, 1, total)), {"weightless": none}

    def axis(ndim: int) -> int | None:
        return None if flatten or not ndim else 0 if row_wise else -1

    def two(seen: Seen) -> Seen:
        return seen._replace(base=origin(seen.base, on))

    weightless = (bool, "the two weights sum to 0: taken as equal, half way between the experts")
    return _slerp_of(two, share, 1, Needs("tensor", experts=(2, 2)), {"weightless": weightless}, axis)


OPPOSITE = (
    lambda value: value > 0,
    "two tensors (or rows) point in opposite directions, so that there is no shortest arc between them: "
    "interpolated linearly",
)


def _slerp_of(
    two: Callable[[Seen], Seen],
    share: Callable[[Seen], tuple[Number | Array, Report]],
    threshold: Number,
    needs: Needs,
    notes: Mapping[str, Note] | None = None,
    axis: Callable[[int], int | None] = lambda ndim: None,
) -> Method:
    """The method that interpolates two tensors: whole ones, over an axis or all; or in pieces, if over all.

    Args:
        two: the origin and the two deltas, out of what is seen.
        share: where on the way, and a report.
        axis: of a tensor with so many axes.
    """
    notes = {"opposite": OPPOSITE, **(notes or {})}

    def whole(base: Array, deltas: Array, weights: Array) -> tuple[Array, Report]:
        seen = two(Seen(base, deltas, weights))
        over = axis(base.ndim)
        u, v = (linalg.unit(seen.base + delta, over) for delta in seen.deltas)
        directed = jnp.any(u != 0, over, keepdims=True) & jnp.any(v != 0, over, keepdims=True)
        return between(seen, linalg.norm(u - v, over), linalg.norm(u + v, over), directed)

    def between(seen: Seen, chord: Array, across: Array, directed: Array) -> tuple[Array, Report]:
        (t, told), (first, second) = share(seen), seen.deltas
        merged, report = _slerp(seen.base, first, second, jnp.asarray(t), chord, across, directed, threshold)
        return merged, {**report, **told}

    def informed(found: Found) -> Method:
        def piece(base: Array, deltas: Array, weights: Array) -> tuple[Array, Report]:
            lengths, _, chords, across = (jnp.asarray(own, base.dtype) for own in found.model)
            return between(two(Seen(base, deltas, weights)), jnp.sqrt(chords[0, 1]), across, jnp.all(lengths > 0))

        return of_deltas(piece, needs.but(scope="entry"), notes=notes)

    method = of_deltas(whole, needs, notes=notes)
    survey = Survey(lambda entries, own: look_at_arc(two), informed, within="tensor")
    return with_pieces(method, survey) if axis(1) is None else method


def _slerp(
    base: Array, first: Array, second: Array, t: Array, chord: Array, across: Array, directed: Array, threshold: Number
) -> tuple[Array, Report]:
    """`X` for `V_0 = base + first` and `V_1 = base + second`.

    Args:
        chord, across: `||u - v|| = 2 sin(a/2)` and `||u + v|| = 2 cos(a/2)`.
        directed: neither of the two is zero.
    """
    dtype = base.dtype
    t = jnp.asarray(t, dtype)
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
