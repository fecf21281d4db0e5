"""Decompositions as LAPACK gives them, differentiable, one after the other under `vmap`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge.linalg.batching import one_by_one
from cfmerge.linalg.filled import filled
from cfmerge.linalg.products import matmul


@jax.custom_jvp
@one_by_one
def symmetric_eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, ascending, and eigenvectors as columns, of a symmetric matrix.

    Differentiable; eigenvectors whose eigenvalues are the same to working precision do not turn into each other,
    which is right for functions of the matrix that are constant there, and never infinite.

    Example:
        >>> values, vectors = linalg.symmetric_eigen(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> values.round(5).tolist(), vectors.shape
        ([1.0, 3.0], (2, 2))
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

    Always LAPACK, where `svd` may take Grams: for small singular values that count, as powers of the spectrum do.

    On a CPU by divide and conquer, and by QR iteration where that fails on a finite matrix: LAPACK's divide and conquer
    does not always converge on many equal singular values; what it gives then is NaN.

    Example:
        >>> u, s, vt = linalg.thin_svd(jnp.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
        >>> s.round(5).tolist(), u.shape, vt.shape
        ([2.0, 1.0], (3, 2), (2, 2))
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
    """Orthonormal columns that span the same (`k <= m`), by QR: the first j span what the first j of `columns` do.

    Example:
        >>> q = linalg.orthonormal(jnp.array([[3.0, 1.0], [4.0, 2.0], [0.0, 1.0]]))
        >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
        True
    """
    return jnp.linalg.qr(columns)[0]


@orthonormal.defjvp
def _orthonormal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (q, _), (dq, _) = jax.jvp(jnp.linalg.qr, primals, tangents)
    return q, dq


@one_by_one
def complete_qr(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m m"], Float[Array, "m n"]]:
    """`Q R` with a square `Q`: beyond column `n` a basis of what is orthogonal to the matrix. It has no derivative.

    Example:
        >>> q, r = linalg.complete_qr(jnp.array([[3.0], [4.0], [0.0]]))
        >>> q.shape, bool(jnp.allclose(q @ r, jnp.array([[3.0], [4.0], [0.0]]), atol=1e-6))
        ((3, 3), True)
    """
    q, r = jnp.linalg.qr(matrix, mode="complete")
    return q, r


def largest_eigenvalue(matrix: Float[Array, "n n"], steps: int = 16) -> Float[Array, ""]:
    """The largest eigenvalue of a symmetric positive semi-definite matrix, from below, by power iteration.

    Example:
        >>> round(float(linalg.largest_eigenvalue(jnp.diag(jnp.array([1.0, 2.0, 10.0])))), 3)
        10.0
    """
    tiny = jnp.finfo(matrix.dtype).tiny

    def step(_: int | Array, vector: Array) -> Array:
        image = matmul(matrix, vector)
        return image / jnp.maximum(jnp.max(jnp.abs(image)), tiny)  # the largest entry: squares would underflow

    start = jax.random.normal(jax.random.key(0), (matrix.shape[0],), matrix.dtype) + filled(0, matrix)
    vector = lax.fori_loop(0, steps, step, start)
    image = matmul(matrix, vector)
    scale = jnp.maximum(jnp.max(jnp.abs(image)), tiny)
    return scale * jnp.linalg.norm(image / scale) / jnp.maximum(jnp.linalg.norm(vector), tiny)
