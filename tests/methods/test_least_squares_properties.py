"""What follows from the least-squares family's formulas: sums, limits, invariances, derivatives, what is said."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_parts import close, gather, problem, solve, sums, told

import cfmerge
from cfmerge import covariance, linalg, methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import (
    actmat,
    anchored,
    aswudi,
    cauchy_poe,
    optmerge,
    power,
    swudi,
    tact,
    two_sided,
    wudi,
    wudi_adam,
)

ADDITIVE = {
    "actmat": lambda form: actmat(form=form),
    "actmat_norm": lambda form: actmat("norm", form=form),
    "tact": lambda form: tact(form=form),
    "wudi": lambda form: wudi(form=form),
    "wudi_adam": lambda form: wudi_adam(5, form=form),
    "swudi": lambda form: swudi(form=form),
    "aswudi": lambda form: aswudi(form=form),
    "anchored": lambda form: anchored(form=form),
    "gcv": lambda form: anchored(None, form=form),
    "power": lambda form: power(form=form),
}


@pytest.mark.parametrize("name", list(ADDITIVE))
def test_stacked_rows_give_what_the_gram_gives(name):
    deltas, weights = problem(m=4, n=20), [1.0, 0.5, 2.0]
    close(solve(deltas, ADDITIVE[name]("low-rank"), weights), solve(deltas, ADDITIVE[name]("full"), weights), 1e-7)


@pytest.mark.parametrize("name", ["actmat", "tact", "wudi", "power"])
def test_statistics_are_sums(name):
    """Two halves add up to the whole; an expert that is added and forgotten leaves no trace."""
    deltas, method = problem(experts=4), ADDITIVE[name]("full")
    with jax.enable_x64(True):
        whole = gather(deltas, method)
        halves = jax.tree.map(jnp.add, gather(deltas[:2], method), gather(deltas[2:], method))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), halves, whole)
        forgot = method.update(whole, jnp.asarray(deltas[3]), -1.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), forgot,
                     gather(deltas[:3], method))  # fmt: skip
    assert method.additive
    assert method.needs.weights == "any"


def test_forgetting_needs_grams():
    with pytest.raises(CfmergeError, match=r"form=.full."):
        solve(problem(m=4, n=20), wudi(), [1.0, 1.0, -1.0])
    assert wudi().needs.weights == "positive"


def test_one_pass_serves_many_members():
    shared = [wudi(), wudi(0.5, "mean"), wudi_adam(), swudi(), aswudi(), anchored(None), actmat("energy")]
    assert len({method.statistic for method in shared}) == 1
    others = [actmat(), actmat("norm"), tact(), tact(0.7), power(), power(0.7), wudi(form="full"), shared[0]]
    assert len({method.statistic for method in others}) == len(others)
    with jax.enable_x64(True):
        statistic = gather(problem(), wudi())
        for method in shared[1:]:
            close(np.asarray(method.solve(statistic)[0]), solve(problem(), method))


@pytest.mark.parametrize("name", ["wudi", "aswudi", "actmat"])
def test_deltas_of_low_rank(name):
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((10, 2)) @ rng.standard_normal((2, 12)) for _ in range(3)]
    method = ADDITIVE[name]("auto")
    narrow = method.form(3)
    close(solve(deltas, narrow), solve(deltas, ADDITIVE[name]("full")), 1e-7)
    assert told(deltas, narrow)["factor_error"] < 1e-12
    assert told(problem(m=10, n=12), narrow)["factor_error"] > 1e-2
    with pytest.raises(CfmergeError, match="form='auto'"):
        solve(deltas, method.form(4))


UNSHRUNK = [actmat(), actmat("norm"), actmat("energy"), anchored(0.5), power(1.0, 2.0), cauchy_poe(jitter=1e-9)]


@pytest.mark.parametrize("method", UNSHRUNK, ids=lambda m: m.name)
@pytest.mark.parametrize("experts", [1, 3])
def test_one_expert_or_the_same_thrice_is_kept(method, experts):
    (delta,) = problem(experts=1)
    close(solve([delta] * experts, method), delta, 1e-6)


@pytest.mark.parametrize("method", [actmat(), tact(), wudi(), swudi(), aswudi(), anchored(None), power(), optmerge(),
                                    two_sided()], ids=lambda m: m.name)  # fmt: skip
def test_scales_with_the_deltas(method):
    deltas = problem()
    close(solve([1e3 * d for d in deltas], method), 1e3 * solve(deltas, method), 1e-7)


@pytest.mark.parametrize("method", [actmat(), wudi(), swudi(), aswudi(), anchored(None), power(), optmerge(),
                                    cauchy_poe(), two_sided()], ids=lambda m: m.name)  # fmt: skip
def test_a_rotation_of_inputs_or_outputs_is_followed(method):
    deltas = problem()
    rng = np.random.default_rng(1)
    right, left = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (9, 6))
    close(solve([left @ d @ right for d in deltas], method), left @ solve(deltas, method) @ right, 1e-7)


def test_orthogonal_row_spaces_are_all_kept():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    deltas = [rng.standard_normal((5, 4)) @ basis[4 * t : 4 * t + 4] for t in range(3)]
    close(solve(deltas, actmat()), sum(deltas))
    close(solve(deltas, wudi(0.3)), sum(deltas))


@pytest.mark.parametrize("anchor", ["mean", "sum"])
def test_the_limits_of_the_ridge(anchor):
    deltas = problem()
    far = sum(deltas) / (3 if anchor == "mean" else 1)
    close(solve(deltas, anchored(1e9, anchor)), far, 1e-6)
    close(solve(deltas, anchored(1e-10, anchor)), solve(deltas, actmat("energy")), 1e-6)


def test_a_singular_gram_is_said():
    """Without a ridge, a Gram of deficient rank: the anchor's part stays, and the report tells."""
    deltas = problem(m=2, n=12)
    assert told(deltas, actmat())["effective_rank"] == pytest.approx(6)
    assert told(deltas, anchored(0.0, form="full"))["no_cholesky"]
    assert told(deltas, aswudi("all"))["capped"]
    close(solve(deltas, aswudi("all")), solve(deltas, actmat("energy")), 1e-6)
    assert told(deltas, wudi(1e-3))["ridge_ratio"] < 1e-3


