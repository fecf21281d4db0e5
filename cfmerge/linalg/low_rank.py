"""The leading singular triplets of a matrix, and matrices of low rank: `matrix = U diag(s) V^T`, `r = min(m, n)`.

Where it is accurate enough, an eigendecomposition of the smaller Gram replaces the SVD: it squares the condition
number, but costs a fraction. Which of them it was is decided by what they find, not by what is hoped for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from cfmerge.linalg.batching import one_by_one
from cfmerge.linalg.filled import filled
from cfmerge.linalg.products import gram, matmul, unit
from cfmerge.linalg.spectra import orthonormal, symmetric_eigen, thin_svd

MARGIN = 16  # at least so many eigenvectors beyond the leading ones are turned with them


def rank_cutoff(shape: tuple[int, ...], dtype: Any) -> float:
    """The singular value, relative to the largest, up to which a matrix is singular to working precision.

    Rounding is a matrix of independent entries, whose largest singular value grows as the root of its sides, not (as
    the usual `max(shape) eps` has it) as the sides: four times that, 1.3e-5 for 768 x 768 in float32.

    Example:
        >>> f"{linalg.rank_cutoff((768, 768), jnp.float32):.1e}"
        '1.3e-05'
    """
    return 4 * float(np.sqrt(max(shape)) * jnp.finfo(dtype).eps)


def nonzero(s: Float[Array, " k"], largest: Array, cutoff: float) -> Bool[Array, " k"]:
    """Which singular values are above `cutoff` times the largest, and not denormal.

    Example:
        >>> s = jnp.array([10.0, 1.0, 1e-7])
        >>> linalg.nonzero(s, s[0], 1e-6).tolist()
        [True, True, False]
    """
    return (s > cutoff * largest) & (s >= jnp.finfo(s.dtype).tiny)


def svd(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """`U, s, V^T`, largest first; differentiable as `leading` is.

    Example:
        >>> u, s, vt = linalg.svd(jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> s.round(5).tolist(), u.shape, vt.shape
        ([2.0, 1.0], (2, 2), (2, 3))
    """
    return leading(matrix, min(matrix.shape))


def leading(
    matrix: Float[Array, "m n"], k: int, row_space: Float[Array, "q n"] | None = None
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """The `k` largest singular triplets, largest first: by the smaller Gram if it resolves them, else by the SVD.

    Two Grams, for one sees `s_k / s_1` squared (`_by_grams`), the second of few vectors where the others are apart
    (`_against_the_rest`); trusted while `s_k / s_1 > eps^0.6` (7e-5 in float32). In
    derivatives the vectors of equal singular values do not turn into one another.

    Args:
        row_space: any rows that span the matrix's row space. When they are fewer than its sides the decomposition is
            done inside their span, and at most `q` triplets are returned.

    Example:
        >>> u, s, vt = linalg.leading(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> s.round(5).tolist(), u.shape, vt.shape
        ([3.0, 2.0], (3, 2), (2, 3))
    """
    if row_space is None or row_space.shape[0] >= min(matrix.shape):
        return _leading(matrix, k)
    basis = orthonormal(row_space.T)
    u, s, vt = _leading(matmul(matrix, basis), min(k, basis.shape[1]))
    return u, s, matmul(vt, basis.T)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _leading(matrix: Array, k: int) -> tuple[Array, Array, Array]:
    return one_by_one(functools.partial(_triplets, k=k))(matrix)


def _triplets(matrix: Array, k: int) -> tuple[Array, Array, Array]:
    m, n = matrix.shape
    if m > n:
        v, s, ut = _triplets(matrix.T, k)
        return ut.T, s, v.T
    if k == 0 or (2 * k > m and n < 2 * m):  # nothing to gain
        return svd_wide(matrix, k)
    scale = scale_of(matrix)
    scaled = matrix / scale
    values, vectors = symmetric_eigen(gram(scaled.T))
    values, vectors = values[::-1], vectors[:, ::-1]

    def by_grams(x: Array) -> tuple[Array, Array, Array]:
        u = lax.cond(are_apart(values, k, p), near, whole, x) if 2 * p <= m else whole(x)
        rows = matmul(u.T, x)
        s = jnp.sqrt(jnp.sum(rows**2, axis=1))
        order = jnp.argsort(-s)
        return u[:, order], s[order], _orthonormal((rows / s[:, None])[order].T).T

    def whole(x: Array) -> Array:
        return _orthonormal(matmul(vectors, _by_grams(x, values, vectors, k)))

    def near(x: Array) -> Array:
        return _orthonormal(_against_the_rest(x, values, vectors, _by_grams(x, values[:p], vectors[:, :p], k)))

    p = k + max(MARGIN, k // 2)
    smallest = float(jnp.finfo(matrix.dtype).eps) ** 0.6
    zeros = jax.tree.map(lambda part: filled(0, scaled, part.shape), jax.eval_shape(by_grams, scaled))
    found = lax.cond(values[k - 1] > smallest**2 * values[0], by_grams, lambda x: zeros, scaled)
    resolved = found[1][-1] > smallest * found[1][0]  # the eigenvalue may have been noise, the row's norm is not
    u, s, vt = lax.cond(resolved, lambda x: found, lambda x: svd_wide(x, k), scaled)
    return u, scale * s, vt


def _by_grams(x: Float[Array, "m n"], values: Array, vectors: Array, k: int) -> Float[Array, "p k"]:
    """The `k` leading left singular vectors, in terms of the `p` leading eigenvectors of the rounded `X X^T`.

    Two of those vectors are mixed by `eps s_1^2` over the distance of their eigenvalues, as an SVD would mix them by
    `eps s_1 s_j` over it. The Gram of the rows `U^T X` has a rounding of only `eps s_i s_j`, so it shows the mixing.
    Of vectors well above `s_k`, beyond `s_k (s_1 / s_k)^(1/4)`, it is small and undone to first order; mixing with
    neighbours across that line does no harm, both are kept. All others have a Gram of their own, of a rounding of
    `eps s_1^(1/2) s_k^(3/2)`.
    """
    p = len(values)
    image = gram(matmul(vectors.T, x).T)
    cut = values[0] ** 0.25 * values[k - 1] ** 0.75
    above = values > cut
    either, square = above[:, None] | above[None], jnp.diagonal(image)
    apart = square[None] - square[:, None]
    small = either & (16 * jnp.abs(image) < jnp.abs(apart))
    mixed = jnp.where(small, image / jnp.where(small, apart, 1), 0)
    first = jnp.diag(cut * jnp.linspace(3, 2, p, dtype=x.dtype))  # decoupled from the rest, in the order they have
    turned = symmetric_eigen(jnp.where(either, first * above, image))[1][:, ::-1][:, :k]
    return turned + matmul(mixed, turned)


def are_apart(values: Float[Array, " m"], k: int, p: int) -> Bool[Array, ""]:
    """Whether the `k` leading vectors are mixed so little with those from `p` on that two corrections undo it.

    With `e = eps s_1^2 / (s_k^2 - s_p^2)` they leave `e^3` of it, and an SVD mixes by `e s_k / s_1`.
    """
    noise = 16 * jnp.finfo(values.dtype).eps * values[0]
    return (values[k - 1] - values[p]) * jnp.maximum(values[k - 1], 0) ** 0.25 > noise * values[0] ** 0.25


def _against_the_rest(x: Float[Array, "m n"], values: Array, vectors: Array, own: Float[Array, "p k"]) -> Array:
    """The left vectors `own`, in terms of the first `p` eigenvectors, corrected by what they hold of the others.

    A vector `u` of `u^T X X^T u = l` lacks `v_j (v_j^T X X^T u) / (l - l_j)`, to first order, of an eigenvector `v_j`.
    """
    p = len(own)
    first, rest = vectors[:, :p], vectors[:, p:]
    u = matmul(first, own)
    others = jnp.zeros((rest.shape[1], own.shape[1]), x.dtype)
    for _ in range(2):
        rows = matmul(u.T, x)
        squares = jnp.sum(rows**2, axis=1) / jnp.sum(u**2, axis=0)
        image = matmul(rest.T, matmul(x, rows.T))
        others = others + (image - others * squares) / (squares - values[p:, None])
        u = matmul(first, own) + matmul(rest, others)
    return u


def _orthonormal(columns: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """Columns that are nearly orthonormal, by two steps of Gram-Schmidt to first order: the earlier are the exacter."""
    eye = jnp.eye(columns.shape[1], dtype=columns.dtype)
    for _ in range(2):
        excess = gram(columns) - eye
        columns = columns - matmul(columns, jnp.triu(excess) - excess * eye / 2)
    return columns


@_leading.defjvp
def _leading_jvp(k: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (matrix,), (change,) = primals, tangents
    u, s, vt = thin_svd(matrix)
    squares = s**2
    apart = squares[None, :k] - squares[:, None]
    tied = jnp.abs(apart) <= 8 * jnp.finfo(s.dtype).eps * jnp.maximum(squares[0], jnp.finfo(s.dtype).tiny)
    turn = jnp.where(tied, 0, 1 / jnp.where(tied, 1, apart))
    s_k, positive = s[:k], nonzero(s[:k], s[0], rank_cutoff(matrix.shape, s.dtype))
    inverse = jnp.where(positive, 1 / jnp.where(positive, s_k, 1), 0)
    right, left = matmul(change, vt[:k].T), matmul(change.T, u[:, :k])  # dA V_k, dA^T U_k
    across, along = matmul(u.T, right), matmul(vt, left)  # U^T dA V_k, V^T dA^T U_k
    du = matmul(u, turn * (across * s_k + s[:, None] * along)) + (right - matmul(u, across)) * inverse
    dv = matmul(vt.T, turn * (s[:, None] * across + along * s_k)) + (left - matmul(vt.T, along)) * inverse
    return (u[:, :k], s_k, vt[:k]), (du, jnp.diagonal(across), dv.T)


def svd_wide(matrix: Float[Array, "m n"], k: int) -> tuple[Array, Array, Array]:
    """By the SVD of the transposed, which LAPACK does about twice as fast where m < n."""
    v, s, ut = thin_svd(matrix.T)
    return ut.T[:, :k], s[:k], v.T[:k]


def span(columns: Float[Array, "m k"]) -> tuple[Float[Array, "m p"], Float[Array, "p k"]]:
    """`columns = basis @ coordinates`, with orthonormal columns in the basis, as many as there are directions.

    `p = min(m, k)`; the basis' other columns, and their coordinates, are zero. Columns count as if they were of one
    length. By QR, which squares nothing, and the SVD of its small factor.

    Example:
        >>> columns = jnp.array([[3.0, 6.0], [4.0, 8.0], [0.0, 0.0]])
        >>> basis, coordinates = linalg.span(columns)
        >>> bool(jnp.all(basis[:, 1] == 0)), bool(jnp.allclose(basis @ coordinates, columns))
        (True, True)
    """
    m, k = columns.shape
    units = unit(columns, 0)
    q = orthonormal(units) if k <= m else jnp.eye(m, dtype=columns.dtype)
    u, s, _ = thin_svd(matmul(q.T, units))
    basis = matmul(q, u * nonzero(s, s[0], rank_cutoff(columns.shape, columns.dtype)))
    return basis, matmul(basis.T, columns)


def scale_of(matrix: Array) -> Array:
    """The largest entry, by which squares neither over- nor underflow; 1 of a matrix that is zero."""
    largest = jnp.max(jnp.abs(matrix), initial=0)
    return jnp.where(largest >= jnp.finfo(matrix.dtype).tiny, largest, 1)


def truncated(matrix: Float[Array, "m n"], k: int) -> Float[Array, "m n"]:
    """The best approximation of rank `k`.

    Example:
        >>> linalg.truncated(jnp.diag(jnp.array([1.0, 3.0])), 1).round(5).tolist()
        [[0.0, 0.0], [0.0, 3.0]]
    """
    u, s, vt = leading(matrix, k)
    return matmul(u * s, vt)


def low_rank_factors(
    matrix: Float[Array, "m n"], rank: int
) -> tuple[Float[Array, "m rank"], Float[Array, "rank n"], Float[Array, ""]]:
    """`matrix ~ left @ right` with orthonormal columns in `left`, and the relative Frobenius error.

    Randomised range finder with one power step (Halko, Martinsson, Tropp 2011, algorithm 4.4), with a fixed
    key: the same matrix gives the same factors. Exact to rounding when the matrix has rank at most `rank`.

    Example:
        >>> matrix = jnp.outer(jnp.arange(4.0), jnp.arange(5.0))
        >>> left, right, error = linalg.low_rank_factors(matrix, 1)
        >>> left.shape, right.shape, bool(error < 1e-5)
        ((4, 1), (1, 5), True)
    """
    sketch = jax.random.normal(jax.random.key(0), (matrix.shape[1], rank), matrix.dtype)
    left = orthonormal(matmul(matrix, sketch))
    left = orthonormal(matmul(matrix, matmul(left.T, matrix).T))
    right = matmul(left.T, matrix)
    norm = jnp.linalg.norm(matrix)
    residual = jnp.linalg.norm(matrix - matmul(left, right))
    return left, right, residual / jnp.maximum(norm, jnp.finfo(matrix.dtype).tiny)
