"""Polar factors: `U V^T` over the singular values that are not zero to working precision.

That is a partial isometry, and unique; an SVD's `U V^T` would fill the null space with whatever vectors it happens to
return. Newton-Schulz iterations, which are nothing but products, replace the SVD on accelerators where they converge.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cfmerge.linalg.batching import one_by_one
from cfmerge.linalg.filled import filled
from cfmerge.linalg.low_rank import nonzero, rank_cutoff, scale_of, svd_wide
from cfmerge.linalg.products import gram, matmul
from cfmerge.linalg.spectra import symmetric_eigen, thin_svd

# Odd quintics a x + b x^3 + c x^5 that take [1e-3, 1] to within 1e-3 of 1, each the closest to 1 on what the one before
# leaves (Remez; the greedy choice is optimal: Amsel et al., The Polar Express, arXiv 2505.16932). The last is
# Newton-Schulz.
QUINTICS = (
    (8.470329, -25.108075, 18.629276),
    (4.182834, -3.108701, 0.580607),
    (3.961857, -2.954064, 0.562976),
    (3.286586, -2.464720, 0.507358),
    (2.273750, -1.644660, 0.416191),
    (1.888716, -1.265157, 0.376519),
    (1.875, -1.25, 0.375),
)

SLOPE = 1980.0  # what the quintics before the last multiply a small singular value by, together


class Polar(NamedTuple):
    """A polar factor, and how it was found.

    Attributes:
        factor: `sum_i u_i v_i^T` over the singular values above the cutoff.
        rank: their number, as a float.
        by_svd: 1 if it took an SVD, 0 if products (or the Gram) were enough.

    Example:
        >>> found = linalg.polar(jnp.eye(2))
        >>> float(found.rank)
        2.0
    """

    factor: Float[Array, "m n"]
    rank: Float[Array, ""]
    by_svd: Float[Array, ""]


def polar(matrix: Float[Array, "m n"], cutoff: float | None = None) -> Polar:
    """The polar factor; differentiable while the rank stays.

    Args:
        cutoff: singular values up to this share of the largest count as zero (none: `rank_cutoff`).

    Example:
        >>> linalg.polar(jnp.array([[0.0, 5.0, 0.0], [2.0, 0.0, 0.0]])).factor.round(5).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    return _polar(matrix, rank_cutoff(matrix.shape, matrix.dtype) if cutoff is None else cutoff)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _polar(matrix: Float[Array, "m n"], cutoff: float) -> Polar:
    return one_by_one(functools.partial(_polar_factor, cutoff=cutoff))(matrix)


def _polar_factor(matrix: Array, cutoff: float) -> Polar:
    m, n = matrix.shape
    if m > n:
        transposed = _polar_factor(matrix.T, cutoff)
        return transposed._replace(factor=transposed.factor.T)
    scaled = matrix / scale_of(matrix)
    if n < 2 * m:
        return _by_platform(scaled, cutoff)
    values, vectors = symmetric_eigen(gram(scaled.T))

    def by_gram(x: Array) -> Polar:
        root = matmul(vectors / jnp.sqrt(values), vectors.T)
        return Polar(matmul(root, x), filled(m, x), filled(0, x))

    def by_rows(x: Array) -> Polar:
        rows, converged = orthonormal_rows(matmul(vectors.T, x), cutoff)
        found = Polar(matmul(vectors, rows), filled(m, x), filled(0, x))
        return lax.cond(converged, lambda x: found, lambda x: _by_platform(x, cutoff), x)

    eps, ratio = float(jnp.finfo(matrix.dtype).eps), values[0] / values[-1]
    way = jnp.where(ratio > eps**0.4, 0, jnp.where(ratio > max(eps, cutoff**2), 1, 2))
    return lax.switch(way, [by_gram, by_rows, lambda x: _by_platform(x, cutoff)], scaled)


