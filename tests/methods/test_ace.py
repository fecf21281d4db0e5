"""ACE: the consequences that specs and paper state, both forms, weights, derivatives, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ace as ace_reference

import cfmerge
from cfmerge import methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import ace


def problem(seed=0, m=12, n=9, experts=3, scale=0.1, spread=1.0, rank=None):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((m, n))
    deltas = []
    for t in range(experts):
        delta = rng.standard_normal((m, n))
        if rank:
            delta = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
        deltas.append(scale * spread**t * delta)
    return base, deltas


def solve(deltas, method, weights=None):
    """The merged delta in float64."""
    with jax.enable_x64(True):
        statistic = method.init(jnp.zeros_like(jnp.asarray(deltas[0])))
        for delta, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True):
            statistic = method.update(statistic, jnp.asarray(delta), weight)
        return np.asarray(method.solve(statistic)[0])


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-300))


HETEROGENEOUS = {"spread": 6.0, "scale": 0.05}
SHAPES = [(12, 9), (9, 12), (5, 40), (1, 7), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("ridge", [{"eps": 1e-3}, {"eps_rel": 0.07}])
def test_equals_the_explicit_formula(shape, spread, ridge):
    """Against plain NumPy with explicit covariances, a general inverse and a full SVD."""
    _, deltas = problem(m=shape[0], n=shape[1], spread=spread, scale=0.05)
    close(solve(deltas, ace(**ridge)), ace_reference(deltas, **ridge), 1e-7)


def test_csp_halves_the_all_ones_direction():
    _, deltas = problem(m=30)
    n = deltas[0].shape[1]
    with_csp = solve(deltas, ace(eps=1e-12))
    rows = [d - d.mean(0) for d in deltas]
    gram = sum(r.T @ r for r in rows)
    x_0 = sum(r @ r.T @ r for r in rows) @ np.linalg.inv(gram)
    close(with_csp, x_0 @ (np.eye(n) - np.ones((n, n)) / (2 * n)), 1e-6)


def test_one_expert_is_not_returned():
    """T = 1 gives J D (I - P/2): ACE is not idempotent, and says so."""
    _, (delta,) = problem(experts=1, m=20)
    n = delta.shape[1]
    close(solve([delta], ace(eps=1e-12)), (delta - delta.mean(0)) @ (np.eye(n) - np.ones((n, n)) / (2 * n)), 1e-6)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_large_ridge_gives_the_mean(spread):
    _, deltas = problem(spread=spread, scale=0.05)
    rows = [d - d.mean(0) for d in deltas]
    a = np.array([1 / np.sum(r**2) for r in rows]) if spread > 1 else np.ones(3)
    merged = solve(deltas, ace(eps=1e9, k_frac=0.0))
    close(merged, sum(w * r for w, r in zip(a, rows, strict=True)) / a.sum(), 1e-5)


@pytest.mark.parametrize("options", [{}, HETEROGENEOUS])
def test_order_rows_and_columns_commute(options):
    _, deltas = problem(experts=4, **options)
    merged = solve(deltas, ace())
    close(solve(deltas[::-1], ace()), merged)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(12), rng.permutation(9)
    close(solve([d[rows][:, columns] for d in deltas], ace()), merged[rows][:, columns], 1e-7)


def test_rows_sum_to_zero_without_refinement():
    _, deltas = problem()
    assert np.max(np.abs(solve(deltas, ace(tau=1e9)).sum(axis=0))) < 1e-12


def test_relative_ridge_is_scale_free():
    _, deltas = problem()
    merged = solve(deltas, ace(gate="log_variance"))
    for scale in (1e-6, 1e3, 1e6):
        close(solve([scale * d for d in deltas], ace(gate="log_variance")), scale * merged, 1e-8)
    fixed = solve([1e-3 * d for d in deltas], ace(eps=1e-2))
    assert np.linalg.norm(fixed - 1e-3 * solve(deltas, ace(eps=1e-2))) > 1e-2 * np.linalg.norm(fixed)


def test_the_gate_of_the_paper_is_not_scale_free():
    rng = np.random.default_rng(0)
    unit = [d / np.linalg.norm(d) for d in rng.standard_normal((4, 10, 8))]
    deltas = [np.sqrt(energy) * d for energy, d in zip((1, 2, 4, 8), unit, strict=True)]

    def gate(scale, kind="paper"):
        method = ace(gate=kind)
        with jax.enable_x64(True):
            statistic = method.init(jnp.zeros((10, 8)))
            for delta in deltas:
                statistic = method.update(statistic, jnp.asarray(np.sqrt(scale) * delta))
            return float(method.solve(statistic)[1]["gate"])

    np.testing.assert_allclose([gate(s) for s in (1e-3, 1, 1e3)], [0.023, 0.74, 0.013], atol=1e-2)
    np.testing.assert_allclose(gate(1e-3, "log_variance"), gate(1e3, "log_variance"), rtol=1e-9)


@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_low_rank_form_agrees_with_the_full_one(spread, rank):
    _, deltas = problem(m=14, n=60, experts=3, spread=spread, scale=0.05, rank=rank)
    options = {"rank": rank} if rank else {}
    narrow = solve(deltas, ace(form="low-rank", **options))
    full = solve(deltas, ace(form="full"))
    close(narrow, full, 1e-7)


def test_auto_takes_rows_until_they_outgrow_the_inputs():
    _, deltas = problem(m=6, n=16, experts=4)
    method, statistic = ace(), ace().init(jnp.zeros((6, 16)))
    kinds = []
    for delta in deltas:
        statistic = method.update(statistic, jnp.asarray(delta, jnp.float32))
        kinds.append(type(statistic.sums).__name__)
    assert kinds == ["tuple", "tuple", "GramSums", "GramSums"]
    close(solve(deltas, ace()), solve(deltas, ace(form="full")), 1e-9)


def test_forgetting_needs_grams():
    _, deltas = problem(m=5, n=40)
    with pytest.raises(CfmergeError, match=r"form=.full."):
        solve(deltas, ace(), [1.0, 1.0, -1.0])


def test_wrong_rank_is_reported():
    _, deltas = problem(m=14, n=60, rank=4)
    method = ace(form="low-rank", rank=2)
    statistic = method.init(jnp.zeros((14, 60)))
    for delta in deltas:
        statistic = method.update(statistic, jnp.asarray(delta, jnp.float32))
    value = float(method.solve(statistic)[1]["factor_error"])
    assert method.notes["factor_error"][0](value)


def test_low_rank_form_refuses_as_many_rows_as_inputs():
    _, deltas = problem(m=12, n=9)
    with pytest.raises(CfmergeError, match=r"36 rows for 9 inputs.*form='auto'"):
        solve(deltas, ace(form="low-rank"))


@pytest.mark.parametrize("form", ["full", "auto"])
def test_weight_two_is_the_expert_twice(form):
    """In the sums; the gate is unweighted, so both cases are kept homogeneous."""
    _, (a, b) = problem(experts=2, m=5, n=40)
    method = ace(form=form, tau=1e9)
    close(solve([a, b], method, [2.0, 1.0]), solve([a, a, b], method), 1e-8)


def test_zero_and_constant_deltas():
    _, deltas = problem()
    merged = solve(deltas, ace())
    close(solve([*deltas, np.zeros((12, 9))], ace()), merged)
    close(solve([*deltas, np.ones((12, 1)) * np.arange(9.0)], ace()), merged)
    assert np.all(solve([np.zeros((12, 9))] * 3, ace()) == 0)
    base, _ = problem()
    same = cfmerge.merge_tensor(base.astype(np.float32), [base.astype(np.float32)] * 3, ace())
    assert np.all(np.asarray(same) == base.astype(np.float32))


def test_forgetting_is_updating_with_the_opposite_weight():
    _, deltas = problem(experts=4)
    method = ace(form="full")
    with jax.enable_x64(True):
        statistic = method.init(jnp.zeros((12, 9)))
        for delta in deltas:
            statistic = method.update(statistic, jnp.asarray(delta))
        forgotten = method.update(statistic, jnp.asarray(deltas[3]), -1.0)
        kept = method.init(jnp.zeros((12, 9)))
        for delta in deltas[:3]:
            kept = method.update(kept, jnp.asarray(delta))
        for a, b in zip(jax.tree.leaves(forgotten), jax.tree.leaves(kept), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_statistics_of_two_halves_add_up():
    _, deltas = problem(experts=4)
    method = ace(form="full")

    def seen(part):
        statistic = method.init(jnp.zeros((12, 9)))
        for delta in part:
            statistic = method.update(statistic, jnp.asarray(delta, jnp.float32))
        return statistic

    halves = jax.tree.map(jnp.add, seen(deltas[:2]), seen(deltas[2:]))
    np.testing.assert_allclose(method.solve(halves)[0], method.solve(seen(deltas))[0], atol=1e-6)


def test_jit_vmap_and_grad():
    _, deltas = problem(experts=3)
    experts = jnp.asarray(np.stack(deltas), jnp.float32)
    base = jnp.zeros((12, 9))
    method = ace(eps=1e-2)

    def merged(base, experts):
        return cfmerge.merge_tensor(base, list(experts), method)

    plain = merged(base, experts)
    np.testing.assert_allclose(jax.jit(merged)(base, experts), plain, atol=1e-5)
    batch = jax.vmap(merged)(jnp.stack([base, base]), jnp.stack([experts, 2 * experts]))
    np.testing.assert_allclose(batch[0], plain, atol=1e-5)
    with jax.enable_x64(True):
        experts = jnp.asarray(np.stack(deltas))
        base = jnp.zeros((12, 9))
        direction = jnp.asarray(np.random.default_rng(3).standard_normal(experts.shape))

        def loss(experts):
            return jnp.sum(merged(base, experts) ** 2)

        gradient = float(jnp.sum(jax.grad(loss)(experts) * direction))
        step = 1e-6
        finite = (loss(experts + step * direction) - loss(experts - step * direction)) / (2 * step)
        np.testing.assert_allclose(gradient, finite, rtol=1e-5)


EXTREMES = {
    "scale": st.sampled_from([1e-8, 1e-4, 1.0, 1e4, 1e8]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "rank": st.sampled_from([None, 1, 2]),
    "seed": st.integers(0, 100),
}


def check_finite(shape, experts, scale, dtype, rank, seed):
    """No NaN out of finite input, whatever the scale, rank and dtype; float32 close to float64."""
    if dtype == "float16":
        scale = min(scale, 1.0)
    _, deltas = problem(seed, *shape, experts, scale, 1.0, rank)
    base = np.zeros(shape, np.float32)
    tensors = [jnp.asarray(d, dtype) for d in deltas]
    merged = np.asarray(cfmerge.merge_tensor(jnp.asarray(base, dtype), tensors, ace()), np.float64)
    assert np.isfinite(merged).all()
    if dtype == "float32":
        exact = solve([np.asarray(t, np.float64) for t in tensors], ace())
        assert np.max(np.abs(merged - exact)) <= 2e-3 * np.max(np.abs(exact)) + 1e-300


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=st.sampled_from([(6, 4), (3, 12)]), experts=st.sampled_from([1, 3]), **EXTREMES)
def test_finite_in_finite_out(**drawn):
    """Both forms; few shapes, each of which is compiled."""
    check_finite(**drawn)


@pytest.mark.long
@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=st.sampled_from([(6, 4), (4, 6), (3, 12), (8, 8)]), experts=st.integers(1, 4), **EXTREMES)
def test_finite_in_finite_out_of_more_shapes(**drawn):
    check_finite(**drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps_rel": -1.0}, "eps_rel must be positive"),
        ({"k_frac": 1.5}, r"k_frac must lie in \[0, 1\]"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 3, "form": "full"}, "low-rank form"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(CfmergeError, match=message):
        ace(**options)


def test_the_registry_reads_strings_and_suggests_names():
    assert methods.make("ace", {"eps": "1e-5", "rank": "4", "tau": 1}).parameters["eps"] == 1e-5
    with pytest.raises(CfmergeError, match=r"did you mean '.*ace'"):
        methods.make("ase")
    with pytest.raises(CfmergeError, match="did you mean 'eps_rel'"):
        methods.make("ace", {"eps_real": 1})
    with pytest.raises(CfmergeError, match="parameter 'eps'"):
        methods.make("ace", {"eps": "small"})
    entry = methods.registry()["ace"]
    assert entry.source.startswith("Xu et al.")
    assert all(entry.describe(name) for name in entry.signature)
