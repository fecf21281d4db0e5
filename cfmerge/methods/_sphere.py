"""Weighted means of tensors on the sphere of their directions, for `spherical` and `slerp`.

With shares `p_t` that sum to 1, directions `u_t`, `q = ||sum_t p_t u_t||` and the mean length `L`, the merged tensor
is `L sum_t p_t u_t / q`. Its part `X`, the change of the base, is formed without subtracting two large numbers:

    X = sum_t p_t (L u_t - W_0) / q + (1/q - 1) W_0
    L u_t - W_0 = D_t + (L - ||W_t||)/||W_t|| W_t
    1 - q^2 = sum_{s<t} p_s p_t ||u_s - u_t||^2
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from cfmerge import linalg
from cfmerge.core.numbers import Number
from cfmerge.core.part import Seen
from cfmerge.core.survey import Look, Measure, xp_of

On = Literal["weights", "deltas"]


def origin(base: Array, on: On) -> Array:
    """The tensor that deltas are added to: the base, or zero where deltas are averaged."""
    return base if on == "weights" else jnp.zeros_like(base)


class Sphere(NamedTuple):
    """Tensors `V_t = base + D_t` as directions and lengths.

    Attributes:
        units, lengths: `u_t (T, ...)` and `||V_t|| (T,)`.
        longer: `||V_t|| - ||V_0||`.
        chords: `||u_s - u_t||^2 (T, T)`.
        q: of a piece of the tensors, `||sum_t p_t u_t||` of the whole for some shares `p`; NaN: far from zero.
    """

    base: Array
    deltas: Array
    units: Array
    lengths: Array
    longer: Array
    chords: Array
    q: Array | None = None

    @property
    def directed(self) -> Array:
        """Which tensors are not zero `(T,)`."""
        return self.lengths > 0

    def direction(self, shares: Array, number: int = 0) -> tuple[Array, Array]:
        """`||sum_t p_t u_t||`, and whether it is zero to working precision.

        Args:
            number: which of the shares that `q` is about these are, where the sphere is of a piece.
        """
        if self.q is None:
            q = linalg.norm(linalg.weighted_sum(shares, self.units)).reshape(())
        else:
            far_from_zero = linalg.root(jnp.sum(shares) ** 2 - spread(shares, self.chords))
            q = jnp.where(jnp.isnan(self.q[number]), far_from_zero, self.q[number])
        return q, q <= 16 * jnp.finfo(q.dtype).eps * jnp.sum(jnp.abs(shares))

    def merged(
        self, shares: Array, of_lengths: Array, opposed: Array | bool = False, number: int = 0
    ) -> tuple[Array, Array]:
        """`X` of the mean direction with those shares; or, if there is none, of the mean, and whether that is so."""
        q, cancelled = self.direction(shares, number)
        opposed = cancelled | opposed
        q = jnp.where(opposed | (q == 0), 1, q)
        mean = linalg.weighted_sum(shares, self._at_mean_length(of_lengths))
        within = spread(shares, self.chords)
        on_sphere = mean / q + within / (q * (1 + q)) * self.base
        plain = linalg.weighted_sum(of_lengths, self.deltas)
        return jnp.where(opposed, plain, on_sphere), opposed & jnp.any(self.directed)

    def _at_mean_length(self, of_lengths: Array) -> Array:
        """`L u_t - base`, `L` the mean length."""
        change = jnp.dot(of_lengths, self.longer, precision=linalg.HIGHEST) - self.longer  # L - ||V_t||
        safe = jnp.where(self.directed, self.lengths, 1)
        near = jnp.abs(change) < safe / 2
        each = (len(self.deltas),) + (1,) * self.base.ndim
        by_little = self.deltas + (jnp.where(near, change, 0) / safe).reshape(each) * (self.base + self.deltas)
        length = jnp.dot(of_lengths, self.lengths, precision=linalg.HIGHEST)
        return jnp.where(near.reshape(each), by_little, length * self.units - self.base)


# --- in pieces ----------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """All that a mean must know of whole tensors to be taken in pieces, see `Sphere`."""

    lengths: Any
    longer: Any
    chords: Any
    q: Any = None

    @property
    def cosines(self) -> Any:
        """Of the angles between the tensors `(T, T)`; of one that is zero, 0."""
        return 1 - self.chords / 2

    def sphere(self, base: Array, deltas: Array) -> Sphere:
        """The sphere of a piece of the tensors."""
        lengths, longer, chords = (jnp.asarray(own, base.dtype) for own in self[:3])
        units = linalg.ratio(base + deltas, _each(lengths, base))
        q = None if self.q is None else jnp.asarray(self.q, base.dtype)
        return Sphere(base, deltas, units, lengths, longer, chords, q)


def look_at_extent(of: Callable[[Seen], Seen]) -> Look:
    """A look within a tensor: its `Extent` without mean directions, and whether a weight is negative.

    It takes one Gram of all tensors and of their differences from the first; another at another scale where squares
    overflow or vanish.

    Args:
        of: base, deltas and weights of the tensors, out of what is seen.
    """

    def gram_of(scales: Any) -> Callable[[Seen], tuple[Array, Array]]:
        def gram(seen: Seen) -> tuple[Array, Array]:
            base, deltas, weights, _ = of(seen)
            each = jnp.broadcast_to(_each(scales, base), (len(deltas), *(1,) * base.ndim))
            rows = jnp.concatenate([(base + deltas) / each, (deltas - deltas[0]) / jnp.max(each)])
            rows = rows.reshape(len(rows), -1)
            return linalg.matmul(rows, rows.T), jnp.sum(jnp.minimum(weights, 0))

        return gram

    first = yield Measure(gram_of(1), joint=True)
    scales = _scales(first[0])
    gram, negative = yield Measure(gram_of(scales), joint=True, known=lambda: first if (scales == 1).all() else None)
    return _extent(gram, scales), negative < 0


def look_at_sphere(
    of: Callable[[Seen], Seen], shares_for: Callable[[Sphere, Array], Sequence[Array]], means: int
) -> Look:
    """A look within a tensor: its `Extent`. The lengths of mean directions are asked for where directions may cancel.

    Args:
        of: see `look_at_extent`.
        shares_for: `shares_for(sphere, weights)`: the shares of the mean directions whose lengths are wanted.
        means: how many they are.
    """
    extent, negative = yield from look_at_extent(of)

    def lengths(seen: Seen) -> Array:
        base, deltas, weights, _ = of(seen)
        sphere = extent.sphere(base, deltas)
        each = [linalg.weighted_sum(shares, sphere.units) for shares in shares_for(sphere, weights)]
        return jnp.stack([jnp.sum(mean**2) for mean in each])

    def follow() -> Any:
        cosines = extent.cosines
        never = np.linalg.eigvalsh(cosines)[0] > 0.02 * len(cosines)  # for any shares
        return np.full(means, np.nan) if never or (not negative and cosines.min() > 0.02) else None

    q = yield Measure(lengths, joint=True, known=follow)
    return extent._replace(q=xp_of(q).sqrt(q))


def look_at_arc(of: Callable[[Seen], Seen]) -> Look:
    """A look within a tensor at two directions: their `Extent`, and `||u_1 + u_2||` as `q`."""
    extent, _ = yield from look_at_extent(of)
    chord = extent.chords[0, 1]

    def across(seen: Seen) -> Array:
        base, deltas, *_ = of(seen)
        return jnp.sum(jnp.sum(extent.sphere(base, deltas).units, axis=0) ** 2)

    square = yield Measure(across, joint=True, known=lambda: np.asarray(4 - chord) if chord < 3.9 else None)
    return extent._replace(q=xp_of(square).sqrt(square))


def _scales(gram: Any) -> Any:
    """What each tensor `(T,)` is divided by so that its square neither overflows nor vanishes."""
    xp = xp_of(gram)
    squares = xp.diagonal(gram)[: len(gram) // 2]
    vanish = xp.where(squares < 1e-20, 2.0**-80, 1.0)
    return xp.where(xp.isfinite(squares), vanish, 2.0**80)


def _extent(gram: Any, scales: Any) -> Extent:
    """Lengths and chords, from the Gram of `V_t / scales_t` and `(D_t - D_0) / max scales`.

    A chord is taken from the difference of its ends where they are near, else from the angle between them.
    """
    xp, count = xp_of(gram), len(gram) // 2
    largest = xp.max(scales)
    shrunk = scales / largest
    roots = xp.sqrt(xp.diagonal(gram)[:count])
    lengths = shrunk * roots
    beyond = shrunk * xp.diagonal(gram[count:, :count]) + shrunk[0] * gram[count:, 0]  # (D_t - D_0) . (V_t + V_0)
    longer = _ratio(beyond, lengths + lengths[0])
    away = xp.diagonal(gram[count:, count:])
    squares = away[:, None] + away - 2 * gram[count:, count:]  # ||V_s - V_t||^2
    near = _ratio(squares - (longer[:, None] - longer) ** 2, lengths[:, None] * lengths)
    far = 2 - 2 * _ratio(gram[:count, :count], roots[:, None] * roots)
    chords = xp.where(squares < lengths[:, None] * lengths, near, far)
    directed = (roots > 0)[:, None] & (roots > 0)
    chords = xp.where(directed, xp.clip(chords, 0, 4), 2) * (1 - xp.eye(count))  # a zero is at a right angle to all
    return Extent(largest * lengths, largest * longer, chords)


def _ratio(above: Any, below: Any) -> Any:
    """`above / below`, and zero where `below` is."""
    xp = xp_of(above, below)
    return xp.where(below > 0, above / xp.where(below > 0, below, 1), 0)


def _each(numbers: Any, base: Array) -> Array:
    """A number for each expert `(T,)`, as `(T, 1, ...)`."""
    return jnp.asarray(numbers, base.dtype).reshape(-1, *(1,) * base.ndim)


def sphere_of(base: Array, deltas: Array) -> Sphere:
    axes = tuple(range(1, deltas.ndim))
    tensors = base + deltas
    lengths = linalg.norm(tensors, axes)
    units = linalg.ratio(tensors, lengths)
    sums = lengths + lengths[0]
    middle = (tensors + tensors[0]) / jnp.where(sums > 0, sums, 1)
    longer = jnp.sum((deltas - deltas[0]) * middle, axis=axes)
    away = (units - units[0]).reshape(len(units), -1)
    gram = linalg.matmul(away, away.T)
    squares = jnp.diagonal(gram)
    chords = jnp.clip(squares[:, None] + squares - 2 * gram, 0, 4)
    return Sphere(base, deltas, units, lengths.reshape(-1), longer, chords)


def shares_of(weights: Array, sphere: Sphere) -> tuple[Array, Array]:
    """The weights as shares that sum to 1: among the tensors that have a direction, and among all."""
    return normalised(jnp.where(sphere.directed, weights, 0)), normalised(weights)


def normalised(weights: Array) -> Array:
    return linalg.weighted_mean(weights, jnp.sum(weights))


def spread(shares: Array, chords: Array) -> Array:
    """`sum_{s<t} p_s p_t ||u_s - u_t||^2`."""
    return jnp.dot(shares, linalg.matmul(chords, shares), precision=linalg.HIGHEST) / 2


def intrinsic_mean(shares: Array, chords: Array, max_iter: int, tol: Number) -> tuple[Array, Array]:
    """Shares `p` of the intrinsic mean `sum p_t u_t / ||.||`, and the length of the last mean tangent vector.

    Every iterate lies in the span of the `u_t`, so it is kept as shares. As `||sum c_t u_t||^2` is
    `(sum c)^2 - spread(c)`, the mean is `k sum p_t u_t` with `k = 1 / sqrt(1 - spread(p))`.
    """
    dtype = shares.dtype
    eps = jnp.finfo(dtype).eps

    def tangent(p: Array) -> tuple[Array, Array, Array]:
        """`k`, and the weighted mean of the logarithms of the `u_t`: its coefficients and its length."""
        towards, q = linalg.matmul(chords, p), spread(p, chords)
        root = jnp.sqrt(jnp.maximum(1 - q, eps))
        chord = jnp.clip((towards - 2 * q / (1 + root)) / root, 0, 4)  # ||u_t - mean||^2
        sine, cosine = linalg.root(chord * (1 - chord / 4)), 1 - chord / 2
        angle = jnp.arctan2(sine, cosine)
        stretch = shares * jnp.where(sine > eps, angle / jnp.where(sine > eps, sine, 1), 1)
        c = stretch - jnp.dot(stretch, cosine, precision=linalg.HIGHEST) * p / root
        square = jnp.sum(c) ** 2 - spread(c, chords)
        return 1 / root, c, linalg.root(square)

    def step(_: int | Array, p: Array) -> Array:
        k, c, length = tangent(p)
        there = jnp.cos(length) * k * p + jnp.sinc(length / jnp.pi) * c
        total = jnp.sum(there)
        moves = (length >= tol) & (total > eps)
        return jnp.where(moves, there / jnp.where(moves, total, 1), p)

    p = lax.fori_loop(0, max_iter, step, shares)
    return p, tangent(p)[2]
