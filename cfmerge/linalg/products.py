"""Products at the full precision of their inputs' type, norms, and Grams."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HIGHEST = lax.Precision.HIGHEST


def matmul(a: Array, b: Array) -> Array:
    """`a @ b`, never in reduced precision.

    Example:
        >>> linalg.matmul(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])).tolist()
        [[11.0]]
    """
    return jnp.matmul(a, b, precision=HIGHEST)


def root(x: Array) -> Array:
    """The square root, 0 of what is negative, and of derivative 0 there.

    Example:
        >>> linalg.root(jnp.array([4.0, 0.0, -1.0])).tolist()
        [2.0, 0.0, 0.0]
    """
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The Euclidean norm over the axes (all of them: None), which stay as ones; no square over- or underflows.

    Its derivative at zero is taken to be zero.

    Example:
        >>> linalg.norm(jnp.array([[3.0, 4.0], [0.0, 1e-30]]), axis=1).tolist()
        [[5.0], [1.0000000031710769e-30]]
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    nonzero = largest >= jnp.finfo(x.dtype).tiny
    scale = jnp.where(nonzero, largest, 1)
    squares = jnp.sum((x / scale) ** 2, axis=axis, keepdims=True)
    return jnp.where(nonzero, scale * jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)


def ratio(above: float | Array, below: Array, otherwise: float = 0.0) -> Array:
    """`above / below`, or `otherwise` where `below` is zero (or denormal); its derivative is zero there.

    Example:
        >>> linalg.ratio(jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0])).tolist()
        [0.25, 0.0]
    """
    zero = jnp.abs(below) < jnp.finfo(below.dtype).tiny
    return jnp.where(zero, otherwise, above / jnp.where(zero, 1, below))


def unit(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """`x / norm(x)` over the axes, and zero where `x` is zero.

    Example:
        >>> linalg.unit(jnp.array([[0.0, 4.0], [0.0, 0.0]]), axis=1).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    return ratio(x, norm(x, axis))


def weighted_sum(weights: Float[Array, " T"], arrays: Float[Array, "T ..."]) -> Float[Array, "..."]:
    """`sum_t w_t A_t`.

    Example:
        >>> linalg.weighted_sum(jnp.array([2.0, -1.0]), jnp.array([[1.0, 3.0], [0.0, 4.0]])).tolist()
        [2.0, 2.0]
    """
    return jnp.tensordot(weights, arrays, 1, precision=HIGHEST)


def weighted_mean(total: Float[Array, "..."], weight: float | Float[Array, ""]) -> Float[Array, "..."]:
    """`total / weight` of a weighted sum, and the sum itself where the weights sum to 0.

    Example:
        >>> linalg.weighted_mean(jnp.array([2.0, 6.0]), 4.0).tolist()
        [0.5, 1.5]
    """
    return total / jnp.where(weight == 0, 1, weight)


def gram(rows: Float[Array, "r n"]) -> Float[Array, "n n"]:
    """`rows^T rows`. A large one is formed in blocks, those below the diagonal by symmetry: 5/8 of the work.

    Example:
        >>> linalg.gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    n = rows.shape[1]
    if n < 512:
        return matmul(rows.T, rows)
    parts = jnp.split(rows, [n // 4, n // 2, n - n // 4], axis=1)
    blocks: list[list[Array]] = [[] for _ in parts]
    for i, left in enumerate(parts):
        blocks[i] = [blocks[j][i].T for j in range(i)] + [matmul(left.T, right) for right in parts[i:]]
    return jnp.block(blocks)


def times_gram(
    left: Float[Array, "m n"], rows: Float[Array, "r n"], rows_gram: Float[Array, "n n"]
) -> Float[Array, "m n"]:
    """`left (rows^T rows)`, formed through the smaller side; `rows_gram` is `gram(rows)`.

    Example:
        >>> rows = jnp.array([[1.0, 2.0, 0.0]])
        >>> linalg.times_gram(jnp.eye(3)[:2], rows, linalg.gram(rows)).tolist()
        [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]
    """
    m, n = left.shape
    r = rows.shape[0]
    if r * (m + m) < m * n:  # 2 products of m r n each, against one of m n n
        return matmul(matmul(left, rows.T), rows)
    return matmul(left, rows_gram)