def orthonormal_rows(rows: Float[Array, "m n"], cutoff: float) -> tuple[Float[Array, "m n"], Bool[Array, ""]]:
    """The polar factor of rows that are nearly orthogonal, by Newton's method, and whether it was found.

    With unit rows `R`, `D R = rows`, it is `F R` such that `N = F R R^T F^T` is `I` and `H = F R R^T D` symmetric. For
    `F - Z F` that is, to first order and with `H` nearly `D`: `Z + Z^T = N - I`, `Z D - D Z^T = H - H^T`. It is not
    looked for where a row is shorter than `cutoff` or the root of the machine epsilon, times the longest.
    """
    lengths = jnp.linalg.norm(rows, axis=1)
    units = rows / lengths[:, None]
    square, eye = gram(units.T), jnp.eye(len(rows), dtype=rows.dtype)
    enough = float(jnp.finfo(rows.dtype).eps) ** 0.5  # the next would be its square

    def following(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, root, _ = state
        half = matmul(root, square)
        change = changed(half, matmul(half, root.T))
        return count + 1, root - matmul(change, root), jnp.linalg.norm(change)

    def changed(half: Array, whole: Array) -> Array:
        skew = half * lengths - (half * lengths).T
        return (skew + lengths[:, None] * (whole - eye)) / (lengths[:, None] + lengths)

    first = changed(square, square)
    start = (jnp.zeros((), int), eye - first, jnp.linalg.norm(first))
    _, root, left = lax.while_loop(lambda state: (state[0] < 5) & (state[2] > enough), following, start)
    found = (left <= enough) & (jnp.min(lengths) > max(enough, cutoff) * jnp.max(lengths))
    return matmul(root, units), found


def _by_platform(x: Float[Array, "m n"], cutoff: float) -> Polar:
    """On a CPU an SVD costs no more than thirty products (but more than nine); elsewhere it costs very much more."""
    return lax.platform_dependent(
        x,
        cpu=lambda x: polar_if_near(x, cutoff),
        default=lambda x: polar_by_products(x, cutoff),
    )


def polar_by_svd(x: Float[Array, "m n"], cutoff: float) -> Polar:
    """The polar factor of a wide matrix by its SVD, which alone can tell the rank of a matrix that has not all."""
    u, s, vt = svd_wide(x, x.shape[0])
    kept = nonzero(s, s[0], cutoff)
    return Polar(matmul(u * kept, vt), jnp.sum(kept, dtype=x.dtype), filled(1, x))


def polar_if_near(x: Float[Array, "m n"], cutoff: float) -> Polar:
    """The polar factor of a wide matrix: a few Newton-Schulz steps if its singular values are alike, else by SVD."""
    m = x.shape[0]
    norm = jnp.linalg.norm(x)
    unit = x * jnp.where(norm > 0, np.sqrt(m) / norm, 0)
    square = gram(unit.T)
    most = jnp.where(_distance(square) < 0.1, 4, 0)
    return _polar_if_converged(x, cutoff, _to_one(unit, square, QUINTICS[-1:], most))


def polar_by_products(x: Float[Array, "m n"], cutoff: float) -> Polar:
    """The polar factor of a wide matrix by Newton-Schulz, by the SVD if that does not converge."""
    return _polar_if_converged(x, cutoff, newton_schulz(x, cutoff))


Steps = tuple[Float[Array, "m n"], Bool[Array, ""], Int[Array, ""]]  # the result, whether it converged, their number


def _polar_if_converged(x: Float[Array, "m n"], cutoff: float, steps: Steps) -> Polar:
    factor, converged, _ = steps
    found = Polar(factor, filled(x.shape[0], x), filled(0, x))
    return lax.cond(converged, lambda x: found, lambda x: polar_by_svd(x, cutoff), x)


def newton_schulz(x: Float[Array, "m n"], cutoff: float) -> Steps:
    """Quintic steps on a wide matrix until `X X^T = I`: the factor, whether it got there, the number of steps.

    Singular values are multiplied until they are 1; those below the cutoff would be too, so the number of steps
    is bounded by what the cutoff needs, and a matrix that has such does not converge.
    """
    most = len(QUINTICS) + max(1, int(np.log(max(8 / (SLOPE * cutoff), 1)) / np.log(1.875)))
    square = gram(x.T)
    fourth = jnp.sqrt(jnp.sqrt(jnp.linalg.norm(matmul(square, square))))  # (sum s^8)^(1/8), at least s_1
    bound = jnp.where(fourth > 0, fourth, 1) * (1 + 1e-3)
    return _to_one(x / bound, square / bound**2, QUINTICS, most)


def _to_one(x: Float[Array, "m n"], square: Float[Array, "m m"], quintics: Any, most: int | Array) -> Steps:
    """At most so many steps, by the quintics in turn and then the last of them; `square` is `X X^T`."""
    eye = jnp.eye(len(x), dtype=x.dtype)
    numbers = [jnp.full((), number, x.dtype) for quintic in quintics for number in quintic]  # no array: see one_by_one
    coefficients = jnp.stack(numbers).reshape(-1, 3)
    tolerance = 64 * float(jnp.finfo(x.dtype).eps)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        step, _, square = state
        return (step < most) & (_distance(square) > tolerance)

    def next_step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, x, square = state
        a, b, c = coefficients[jnp.minimum(step, len(quintics) - 1)]
        x = matmul(a * eye + matmul(b * eye + c * square, square), x)
        return step + 1, x, gram(x.T)

    steps, factor, square = lax.while_loop(unfinished, next_step, (jnp.zeros((), int), x, square))
    return factor, _distance(square) <= tolerance, steps


def _distance(square: Float[Array, "m m"]) -> Array:
    """Root mean square of the rows of `X X^T - I`."""
    return jnp.linalg.norm(square - jnp.eye(len(square), dtype=square.dtype)) / np.sqrt(len(square))


@_polar.defjvp
def _polar_jvp(cutoff: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    """`U [(P - P^T) / (s_i + s_j)] V^T` with `P = U^T dA V`, and what leaves the row and column spaces, over `s`."""
    (matrix,), (change,) = primals, tangents
    found = _polar(matrix, cutoff)
    u, s, vt = thin_svd(matrix)
    kept = nonzero(s, s[0], cutoff)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    both = kept[:, None] & kept[None]
    inside = jnp.where(both, 1 / jnp.where(both, s[:, None] + s[None], 1), 0)
    u, vt = u * kept, vt * kept[:, None]
    right, left = matmul(change, vt.T), matmul(u.T, change)
    across = matmul(u.T, right)
    changed = matmul(matmul(u, inside * (across - across.T)), vt)
    changed += matmul((right - matmul(u, across)) * inverse, vt)
    changed += matmul(u * inverse, left - matmul(across, vt))
    return found, Polar(changed, jnp.zeros_like(found.rank), jnp.zeros_like(found.by_svd))
