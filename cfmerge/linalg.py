"""All linear algebra of cfmerge, and its precision policy.

Nobody else calls a decomposition. Products run at the full precision of their inputs' type (on GPU and TPU the
default would be TF32 or bfloat16); arrays stay in the dtype that they come in. Under `vmap` decompositions run one
after the other (`one_by_one`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

HIGHEST = lax.Precision.HIGHEST


def matmul(a: Array, b: Array) -> Array:
    """`a @ b`, never in reduced precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, mapped over a batch where `vmap` would have batched it; for what a derivative does not go through.

    Batched, both sides of a `cond` run: the fall-back for every matrix. And jaxlib 0.10.1 to 0.11.0 spreads a batch of
    decompositions over XLA's threads on a CPU and waits for them in one of these: as many batches at once as there are
    threads, such as a decomposition's and its fall-back's on two cores, can wait for ever.

    The function may hold numbers, but no arrays: inside a batched `cond` these would be batched and are refused.
    """
    return jax.custom_batching.sequential_vmap(function)


def root(x: Array) -> Array:
    """The square root, 0 of what is negative, and of derivative 0 there."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The Euclidean norm over the axes (all of them: None), which stay as ones; no square over- or underflows.

    Its derivative at zero is taken to be zero.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    nonzero = largest >= jnp.finfo(x.dtype).tiny
    scale = jnp.where(nonzero, largest, 1)
    squares = jnp.sum((x / scale) ** 2, axis=axis, keepdims=True)
    return jnp.where(nonzero, scale * jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)


def unit(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """`x / norm(x)` over the axes, and zero where `x` is zero."""
    length = norm(x, axis)
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), 0)


def gram(rows: Float[Array, "r n"]) -> Float[Array, "n n"]:
    """`rows^T rows`. A large one is formed in blocks, those below the diagonal by symmetry: 5/8 of the work."""
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
    """`left (rows^T rows)`, formed through the smaller side; `rows_gram` is `gram(rows)`."""
    m, n = left.shape
    r = rows.shape[0]
    if r * (m + m) < m * n:  # 2 products of m r n each, against one of m n n
        return matmul(matmul(left, rows.T), rows)
    return matmul(left, rows_gram)


def solve_right(rhs: Float[Array, "m n"], matrix: Float[Array, "n n"]) -> tuple[Float[Array, "m n"], Bool[Array, ""]]:
    """`rhs matrix^{-1}` for a symmetric positive definite matrix, by Cholesky.

    Returns the solution and whether the Cholesky factorisation held. Where it did not (the matrix is not
    positive definite to working precision) the solution comes from the eigenvalues, raised to at least
    `n * machine epsilon * largest`; the caller reports that. The derivative is that of the equation.
    """
    return lax.custom_linear_solve(
        lambda x: matmul(x, matrix), rhs, lambda _, b: _solve_right(b, matrix), symmetric=True, has_aux=True
    )


@one_by_one
def _solve_right(rhs: Array, matrix: Array) -> tuple[Array, Array]:
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    held = jnp.isfinite(factor[-1, -1])

    def by_cholesky(b: Array) -> Array:
        y = lax.linalg.triangular_solve(factor, b, left_side=False, lower=True, transpose_a=True)
        return lax.linalg.triangular_solve(factor, y, left_side=False, lower=True)

    def by_eigenvalues(b: Array) -> Array:
        values, vectors = jnp.linalg.eigh(matrix)
        floor = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
        values = jnp.maximum(values, jnp.maximum(floor, jnp.finfo(matrix.dtype).tiny))
        return matmul(matmul(b, vectors) / values, vectors.T)

    return lax.cond(held, by_cholesky, by_eigenvalues, rhs), held


