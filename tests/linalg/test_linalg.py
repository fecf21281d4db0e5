"""The linear algebra against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from lowered import lapack_calls

from cfmerge import covariance, linalg
from cfmerge.methods.orthomerge import rotation


def test_shapes_that_annotations_state_are_checked():
    """By tests/conftest.py, not where users call them."""
    for wrong in (
        lambda: linalg.gram(jnp.zeros(3)),
        lambda: covariance.of_delta(jnp.zeros(3)),
        lambda: rotation(jnp.zeros((2, 3)), jnp.zeros((3, 2))),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_gram_by_blocks_is_the_gram():
    rows = np.random.default_rng(0).standard_normal((7, 611)).astype(np.float32)
    got = np.asarray(linalg.gram(jnp.asarray(rows)))
    np.testing.assert_allclose(got, rows.T @ rows, atol=1e-4)
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("shapes", [(3, 2, 20), (30, 25, 6)])
def test_times_gram_by_either_side(shapes):
    m, r, n = shapes
    rng = np.random.default_rng(0)
    left, rows = rng.standard_normal((m, n)), rng.standard_normal((r, n))
    got = linalg.times_gram(jnp.asarray(left), jnp.asarray(rows), linalg.gram(jnp.asarray(rows)))
    np.testing.assert_allclose(got, left @ rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_solve_right_and_its_fall_back():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 8))
    matrix, rhs = a @ a.T + np.eye(8), rng.standard_normal((3, 8))
    with jax.enable_x64(True):
        solution, held = linalg.solve_right(jnp.asarray(rhs), jnp.asarray(matrix))
        np.testing.assert_allclose(solution, rhs @ np.linalg.inv(matrix), atol=1e-10)
        assert held
        flat = np.diag([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1e-3])
        solution, held = linalg.solve_right(jnp.asarray(rhs), jnp.asarray(flat))
    assert not held
    assert np.isfinite(solution).all()
    np.testing.assert_allclose(solution[:, :7], rhs[:, :7], atol=1e-10)


def test_solve_right_under_vmap_and_its_derivatives():
    """Of a batch only those fall back that must, and each has the solution that it has alone, to the last digit."""
    rng = np.random.default_rng(0)
    a, rhs = rng.standard_normal((3, 6, 6)), jnp.asarray(rng.standard_normal((2, 6)))
    matrices = jnp.asarray(a @ a.mT + np.eye(6)).at[1].set(jnp.diag(jnp.asarray([1.0, 1, 1, 1, 1, -1])))
    solutions, held = jax.jit(jax.vmap(linalg.solve_right, in_axes=(None, 0)))(rhs, matrices)
    np.testing.assert_array_equal(held, [True, False, True])
    for solution, matrix in zip(solutions, matrices, strict=True):
        np.testing.assert_array_equal(solution, jax.jit(linalg.solve_right)(rhs, matrix)[0])

    def loss(rhs, rows, solve):
        return jnp.sum(solve(rhs, rows @ rows.T + jnp.eye(6)) ** 2)

    rows = jnp.asarray(a[0], jnp.float32)
    for derivative in (jax.grad, jax.hessian):
        for argument in (0, 1):
            got = derivative(loss, argument)(rhs, rows, lambda b, m: linalg.solve_right(b, m)[0])
            expected = derivative(loss, argument)(rhs, rows, lambda b, m: b @ jnp.linalg.inv(m))
            np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: linalg.solve_right(x, x.T @ x)[0],
        lambda x: linalg.symmetric_eigen(x.T @ x),
        lambda x: linalg.pseudo_inverse(x.T @ x),
        linalg.thin_svd,
        lambda x: linalg.leading(x, 2, x[:3]),
        lambda x: linalg.low_rank_factors(x, 2),
        linalg.complete_qr,
        lambda x: linalg.leading(x, 2),
        linalg.svd,
        linalg.polar,
    ],
    ids=["solve", "eigen", "pseudo_inverse", "svd", "top", "low_rank", "qr", "leading", "svd_or_grams", "polar"],
)
def test_no_batches_of_decompositions(function):
    """Two at once can wait for each other (see `one_by_one`)."""
    calls, batched = lapack_calls(function, jnp.zeros((7, 6, 5)))
    assert calls
    assert not batched


def test_svd_goes_on_where_lapack_gives_up(monkeypatch):
    """Divide and conquer that has failed returns NaN; the slower QR iteration takes its place."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32)
    true = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    nothing = tuple(jnp.full(shape, jnp.nan) for shape in ((7, 5), (5,), (5, 5)))
    monkeypatch.setattr(jnp.linalg, "svd", lambda matrix, full_matrices: nothing)
    u, s, vt = linalg.thin_svd(matrix)
    np.testing.assert_allclose(s, true, rtol=1e-5)
    np.testing.assert_allclose((u * s) @ vt, matrix, atol=1e-5)
    assert np.isnan(linalg.thin_svd(matrix.at[0, 0].set(jnp.nan))[1]).all()


def test_low_rank_factors():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30))
    left, right, error = linalg.low_rank_factors(jnp.asarray(matrix, jnp.float32), 3)
    np.testing.assert_allclose(left @ right, matrix, atol=1e-4)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-5)
    assert float(error) < 1e-5
    assert float(linalg.low_rank_factors(jnp.asarray(matrix, jnp.float32), 2)[2]) > 1e-2


def test_leading_triplets_inside_a_row_space():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 30))
    matrix = rng.standard_normal((20, 4)) @ rows
    with jax.enable_x64(True):
        u, s, vt = map(np.asarray, linalg.leading(jnp.asarray(matrix), 3, jnp.asarray(rows)))
    exact = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(s, exact[1][:3], rtol=1e-10)
    np.testing.assert_allclose(u @ vt, exact[0][:, :3] @ exact[2][:3], atol=1e-9)


def test_largest_eigenvalue():
    values = np.array([1.0, 2.0, 10.0])
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    assert float(linalg.largest_eigenvalue(jnp.asarray(q * values @ q.T))) == pytest.approx(10, rel=1e-3)