def test_adam_tends_to_the_least_squares():
    deltas = problem()
    close(solve(deltas, wudi_adam(4000, 1e-3)), solve(deltas, actmat("energy")), 2e-2)


def excess_risk(merged, deltas, covariances):
    lost = sum(np.trace((merged - d) @ s @ (merged - d).T) for d, s in zip(deltas, covariances, strict=True))
    return lost / sum(np.trace(d @ s @ d.T) for d, s in zip(deltas, covariances, strict=True))


def test_estimators_rank_as_in_the_linear_testbed():
    """A few steps of gradient descent to a full-rank target: the root of the Gram beats it, both beat the mean."""
    rng, deltas, covariances = np.random.default_rng(0), [], []
    for _ in range(6):
        basis = np.linalg.qr(rng.standard_normal((48, 48)))[0]
        values = 1 / np.arange(1, 49)
        sigma = basis * (values / values.mean()) @ basis.T
        target, delta = rng.standard_normal((40, 48)), np.zeros((40, 48))
        for _ in range(20):
            delta = delta - 0.02 * (delta - target) @ sigma
        deltas.append(delta)
        covariances.append(sigma)
    gram, cross, total = sums(deltas, covariances)
    risks = [excess_risk(x, deltas, covariances) for x in (
        cross @ np.linalg.inv(gram),
        solve(deltas, power(0.5, 0.0)),
        solve(deltas, power(1.0, 0.0)),
        total / 6,
    )]  # fmt: skip
    assert risks == sorted(risks)


# --- derivatives, parameters, and the small parts -----------------------------------------------------------------


@pytest.mark.parametrize("method", [actmat(), wudi(), aswudi(), swudi(), anchored(None), power(), cauchy_poe(),
                                    two_sided(), wudi_adam(10)], ids=lambda m: m.name)  # fmt: skip
