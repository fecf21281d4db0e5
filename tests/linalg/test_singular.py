"""Singular triplets and polar factors: each way of finding them against NumPy, and against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge import linalg
from cfmerge.linalg import low_rank, polar_factors

SHAPES = [(6, 24), (24, 6), (9, 12), (8, 8), (1, 5), (5, 1)]


def matrix_of(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], len(values))))[0]
    return (u * values) @ v.T


def polar(matrix, cutoff=1e-10):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * (s > cutoff * s[0])) @ vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 1e-9])
def test_leading_triplets(shape, smallest):
    r = min(shape)
    values = np.geomspace(1, smallest, r)
    matrix = matrix_of(shape, values)
    with jax.enable_x64(True):
        for k in {1, -(-r // 2), r}:
            u, s, vt = (np.asarray(part) for part in linalg.leading(jnp.asarray(1e5 * matrix), k))
            np.testing.assert_allclose(s, 1e5 * values[:k], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-12)
            np.testing.assert_allclose(vt @ vt.T, np.eye(k), atol=1e-7)
            cut = np.linalg.svd(matrix, full_matrices=False)
            np.testing.assert_allclose((u * s) @ vt, 1e5 * (cut[0][:, :k] * values[:k]) @ cut[2][:k], atol=1e-6)


def test_triplets_amid_a_dense_bulk_are_what_an_svd_gives():
    """A few large directions, and of a bulk of close singular values among the leading, as fine-tuning has."""
    values = np.concatenate([np.geomspace(1, 0.05, 24), np.linspace(0.03, 0.01, 232)])
    matrix = matrix_of((256, 1024), values).astype(np.float32)
    k, true = 128, np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0]

    def outside(u):
        return np.linalg.norm(true[:, k:].T @ np.asarray(u, np.float64))

    u, _, vt = linalg.leading(jnp.asarray(matrix), k)
    assert outside(u) < 2 * outside(low_rank.svd_wide(jnp.asarray(matrix), k)[0])
    for vectors in (u.T, vt):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=2e-6)


@pytest.mark.parametrize(("least", "apart"), [(0.1, True), (0.008, True), (0.005, False)])
def test_few_vectors_are_turned_where_the_others_are_apart(least, apart):
    """The wanted values decay to `least`, the others, slower, to an eighth of it."""
    k, values = 24, np.concatenate([np.geomspace(1, least, 24), np.geomspace(least, least / 8, 73)[1:]])
    matrix = matrix_of((96, 200), values).astype(np.float32)
    true = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0]

    def outside(u):
        return np.linalg.norm(true[:, k:].T @ np.asarray(u, np.float64))

    found = linalg.leading(jnp.asarray(matrix), k)[0]
    assert bool(low_rank.are_apart(jnp.asarray(values**2, jnp.float32), k, k + low_rank.MARGIN)) is apart
    assert outside(found) < 2 * outside(low_rank.svd_wide(jnp.asarray(matrix), k)[0])
    np.testing.assert_allclose(found.T @ found, np.eye(k), atol=2e-6)


def test_the_gram_is_trusted_only_where_it_resolves():
    """In float32 one Gram of values 1 .. 1e-4 has noise in place of the last, two have not; of 1 .. 1e-6 both have."""
    for smallest, k in ((0.1, 3), (1e-4, 3), (1e-4, 1), (1e-6, 3)):
        matrix = matrix_of((6, 40), [1.0, 0.5, smallest, smallest / 2, smallest / 3, smallest / 4])
        u, s, vt = (np.asarray(part, np.float64) for part in linalg.leading(jnp.asarray(matrix, jnp.float32), k))
        expected = np.linalg.svd(matrix.astype(np.float32).astype(np.float64), full_matrices=False)
        np.testing.assert_allclose(s, expected[1][:k], rtol=0, atol=2e-6)
        np.testing.assert_allclose((u * s) @ vt, (expected[0][:, :k] * expected[1][:k]) @ expected[2][:k], atol=5e-6)
        np.testing.assert_allclose(vt @ vt.T, np.eye(k), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor(shape):
    matrix = matrix_of(shape, np.geomspace(1, 0.01, min(shape)))
    for precision, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        with jax.enable_x64(precision == "float64"):
            found = linalg.polar(jnp.asarray(matrix, precision))
            np.testing.assert_allclose(found.factor, polar(matrix), atol=tolerance)
            assert float(found.rank) == min(shape)
            np.testing.assert_allclose(
                jnp.sum(found.factor * matrix), np.sum(np.geomspace(1, 0.01, min(shape))), rtol=1e-4
            )


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (9, 12), (8, 8)])
def test_polar_factor_of_deficient_rank_is_the_partial_isometry(shape):
    matrix = matrix_of(shape, [1.0, 0.3, 0.05])
    for precision, tolerance in (("float64", 1e-11), ("float32", 2e-5)):
        with jax.enable_x64(precision == "float64"):
            found = linalg.polar(jnp.asarray(matrix, precision))
            np.testing.assert_allclose(found.factor, polar(matrix), atol=tolerance)
            assert float(found.rank) == 3
            assert float(found.by_svd) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_nearly_orthogonal_takes_no_svd(shape):
    """On any platform, whatever its scale."""
    matrix = 1e5 * matrix_of(shape, np.linspace(1.05, 0.95, min(shape)))
    for precision, tolerance in (("float64", 1e-13), ("float32", 2e-6)):
        with jax.enable_x64(precision == "float64"):
            found = linalg.polar(jnp.asarray(matrix, precision))
            np.testing.assert_allclose(found.factor, polar(matrix), atol=tolerance)
            assert (float(found.rank), float(found.by_svd)) == (min(shape), 0)


@pytest.mark.parametrize(("condition", "by_svd"), [(5, 0), (100, 0), (1000, 0), (1e4, 1)])
@pytest.mark.parametrize("shape", [(64, 160), (160, 64)])
def test_a_wide_matrix_takes_no_svd_while_its_gram_resolves_it(shape, condition, by_svd):
    """A polar factor turns by `eps s_1 / s_r` when it is rounded, however it is found."""
    matrix = matrix_of(shape, np.geomspace(1, 1 / condition, 64)).astype(np.float32)
    found = linalg.polar(jnp.asarray(matrix))
    assert (float(found.rank), float(found.by_svd)) == (64, by_svd)
    expected = polar(matrix.astype(np.float64))
    assert np.linalg.norm(found.factor - expected) < np.finfo(np.float32).eps * max(condition, 150)


def test_zero_has_the_polar_factor_zero():
    for shape in ((6, 24), (8, 8)):
        found = linalg.polar(jnp.zeros(shape))
        assert np.all(np.asarray(found.factor) == 0)
        assert float(found.rank) == 0


@pytest.mark.parametrize("condition", [1.0, 8.0, 156.0])
@pytest.mark.parametrize("shape", [(8, 8), (8, 20)])
def test_products_agree_with_the_svd(shape, condition):
    matrix = matrix_of(shape, np.geomspace(1, 1 / condition, 8))
    for precision, tolerance in (("float64", 1e-11), ("float32", 2e-5)):
        with jax.enable_x64(precision == "float64"):
            x = jnp.asarray(matrix, precision)
            cutoff = linalg.rank_cutoff(shape, x.dtype)
            factor, converged, steps = polar_factors.newton_schulz(x, cutoff)
            assert bool(converged)
            assert int(steps) <= 9
            np.testing.assert_allclose(factor, polar(matrix), atol=tolerance)
            np.testing.assert_allclose(factor, polar_factors.polar_by_svd(x, cutoff).factor, atol=2 * tolerance)
            assert float(polar_factors.polar_by_products(x, cutoff).by_svd) == 0


@pytest.mark.parametrize("values", [[1.0, 0.3, 0.05], [1.0], [1.0, 0.5, 0.2, 1e-6]])
def test_products_do_not_converge_without_full_rank_and_say_so(values):
    x = jnp.asarray(matrix_of((6, 10), values), jnp.float32)
    cutoff = float(np.sqrt(np.finfo(np.float32).eps))
    assert not bool(polar_factors.newton_schulz(x, cutoff)[1])
    found = polar_factors.polar_by_products(x, cutoff)
    assert float(found.by_svd) == 1
    assert float(found.rank) == min(len(values), 3)
    np.testing.assert_allclose(found.factor, polar(np.asarray(x, np.float64), cutoff), atol=1e-5)


def test_quintics_take_the_interval_to_one():
    x = np.geomspace(1e-3, 1, 1000)
    slope = 1.0
    for a, b, c in polar_factors.QUINTICS[:-1]:
        x, slope = a * x + b * x**3 + c * x**5, slope * a
    assert np.max(np.abs(x - 1)) < 2e-3
    np.testing.assert_allclose(slope, polar_factors.SLOPE, rtol=0.01)


@pytest.mark.parametrize("shape", [(5, 12), (6, 7), (7, 5)])
def test_derivatives(shape):
    rng = np.random.default_rng(0)
    matrix, direction, probe = (rng.standard_normal(shape) for _ in range(3))
    functions = {
        "polar": lambda a: linalg.polar(a).factor,
        "cut": lambda a: linalg.truncated(a, 2),
        "values": lambda a: linalg.svd(a)[1] * jnp.arange(1.0, 1 + min(shape)),
        "flat": lambda a: (lambda u, s, vt: (u * jnp.sqrt(s)) @ vt)(*linalg.svd(a)),
    }
    with jax.enable_x64(True):
        for name, function in functions.items():

            @jax.jit
            def loss(a, function=function):
                value = function(a)
                return jnp.sum(value * (probe if value.shape == shape else 1.0))

            @jax.jit
            def slope(a, loss=loss):
                return jnp.sum(jax.grad(loss)(a) * direction)

            step = 1e-6
            ahead, behind = matrix + step * direction, matrix - step * direction
            finite = float(loss(ahead) - loss(behind)) / (2 * step)
            np.testing.assert_allclose(float(slope(jnp.asarray(matrix))), finite, rtol=1e-6, err_msg=name)
            curvature = jax.jvp(slope, (jnp.asarray(matrix),), (jnp.asarray(direction),))[1]
            finite = float(slope(ahead) - slope(behind)) / (2 * step)
            np.testing.assert_allclose(float(curvature), finite, rtol=1e-6, err_msg=f"{name}, second")


def test_derivatives_at_ties_and_zeros_are_finite():
    for function in (lambda a: linalg.polar(a).factor, lambda a: linalg.truncated(a, 2)):
        gradient = jax.jit(jax.grad(lambda a, function=function: jnp.sum(function(a) ** 2)))
        for matrix in (np.eye(4), np.zeros((4, 4)), np.ones((4, 4)), np.diag([1.0, 1.0, 0, 0])):
            assert np.isfinite(np.asarray(gradient(jnp.asarray(matrix, jnp.float32)))).all()
