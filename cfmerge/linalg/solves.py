"""Solutions of symmetric systems: by Cholesky, by the pseudo-inverse, by conjugate gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cfmerge.linalg.batching import one_by_one
from cfmerge.linalg.filled import filled
from cfmerge.linalg.products import matmul
from cfmerge.linalg.sharing import by_rows
from cfmerge.linalg.spectra import symmetric_eigen


def solve_right(rhs: Float[Array, "m n"], matrix: Float[Array, "n n"]) -> tuple[Float[Array, "m n"], Bool[Array, ""]]:
    """`rhs matrix^{-1}` for a symmetric positive definite matrix, by Cholesky.

    Returns the solution and whether the Cholesky factorisation held. Where it did not (the matrix is not
    positive definite to working precision) the solution comes from the eigenvalues, raised to at least
    `n * machine epsilon * largest`; the caller reports that. The derivative is that of the equation.

    Example:
        >>> solution, held = linalg.solve_right(jnp.array([[2.0, 8.0]]), jnp.diag(jnp.array([1.0, 4.0])))
        >>> solution.tolist(), bool(held)
        ([[2.0, 2.0]], True)
    """
    return lax.custom_linear_solve(
        lambda x: matmul(x, matrix), rhs, lambda _, b: by_rows(_solve_right, b, matrix), symmetric=True, has_aux=True
    )


@one_by_one
def _solve_right(rhs: Array, matrix: Array) -> tuple[Array, Array]:
    factor = lax.linalg.cholesky(matrix.T, symmetrize_input=False)  # LAPACK's arrays lie by columns: no copy
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


def pseudo_inverse(
    matrix: Float[Array, "n n"], cutoff: float | Array | None = None
) -> tuple[Float[Array, "n n"], Int[Array, ""], Float[Array, ""]]:
    """The pseudo-inverse of a symmetric positive semi-definite matrix; differentiable while its rank stays.

    Eigenvalues up to `cutoff` times the largest count as zero (none: `n * machine epsilon`). Returns also how many
    do not, and the least of these over the largest.

    Example:
        >>> inverse, rank, least = linalg.pseudo_inverse(jnp.diag(jnp.array([4.0, 2.0, 0.0])))
        >>> jnp.diagonal(inverse).tolist(), int(rank), float(least)
        ([0.25, 0.5, 0.0], 2, 0.5)
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

    Example:
        >>> matrix, target = jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.array([3.0, 4.0])
        >>> x, left = linalg.conjugate_gradients(lambda x: matrix @ x, target, jnp.zeros(2), steps=2)
        >>> x.round(5).tolist(), bool(left < 1e-5)
        ([1.0, 1.0], True)
    """
    tiny, eps = jnp.finfo(target.dtype).tiny, jnp.finfo(target.dtype).eps
    largest = jnp.max(jnp.abs(target))  # the residuals are scaled by it: their squares would leave the range
    unit = jnp.where(largest > 0, largest, 1)
    goal = target / unit
    enough = 16 * max(target.shape, default=1) * eps**2 * jnp.sum(goal * goal)  # sums of n terms err by sqrt(n) eps

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
    state = (start, residual, residual, jnp.sum(residual * residual), filled(0, goal))
    x, _, _, square, _ = lax.fori_loop(0, steps, step, state)
    left, whole = lax.stop_gradient((square, jnp.sum(goal * goal)))
    return x * unit, jnp.sqrt(left / jnp.where(whole > 0, whole, 1))