def test_derivatives(method):
    """Against a difference quotient, where there are more inputs than rows."""
    deltas = problem(m=3, n=14)
    direction = problem(1, m=3, n=14)
    with jax.enable_x64(True):

        def merge(step):
            moved = [jnp.asarray(d) + step * jnp.asarray(e) for d, e in zip(deltas, direction, strict=True)]
            return jnp.sum(jnp.sin(jnp.arange(42.0).reshape(3, 14)) * method.solve(gather(moved, method))[0])

        quotient = (merge(1e-5) - merge(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.jit(jax.grad(merge))(0.0), quotient, rtol=1e-4)


@pytest.mark.parametrize("method", [actmat(), swudi(), power(), cauchy_poe(iterations=3), two_sided(), optmerge()],
                         ids=lambda m: m.name)  # fmt: skip
def test_experts_that_did_not_change_a_tensor(method):
    """Nothing is divided by their norm, in the merge or in its derivative; all of them together give zero."""
    rows = [jnp.asarray(d, jnp.float32) for d in problem()]
    slope = jax.jit(jax.grad(lambda ds: jnp.sum(method.solve(gather(ds, method))[0])))
    for deltas in ([rows[0], 0 * rows[0], rows[1]], [0 * rows[0]] * 3):
        assert all(np.isfinite(g).all() for g in slope(deltas))
        merged, report = method.solve(gather(deltas, method))
        assert np.isfinite(merged).all()
        assert all(np.isfinite(value).all() for value in report.values())
    assert not np.any(merged)


def test_numbers_may_be_traced():
    deltas = [jnp.asarray(d, jnp.float32) for d in problem()]

    @jax.jit
    def merge(a, b):
        made = [tact(a, rtol=b), actmat(ridge=b), wudi(b), swudi(time=a, alpha=b), aswudi(share=a),
                anchored(b), power(a, b), cauchy_poe(a, b), two_sided(a, b, 3), optmerge(ridge=b)]  # fmt: skip
        return [method.solve(gather(deltas, method))[0] for method in made]

    merged = merge(0.5, 0.1)
    assert all(np.isfinite(x).all() for x in merged)
    close(merged[0], solve(problem(), tact(0.5, rtol=0.1)), 1e-3)
    close(merged[2], solve(problem(), wudi(0.1)), 1e-4)
    close(merged[6], solve(problem(), power(0.5, 0.1)), 1e-3)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: actmat(ridge=-1), "ridge must not be negative"),
        (lambda: actmat("energy", covariance="softmax_bias"), "softmax"),
        (lambda: tact(1.5), r"k must lie in \[0, 1\]"),
        (lambda: swudi(keep=0.0), "keep must lie"),
        (lambda: wudi_adam(-1), "steps must not be negative"),
        (lambda: cauchy_poe(eps=0), "eps must be positive"),
        (lambda: optmerge(0), "rank must be at least 1"),
        (lambda: power(3.0), "exponent must lie"),
    ],
)
def test_bad_parameters(call, what):
    with pytest.raises(CfmergeError, match=what):
        call()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=12, max_size=12), st.integers(1, 12))
def test_kth_largest(values, k):
    values = np.where(np.asarray(values, np.float32) < 1e-37, 0, np.asarray(values, np.float32))
    assert float(linalg.kth_largest(jnp.asarray(values), k)) == np.sort(values)[-k]


def test_trimming_keeps_as_many_as_it_says():
    delta = jnp.asarray(problem(m=7, n=9)[0])
    for share in (0.0, 0.2, 0.5, 1.0):
        assert int(jnp.sum(covariance.of_largest(delta, share).rows != 0)) == round(share * 63)


def test_merges_whole_trees():
    rng = np.random.default_rng(0)
    base = {"dense": {"kernel": jnp.asarray(rng.standard_normal((9, 6)), jnp.float32)}}
    trees = [jax.tree.map(lambda leaf, d=d: leaf + jnp.asarray(d.T, jnp.float32), base) for d in problem()]
    merged = cfmerge.merge_params(base, trees, wudi())
    close(np.asarray(merged["dense"]["kernel"] - base["dense"]["kernel"]).T, solve(problem(), wudi()), 1e-4)


def adapters(experts=6, shape=(48, 64), rank=4, moved=0.1):
    """LoRA's deltas `B_t A_t`, of matrices `A_t` that all began as one."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((rank, shape[1]))
    rows = [start + moved * rng.standard_normal(start.shape) for _ in range(experts)]
    return [(0.01 * rng.standard_normal((shape[0], rank)) @ a).astype(np.float32) for a in rows]


@pytest.mark.parametrize("method", ["ace", "ace(form='full')", "wudi", "wudi(form='full')", "actmat"])
def test_growth_is_the_length_beside_unrelated_deltas(method):
    deltas = adapters()
    for weights in (None, [0.25] * len(deltas)):
        made = methods.make(method)
        unrelated = np.sqrt(sum(np.sum(delta**2) for delta in deltas))
        length = np.linalg.norm(solve(deltas, made, weights))
        close(told(deltas, made, weights)["growth"], length / unrelated, 1e-4)


def test_a_merge_that_outgrows_the_deltas_is_told():
    deltas = adapters()
    base = {"attention": {"query": {"weight": np.zeros_like(deltas[0])}}}
    experts = [{"attention": {"query": {"weight": delta}}} for delta in deltas]
    with pytest.warns(UserWarning, match=r"attention/query/weight: the merged delta is up to 2\.\d times as long"):
        cfmerge.merge_params(base, experts, methods.ace())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfmerge.merge_params(base, experts, methods.ace(eps_rel=7))
