"""Methods in a joint basis: the cores of adapters give the merge that the dense deltas give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cfmerge import linalg, methods
from cfmerge.core.joint import cores_of

M, N, EXPERTS, RANK = 15, 21, 3, 4
COMMUTING = [
    "average", "task_arithmetic(normalise=True)", "metagpt", "model_stock",
    "scale(2.0) >> average >> lines(alpha=0.5)",
    "ace", "ace(tau=1e-9)", "ace(eps=1.0, tau=1e-9, k_frac=0.1)",
    "actmat", "actmat(covariance='softmax_bias')", "anchored", "anchored(ridge=None, anchor='sum')",
    "anchored(ridge=0.2, towards=tsv_m)", "power", "wudi", "swudi", "swudi(filter='landweber', keep=0.1)",
    "aswudi", "aswudi(rule='gavish_donoho')", "optmerge", "cauchy_poe", "two_sided",
    "tsv_m", "tsv_m(variant='lossless')", "iso_c", "iso_cts", "dc_merge", "dc_merge(density=0.3, smoothing='linear')",
    "cart", "low_rank(fraction=0.2) >> average", "star >> average", "average >> subspace_boosting",
    "average >> half_flatten", "wudi >> svc",
]  # fmt: skip


def adapters(seed, ranks=(RANK,) * EXPERTS):
    rng = np.random.default_rng(seed)
    lefts = [rng.standard_normal((M, rank)) * (t + 1) for t, rank in enumerate(ranks)]
    return lefts, [rng.standard_normal((rank, N)) for rank in ranks]


def problems():
    """`{name: (lefts, rights)}`, all of one shape."""
    lefts, rights = (np.stack(side) for side in adapters(0))
    other, rows = lefts.copy(), rights.copy()
    other[0, :, 2:] = 0  # ranks 2, 4, 4
    rows[1, 3] = rows[1, 2]  # 2, 3, 4
    deficient = lefts.copy()
    deficient[:, :, 1] = 2 * deficient[:, :, 0]
    zero = lefts.copy()
    zero[2] = 0
    return {
        "random": (lefts, rights), "other ranks": (other, rows), "deficient": (deficient, rights),
        "identical": (np.stack([lefts[0]] * EXPERTS), np.stack([rights[0]] * EXPERTS)), "zero": (zero, rights),
    }  # fmt: skip


def dense(method, lefts, rights, weights):
    statistic = method.init(jnp.zeros((M, N)))
    for left, right, weight in zip(lefts, rights, weights, strict=True):
        statistic = method.see(statistic, linalg.matmul(left, right), weight)
    return method.solve(statistic)


def both(method, lefts, rights, weights):
    left, right, report = methods.merge_factors(method, list(lefts), list(rights), weights)
    whole, told = dense(method, lefts, rights, weights)
    return left @ right, report, whole, told


DIFFER = {"ridge_ratio", "factor_error"}  # of other systems


@pytest.mark.parametrize("text", COMMUTING)
def test_cores_give_what_dense_deltas_give(text):
    with jax.enable_x64(True):
        method = methods.make(text)
        weights = [1.0] * EXPERTS if method.needs.weights == "none" else [1.0, 0.5, 2.0]
        given = [jnp.stack([jnp.asarray(own[side]) for own in problems().values()]) for side in (0, 1)]
        found = jax.jit(lambda *sides: lax.map(lambda own: both(method, *own, weights), sides))(*given)
    for name, (core, report, whole, told) in zip(problems(), zip(*map(_each, found), strict=True), strict=True):
        np.testing.assert_allclose(core, whole, rtol=0, atol=1e-10 * np.abs(whole).max(), err_msg=name)
        for key in set(told) - DIFFER:
            np.testing.assert_allclose(report[key], told[key], rtol=1e-8, atol=1e-9, err_msg=f"{name}: {key}")


def _each(tree):
    return [jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n]), tree) for n in range(len(problems()))]


@pytest.mark.parametrize("text", ["ace", "wudi", "tsv_m", "iso_cts"])
def test_one_adapter_alone(text):
    with jax.enable_x64(True):
        lefts, rights = adapters(1, (3,))
        core, _, whole, _ = jax.jit(lambda *own: both(methods.make(text), *own, [1.0]))(lefts, rights)
    np.testing.assert_allclose(core, whole, rtol=0, atol=1e-10 * np.abs(whole).max())


def test_one_adapter_is_itself_where_its_method_returns_one_expert():
    with jax.enable_x64(True):
        lefts, rights = adapters(1, (3,))
        for text in ("actmat", "average", "power"):
            left, right, _ = jax.jit(lambda *own, text=text: methods.merge_factors(methods.make(text), *own))(
                lefts, rights
            )
            np.testing.assert_allclose(left @ right, lefts[0] @ rights[0], rtol=0, atol=1e-10)


def test_the_basis_is_orthonormal_lossless_and_no_larger_than_it_must_be():
    with jax.enable_x64(True):
        for ranks, directions in (((2, 3, 4), 9), ((4, 4, 10), 18)):
            lefts, rights = adapters(2, ranks)
            found = cores_of([jnp.asarray(left) for left in lefts], [jnp.asarray(right) for right in rights])
            for core, left, right in zip(found.cores, lefts, rights, strict=True):
                np.testing.assert_allclose(found.u @ core @ found.v.T, left @ right, rtol=0, atol=1e-11)
            assert found.v.shape[1] == min(N, sum(ranks)) == directions
            np.testing.assert_allclose(found.v.T @ found.v, np.eye(directions), rtol=0, atol=1e-13)
            np.testing.assert_allclose(found.joint.inputs, found.v.T @ np.ones(N), rtol=0, atol=1e-13)
            np.testing.assert_allclose(found.u @ found.joint.outputs, M**-0.5 * np.ones(M), rtol=0, atol=1e-13)


def test_two_identical_adapters_have_the_directions_of_one():
    with jax.enable_x64(True):
        (left,), (right,) = adapters(3, (4,))
        found = cores_of([jnp.asarray(left), 1e-9 * left], [jnp.asarray(right), 1e9 * right])
        assert np.linalg.matrix_rank(np.asarray(found.v)) == np.sum(np.any(np.asarray(found.v) != 0, axis=0)) == 4
        assert np.sum(np.any(np.asarray(found.u) != 0, axis=0)) == 5  # and the ones


@pytest.mark.parametrize(
    "text",
    ["ties", "tact", "wudi_adam", "linear(normalise=False)", "opcm", "regmean", "trim >> average", "average >> larv",
     "model_stock(filter_wise=True)"],
)  # fmt: skip
def test_a_method_that_does_not_commute_says_so(text):
    assert not methods.make(text).joint