def top_singular(
    matrix: Float[Array, "m n"], k: int, row_space: Float[Array, "q n"] | None = None
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """The `k` largest singular triplets of a matrix, largest first.

    `row_space`, if given, is any set of rows that spans the matrix's row space; when it is narrower than the
    matrix, the decomposition is done inside it (no `min(m, n)`-sized problem), and at most `q` triplets are
    returned.
    """
    if row_space is not None and row_space.shape[0] < min(matrix.shape):
        basis = orthonormal(row_space.T)
        u, s, vt = thin_svd(matmul(matrix, basis))
        vt = matmul(vt, basis.T)
    else:
        u, s, vt = thin_svd(matrix)
    return u[:, :k], s[:k], vt[:k]


@jax.custom_jvp
@one_by_one
def symmetric_eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, ascending, and eigenvectors as columns, of a symmetric matrix.

    Differentiable; eigenvectors whose eigenvalues are the same to working precision do not turn into each other,
    which is right for functions of the matrix that are constant there, and never infinite.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@symmetric_eigen.defjvp
def _symmetric_eigen_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    values, vectors = symmetric_eigen(primals[0])
    inner = matmul(vectors.T, matmul((tangents[0] + tangents[0].T) / 2, vectors))
    gaps = values[None, :] - values[:, None]
    close = jnp.abs(gaps) <= len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    turn = jnp.where(close, 0, inner / jnp.where(close, 1, gaps))
    return (values, vectors), (jnp.diagonal(inner), matmul(vectors, turn))


@jax.custom_jvp
@one_by_one
def thin_svd(
    matrix: Float[Array, "m n"],
) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """`U, s, V^T` with `r = min(m, n)`, largest first; differentiable as `symmetric_eigen` is, and at zero.

    On a CPU by divide and conquer, and by QR iteration where that fails on a finite matrix: LAPACK's divide and conquer
    does not always converge on many equal singular values; what it gives then is NaN.
    """
    found = tuple(jnp.linalg.svd(matrix, full_matrices=False))
    failed = jnp.isfinite(matrix).all() & ~jnp.isfinite(found[1]).all()

    def again(matrix: Array) -> tuple[Array, Array, Array]:
        return tuple(lax.linalg.svd(matrix, full_matrices=False, algorithm=lax.linalg.SvdAlgorithm.QR))

    def on_cpu(matrix: Array) -> tuple[Array, Array, Array]:
        return lax.cond(failed, again, lambda matrix: found, matrix)

    return lax.platform_dependent(matrix, cpu=on_cpu, default=lambda matrix: found)


@thin_svd.defjvp
def _thin_svd_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    u, s, vt = thin_svd(primals[0])
    change = tangents[0]
    inner = matmul(matmul(u.T, change), vt.T)
    cut = max(change.shape) * jnp.finfo(s.dtype).eps * s[0]
    inverse = jnp.where(s > cut, 1 / jnp.where(s > cut, s, 1), 0)
    apart, together = s[None, :] - s[:, None], s[None, :] + s[:, None]
    close = jnp.abs(apart) <= cut
    turn = jnp.where(close, 0, 1 / jnp.where(close, 1, apart * together))
    of_u = matmul(u, turn * (inner * s + s[:, None] * inner.T))
    of_v = matmul(vt.T, turn * (s[:, None] * inner + inner.T * s))
    of_u = of_u + (matmul(change, vt.T) - matmul(u, inner)) * inverse
    of_v = of_v + (matmul(change.T, u) - matmul(vt.T, inner.T)) * inverse
    return (u, s, vt), (of_u, jnp.diagonal(inner), of_v.T)


@jax.custom_jvp
@one_by_one
def orthonormal(columns: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """Orthonormal columns that span the same (`k <= m`), by QR: the first j span what the first j of `columns` do."""
    return jnp.linalg.qr(columns)[0]


@orthonormal.defjvp
def _orthonormal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (q, _), (dq, _) = jax.jvp(jnp.linalg.qr, primals, tangents)
    return q, dq


@one_by_one
def complete_qr(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m m"], Float[Array, "m n"]]:
    """`Q R` with a square `Q`: beyond column `n` a basis of what is orthogonal to the matrix. It has no derivative."""
    q, r = jnp.linalg.qr(matrix, mode="complete")
    return q, r


def kth_largest(values: Float[Array, "..."], k: int | Array) -> Float[Array, ""]:
    """The `k`-th largest of numbers that are not negative, `k >= 1`: exact, by bisection on their bits.

    One pass over the numbers for every bit, which beats sorting them; `k` may be traced.
    """
    integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    bits = lax.bitcast_convert_type(lax.stop_gradient(values), integer)  # ordered as the numbers are
    count = jnp.asarray(k, jnp.int32)

    def settle(step: int | Array, found: Array) -> Array:
        raised = found | jnp.left_shift(jnp.ones((), integer), jnp.asarray(top - step, integer))
        return jnp.where(jnp.sum(bits >= raised, dtype=jnp.int32) >= count, raised, found)

    top = 8 * values.dtype.itemsize - 2
    return lax.bitcast_convert_type(lax.fori_loop(0, top + 1, settle, jnp.zeros((), integer)), values.dtype)


def largest_eigenvalue(matrix: Float[Array, "n n"], steps: int = 16) -> Float[Array, ""]:
    """The largest eigenvalue of a symmetric positive semi-definite matrix, from below, by power iteration."""
    tiny = jnp.finfo(matrix.dtype).tiny

    def step(_: int | Array, vector: Array) -> Array:
        image = matmul(matrix, vector)
        return image / jnp.maximum(jnp.max(jnp.abs(image)), tiny)  # the largest entry: squares would underflow

    start = jax.random.normal(jax.random.key(0), (matrix.shape[0],), matrix.dtype)
    vector = lax.fori_loop(0, steps, step, start)
    image = matmul(matrix, vector)
    scale = jnp.maximum(jnp.max(jnp.abs(image)), tiny)
    return scale * jnp.linalg.norm(image / scale) / jnp.maximum(jnp.linalg.norm(vector), tiny)


def pseudo_inverse(
    matrix: Float[Array, "n n"], cutoff: float | Array | None = None
) -> tuple[Float[Array, "n n"], Int[Array, ""], Float[Array, ""]]:
    """The pseudo-inverse of a symmetric positive semi-definite matrix; differentiable while its rank stays.

    Eigenvalues up to `cutoff` times the largest count as zero (none: `n * machine epsilon`). Returns also how many
    do not, and the least of these over the largest.
    """
    floor = matrix.shape[0] * jnp.finfo(matrix.dtype).eps if cutoff is None else cutoff
    return _pseudo_inverse(matrix, jnp.asarray(floor, matrix.dtype))


@jax.custom_jvp
def _pseudo_inverse(matrix: Array, cutoff: Array) -> tuple[Array, Array, Array]:
    values, vectors = symmetric_eigen(matrix)
    largest = jnp.maximum(jnp.max(jnp.abs(values)), jnp.finfo(matrix.dtype).tiny)
    keep = values > cutoff * largest
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    least = jnp.min(jnp.where(keep, values, largest)) / largest
    return matmul(vectors * inverse, vectors.T), jnp.sum(keep, dtype=jnp.int32), least


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Any, Any]:
    """Golub and Pereyra 1973: `dP = -P dA P + P P dA (I - A P) + (I - P A) dA P P` for symmetric `A`."""
    matrix, change = primals[0], tangents[0]
    inverse, kept, least = _pseudo_inverse(*primals)
    outside = jnp.eye(matrix.shape[0], dtype=matrix.dtype) - matmul(matrix, inverse)
    across = matmul(matmul(inverse, inverse), matmul(change, outside))
    changed = across + across.T - matmul(matmul(inverse, change), inverse)
    return (inverse, kept, least), (changed, np.zeros(kept.shape, jax.dtypes.float0), jnp.zeros_like(least))


def conjugate_gradients(
    times: Callable[[Array], Array], target: Array, start: Array, steps: int
) -> tuple[Array, Float[Array, ""]]:
    """`steps` steps of conjugate gradients on `times(x) = target`, for arrays of any shape.

    `times` is linear, symmetric and positive semi-definite for the sum of entrywise products. Stops where the
    residual is at rounding level, or where the direction is one that `times` takes to zero but for rounding. Returns
    the solution and the residual's norm over the target's.
    """
    tiny, eps = jnp.finfo(target.dtype).tiny, jnp.finfo(target.dtype).eps
    largest = jnp.max(jnp.abs(target))  # the residuals are scaled by it: their squares would leave the range
    unit = jnp.where(largest > 0, largest, 1)
    goal = target / unit
    enough = eps**2 * jnp.sum(goal * goal)

    def step(_: int | Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, direction, square, steepest = state
        image = times(direction)
        curvature, size = jnp.sum(direction * image), jnp.sum(direction * direction)
        steepest = jnp.maximum(steepest, curvature / jnp.where(size > 0, size, 1))
        going = (square > enough) & (curvature > jnp.maximum(tiny, 16 * eps * steepest * size))
        length = jnp.where(going, square / jnp.where(going, curvature, 1), 0)
        x, residual = x + length * direction, residual - length * image
        following = jnp.sum(residual * residual)
        turn = jnp.where(going, following / jnp.where(going, square, 1), 0)
        return x, residual, jnp.where(going, residual + turn * direction, direction), following, steepest

    start = start / unit
    residual = goal - times(start)
    state = (start, residual, residual, jnp.sum(residual * residual), jnp.zeros((), goal.dtype))
    x, _, _, square, _ = lax.fori_loop(0, steps, step, state)
    left, whole = lax.stop_gradient((square, jnp.sum(goal * goal)))
    return x * unit, jnp.sqrt(left / jnp.where(whole > 0, whole, 1))


def low_rank_factors(
    matrix: Float[Array, "m n"], rank: int
) -> tuple[Float[Array, "m rank"], Float[Array, "rank n"], Float[Array, ""]]:
    """`matrix ~ left @ right` with orthonormal columns in `left`, and the relative Frobenius error.

    Randomised range finder with one power step (Halko, Martinsson, Tropp 2011, algorithm 4.4), with a fixed
    key: the same matrix gives the same factors. Exact to rounding when the matrix has rank at most `rank`.
    """
    sketch = jax.random.normal(jax.random.key(0), (matrix.shape[1], rank), matrix.dtype)
    left = orthonormal(matmul(matrix, sketch))
    left = orthonormal(matmul(matrix, matmul(left.T, matrix).T))
    right = matmul(left.T, matrix)
    norm = jnp.linalg.norm(matrix)
    residual = jnp.linalg.norm(matrix - matmul(left, right))
    return left, right, residual / jnp.maximum(norm, jnp.finfo(matrix.dtype).tiny)
