"""The linear algebra against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge import linalg


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


def test_low_rank_factors():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30))
    left, right, error = linalg.low_rank_factors(jnp.asarray(matrix, jnp.float32), 3)
    np.testing.assert_allclose(left @ right, matrix, atol=1e-4)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-5)
    assert float(error) < 1e-5
    assert float(linalg.low_rank_factors(jnp.asarray(matrix, jnp.float32), 2)[2]) > 1e-2


def test_top_singular_inside_a_row_space():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 30))
    matrix = rng.standard_normal((20, 4)) @ rows
    with jax.enable_x64(True):
        u, s, vt = map(np.asarray, linalg.top_singular(jnp.asarray(matrix), 3, jnp.asarray(rows)))
    exact = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(s, exact[1][:3], rtol=1e-10)
    np.testing.assert_allclose(u @ vt, exact[0][:, :3] @ exact[2][:3], atol=1e-9)


def test_largest_eigenvalue():
    values = np.array([1.0, 2.0, 10.0])
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    assert float(linalg.largest_eigenvalue(jnp.asarray(q * values @ q.T))) == pytest.approx(10, rel=1e-3)
