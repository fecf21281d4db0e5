"""All linear algebra of cfmerge, and its precision policy.

Nobody else calls a decomposition. Products run at the full precision of their inputs' type (on GPU and TPU the
default would be TF32 or bfloat16); arrays stay in the dtype that they come in.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

HIGHEST = lax.Precision.HIGHEST


def matmul(a: Array, b: Array) -> Array:
    """`a @ b`, never in reduced precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


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
    `n * machine epsilon * largest`; the caller reports that.
    """
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
        basis, _ = jnp.linalg.qr(row_space.T)
        u, s, vt = jnp.linalg.svd(matmul(matrix, basis), full_matrices=False)
        vt = matmul(vt, basis.T)
    else:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k], vt[:k]


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


def low_rank_factors(
    matrix: Float[Array, "m n"], rank: int
) -> tuple[Float[Array, "m rank"], Float[Array, "rank n"], Float[Array, ""]]:
    """`matrix ~ left @ right` with orthonormal columns in `left`, and the relative Frobenius error.

    Randomised range finder with one power step (Halko, Martinsson, Tropp 2011, algorithm 4.4), with a fixed
    key: the same matrix gives the same factors. Exact to rounding when the matrix has rank at most `rank`.
    """
    sketch = jax.random.normal(jax.random.key(0), (matrix.shape[1], rank), matrix.dtype)
    left, _ = jnp.linalg.qr(matmul(matrix, sketch))
    left, _ = jnp.linalg.qr(matmul(matrix, matmul(left.T, matrix).T))
    right = matmul(left.T, matrix)
    norm = jnp.linalg.norm(matrix)
    residual = jnp.linalg.norm(matrix - matmul(left, right))
    return left, right, residual / jnp.maximum(norm, jnp.finfo(matrix.dtype).tiny)
