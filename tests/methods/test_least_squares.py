"""The least-squares family without data: the peers' numbers, the explicit formulas, and what follows from them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check, names
from hypothesis import given, settings
from hypothesis import strategies as st

import cfmerge
from cfmerge import covariance, linalg, methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import (
    actmat,
    anchored,
    aswudi,
    cauchy_poe,
    gcv,
    optmerge,
    power,
    ridge_path,
    swudi,
    tact,
    two_sided,
    wudi,
    wudi_adam,
)

# --- the peers' own numbers ---------------------------------------------------------------------------------------

FORMS = ["auto", "full"]


def with_forms(*prefixes):
    """Cases, and for the wide ones, whose rows stay fewer than the inputs for a while, both forms."""
    return [(name, form) for name in names(*prefixes) if name != "actmat_ties"
            for form in (FORMS if "wide" in name or "rankdef" in name else ["auto"])]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), with_forms("actmat_"))
def test_actmat(name, form):
    params = CASES[name]["params"]
    if "softmax" in name:
        options = {"covariance": "softmax_bias"}
    elif "uniform_ridge" in name:
        options = {"ridge": params["ridge"]}
    else:
        options = {"normalise": {None: "none", 0.5: "norm", 1.0: "energy"}[params.get("p")]}
    check(CASES[name], actmat(**options, form=form))


@pytest.mark.parametrize(("name", "form"), with_forms("tact_"))
def test_tact(name, form):
    check(CASES[name], tact(CASES[name]["params"].get("tact_k", 0.5), form=form))


@pytest.mark.parametrize("name", names("fb_wudi_"))
def test_wudi_adam(name):
    params = CASES[name]["params"]
    check(CASES[name], wudi_adam(params["iter_num"], params.get("lr", 1e-5)))


@pytest.mark.parametrize(("name", "form"), with_forms("swudi_"))
def test_swudi(name, form):
    params = CASES[name]["params"]
    check(CASES[name], swudi(params["filter_type"], params["exp_time"], params["truncate_rank_ratio"],
                             params["init_mode"], form=form))  # fmt: skip


RULES = {"participation_sqrt": "participation_sqrt", "gavish_donoho": "gavish_donoho_released"}


@pytest.mark.parametrize(("name", "form"), with_forms("aswudi_"))
def test_aswudi(name, form):
    params = CASES[name]["params"]
    rule = params["auto_rank_method"]
    options = {"rule": "cumulative", "share": float(rule[7:])} if rule.startswith("cumvar_") else {"rule": RULES[rule]}
    check(CASES[name], aswudi(**options, anchor=params["init_mode"], form=form))


# --- the explicit formulas, in plain NumPy ------------------------------------------------------------------------


def problem(seed=0, m=6, n=9, experts=3, scale=0.1):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((m, n)) for _ in range(experts)]


def gather(deltas, method, weights=None):
    """The statistic, in the deltas' precision."""
    statistic = method.init(jnp.zeros_like(jnp.asarray(deltas[0])))
    for delta, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True):
        statistic = method.see(statistic, jnp.asarray(delta), weight)
    return statistic


def solve(deltas, method, weights=None):
    """The merged delta in float64."""
    with jax.enable_x64(True):
        return np.asarray(method.solve(gather(deltas, method, weights)))


def told(deltas, method, weights=None):
    with jax.enable_x64(True):
        report = method.solve_with_report(gather(deltas, method, weights))[1]
        return {name: float(value) for name, value in report.items()}


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-300))


def sums(deltas, estimates, weights=None):
    weights = weights or [1.0] * len(deltas)
    gram = sum(w * s for w, s in zip(weights, estimates, strict=True))
    cross = sum(w * d @ s for w, d, s in zip(weights, deltas, estimates, strict=True))
    return gram, cross, sum(w * d for w, d in zip(weights, deltas, strict=True))


def by_energy(deltas):
    return [d.T @ d / np.sum(d**2) for d in deltas]


def ridged(gram, cross, ridge, anchor):
    rho = ridge * np.trace(gram) / len(gram)
    return anchor + (cross - anchor @ gram) @ np.linalg.inv(gram + rho * np.eye(len(gram)))


SHAPES = [(6, 9), (4, 20)]
WEIGHTS = [1.0, 0.5, 2.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("anchor", ["zero", "mean", "sum"])
def test_a_ridge_to_an_anchor(shape, anchor):
    deltas = problem(m=shape[0], n=shape[1])
    gram, cross, total = sums(deltas, by_energy(deltas), WEIGHTS)
    there = {"zero": 0 * total, "mean": total / sum(WEIGHTS), "sum": total}[anchor]
    expected = ridged(gram, cross, 0.3, there)
    for form in FORMS:
        close(solve(deltas, anchored(0.3, anchor, form=form), WEIGHTS), expected)
        close(solve(deltas, wudi(0.3, anchor, form=form), WEIGHTS), expected)


def test_a_ridge_to_another_merge():
    deltas = problem()
    gram, cross, total = sums(deltas, by_energy(deltas))
    close(solve(deltas, anchored(0.3, towards=methods.task_arithmetic(0.7))), ridged(gram, cross, 0.3, 0.7 * total))
    far = anchored(1e9, towards=aswudi())
    close(solve(deltas, far), solve(deltas, aswudi()), 1e-7)
    assert "anchor_kept" in told(deltas, far)
    with pytest.raises(CfmergeError, match="surveys the whole model"):
        anchored(towards=next(m for m in (methods.linear(), methods.metagpt()) if m.survey))


def filtered(gram, cross, anchor, response):
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 1e-8)
    return anchor + (cross - anchor @ gram) @ (vectors * (response(values) / values)) @ vectors.T


FILTERS = {
    "exponential": ({"time": 40.0}, lambda l: 1 - np.exp(-40 * l)),
    "tikhonov": ({"alpha": 0.05}, lambda l: l / (l + 0.05)),
    "landweber": ({"steps": 50}, lambda l: 1 - (1 - 0.9 * l / l[-1]) ** 50),
    "wiener": ({"noise": 0.01}, lambda l: l**2 / (l**2 + 0.01)),
    "none": ({}, np.ones_like),
}


@pytest.mark.parametrize("filter", list(FILTERS))
def test_filters(filter):
    options, response = FILTERS[filter]
    deltas = problem()
    gram, cross, total = sums(deltas, by_energy(deltas))
    expected = filtered(gram, cross, total, lambda l: response(l) * (np.arange(9) >= 9 - 5))
    close(solve(deltas, swudi(filter, keep=0.5, **options)), expected)
    close(solve(deltas, swudi(filter, keep=None, anchor="mean", **options)),
          filtered(gram, cross, total / 3, response))  # fmt: skip


def test_tikhonov_is_the_anchored_ridge_and_landweber_is_gradient_descent():
    deltas = problem()
    gram, cross, total = sums(deltas, by_energy(deltas))
    relative = 0.05 / (np.trace(gram) / 9)
    close(solve(deltas, swudi("tikhonov", alpha=0.05, keep=None)), solve(deltas, wudi(relative)))
    x, rate = total, 0.9 / np.linalg.eigvalsh(gram)[-1]
    for _ in range(20):
        x = x - rate * (x @ gram - cross)
    close(solve(deltas, swudi("landweber", steps=20, keep=None)), x)


def test_the_ranks_of_aswudi():
    deltas = problem(m=12, n=8, experts=2)
    deltas = [d * np.geomspace(1, 0.01, 8) for d in deltas]
    values = np.sort(np.linalg.eigvalsh(sum(by_energy(deltas))))[::-1]
    p, p2, y = values / values.sum(), values**2 / np.sum(values**2), np.sqrt(values)
    ranks = {
        "participation_sqrt": y.sum() ** 2 / values.sum(),
        "participation": values.sum() ** 2 / np.sum(values**2),
        "entropy": np.exp(-np.sum(p * np.log(p))),
        "entropy_squared": np.exp(-np.sum(p2 * np.log(p2))),
        "stable_rank": np.sum(values**2) / values[0] ** 2,
        "cumulative": np.sum(np.cumsum(values) / values.sum() < 0.9) + 1,
        "all": 8,
    }
    for rule, rank in ranks.items():
        assert told(deltas, aswudi(rule))["kept"] == np.ceil(rank), rule
    whole = solve(deltas, aswudi("all"))
    gram, cross, _ = sums(deltas, by_energy(deltas))
    close(whole, cross @ np.linalg.inv(gram), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gavish_and_donoho_find_the_signal_in_noise(form):
    """Rank 3 in noise of 2 x 40 rows: the threshold for stacked rows finds it."""
    rng = np.random.default_rng(0)
    rows, columns = np.linalg.qr(rng.standard_normal((160, 3)))[0], np.linalg.qr(rng.standard_normal((100, 3)))[0]
    both = 60 * rows @ columns.T + rng.standard_normal((160, 100))
    count = told(list(np.split(both, 4)), aswudi("gavish_donoho", form=form))["kept"]
    assert count == 3
    deltas = list(np.split(both[:80], 2))
    assert told(deltas, aswudi("gavish_donoho", form=form))["kept"] == 3


def test_median_of_marchenko_pastur():
    """Against the quantile of a large random matrix's spectrum, and the published 2.858 = omega(1)."""
    from cfmerge.methods._spectrum import marchenko_pastur_median

    with jax.enable_x64(True):
        assert abs(4 / np.sqrt(3) / np.sqrt(float(marchenko_pastur_median(1.0))) - 2.858) < 1e-3
        for beta in (0.1, 0.5):
            draw = np.random.default_rng(0).standard_normal((int(800 * beta), 800))
            median = np.median(np.linalg.svd(draw, compute_uv=False) ** 2 / 800)
            assert abs(float(marchenko_pastur_median(beta)) / median - 1) < 0.01


@pytest.mark.parametrize("shape", [*SHAPES, (9, 5)])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_power(shape, exponent):
    deltas = problem(m=shape[0], n=shape[1])
    estimates = []
    for delta in deltas:
        _, s, vt = np.linalg.svd(delta, full_matrices=False)
        estimates.append(vt.T * (s ** (2 * exponent) / np.sum(s ** (2 * exponent))) @ vt)
    gram, cross, total = sums(deltas, estimates)
    close(solve(deltas, power(exponent, 0.3)), ridged(gram, cross, 0.3, total / 3))
    close(solve(deltas, power(exponent, 0.3, form="full")), ridged(gram, cross, 0.3, total / 3))


def test_a_share_of_the_identity_in_every_covariance_is_a_ridge_to_the_mean():
    deltas, share = problem(), 0.2
    mixed = [(1 - share) * s + share / 9 * np.eye(9) for s in by_energy(deltas)]
    gram, cross, _ = sums(deltas, mixed)
    close(solve(deltas, anchored(share / (1 - share))), cross @ np.linalg.inv(gram))


def test_small_singular_values_keep_their_digits_in_a_power():
    """The root of the Gram in float32 would know a singular value of 1e-5 to 10 %; its own is known to 1e-2."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    s = np.geomspace(1, 1e-5, 8)
    found = covariance.of_power(jnp.asarray(u * s @ v.T, jnp.float32), 0.5)
    rows = np.asarray(found.rows, np.float64)
    np.testing.assert_allclose(np.linalg.svd(rows, compute_uv=False) ** 2, s, rtol=2e-2)


def test_optmerge():
    deltas = problem()
    mean, k = sum(deltas) / 3, 2

    def cut(matrix):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :k] * s[:k] @ vt[:k]

    estimates = [cut(d).T @ cut(d) / np.sum(d**2) for d in deltas]
    gram = sum(estimates)
    cross = sum((cut(d - mean) + mean) @ s for d, s in zip(deltas, estimates, strict=True))
    close(solve(deltas, optmerge()), ridged(gram, cross, 0.1, sum(deltas)))


def test_cauchy_poe():
    deltas = problem(m=5, n=7)
    deltas[2] = -4 * deltas[0]
    x = sum(deltas) / 3
    for _ in range(60):
        a = [1 / (np.sum((d.T @ (x - d)) ** 2) + 0.1 * np.sum(d**2)) for d in deltas]
        left = sum(w * d @ d.T for w, d in zip(a, deltas, strict=True)) + 1e-3 * np.eye(5)
        x = np.linalg.solve(left, sum(w * d @ d.T @ d for w, d in zip(a, deltas, strict=True)))
    close(solve(deltas, cauchy_poe(iterations=60, tolerance=0.0)), x)
    report = told(deltas, cauchy_poe())
    assert report["change"] <= 1e-5
    assert 2 <= report["iterations"] < 50
    assert told(deltas, cauchy_poe(iterations=1))["change"] > 1e-3


@pytest.mark.parametrize("powers", [(0.25, 0.5), (0.5, 0.25)])
def test_two_sided(powers):
    deltas = problem(m=4, n=4, experts=2)

    def side(delta, power, of_inputs):
        u, s, vt = np.linalg.svd(delta)
        vectors = vt.T if of_inputs else u
        return vectors * (s ** (2 * power) / np.sum(s ** (2 * power))) @ vectors.T

    a, b = [[side(d, p, right) for d in deltas] for p, right in zip(powers, (False, True), strict=True)]
    system = sum(np.kron(x, y) for x, y in zip(a, b, strict=True))
    goal = sum(x @ d @ y for x, d, y in zip(a, deltas, b, strict=True))
    expected = np.linalg.solve(system, goal.reshape(-1)).reshape(4, 4)
    close(solve(deltas, two_sided(*powers, iterations=100)), expected, 1e-6)
    assert told(deltas, two_sided(*powers, iterations=100))["residual"] < 1e-10
    close(solve(deltas, two_sided(*powers, iterations=0, scale=2.0)), sum(deltas))
    assert told(deltas, two_sided(*powers, iterations=2))["residual"] > 1e-6


# --- cross-validation and grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "form"), [((6, 9), "full"), ((4, 20), "auto"), ((4, 20), "full")])
@pytest.mark.parametrize("anchor", ["zero", "mean", "sum"])
def test_gcv_against_brute_force(shape, form, anchor):
    """The regression written out: stacked rows F, targets F_t D_t^T, and the trace of the hat matrix."""
    m, n = shape
    deltas, ridges = problem(m=m, n=n), [1e-3, 0.1, 2.0]
    rows = np.concatenate([np.sqrt(w) * d / np.linalg.norm(d) for w, d in zip(WEIGHTS, deltas, strict=True)])
    targets = np.concatenate([np.sqrt(w) * d @ d.T / np.linalg.norm(d) for w, d in zip(WEIGHTS, deltas, strict=True)])
    total = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
    there = {"zero": 0 * total, "mean": total / sum(WEIGHTS), "sum": total}[anchor]
    expected = []
    for ridge in ridges:
        rho = ridge * np.sum(rows**2) / n
        inverse = np.linalg.inv(rows.T @ rows + rho * np.eye(n))
        x = there + (rows.T @ (targets - rows @ there.T)).T @ inverse
        count, hat = len(rows), np.trace(rows @ inverse @ rows.T)
        expected.append(np.sum((rows @ x.T - targets) ** 2) / count / (1 - hat / count) ** 2)
    with jax.enable_x64(True):
        statistic = gather(deltas, anchored(form=form), WEIGHTS)
        np.testing.assert_allclose(gcv(statistic, ridges, anchor), expected, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_path_of_ridges_is_the_ridges_one_by_one(shape):
    deltas, ridges = problem(m=shape[0], n=shape[1]), [1e-3, 0.1, 10.0]
    with jax.enable_x64(True):
        path = np.asarray(ridge_path(gather(deltas, wudi()), ridges, "sum"))
    for ridge, merged in zip(ridges, path, strict=True):
        close(merged, solve(deltas, wudi(ridge)), 1e-8)


def test_the_ridge_that_cross_validation_chooses():
    """Rows of a low-rank signal with noise: neither end of the grid, and the best of it by its own score."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 20))
    deltas = [shared + rng.standard_normal((30, 20)) for _ in range(3)]
    report = told(deltas, anchored(None, "zero"))
    assert not report["ridge_at_end"]
    close(solve(deltas, anchored(None, "zero")), solve(deltas, anchored(report["ridge"], "zero")))


# --- what follows -------------------------------------------------------------------------------------------------

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
    deltas = problem(m=4, n=20)
    close(solve(deltas, ADDITIVE[name]("low-rank"), WEIGHTS), solve(deltas, ADDITIVE[name]("full"), WEIGHTS), 1e-7)


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
    assert method.weights == "any"


def test_forgetting_needs_grams():
    with pytest.raises(CfmergeError, match=r"form=.full."):
        solve(problem(m=4, n=20), wudi(), [1.0, 1.0, -1.0])
    assert wudi().weights == "positive"


def test_one_pass_serves_many_members():
    shared = [wudi(), wudi(0.5, "mean"), wudi_adam(), swudi(), aswudi(), anchored(None), actmat("energy")]
    assert len({method.statistic for method in shared}) == 1
    others = [actmat(), actmat("norm"), tact(), tact(0.7), power(), power(0.7), wudi(form="full"), shared[0]]
    assert len({method.statistic for method in others}) == len(others)
    with jax.enable_x64(True):
        statistic = gather(problem(), wudi())
        for method in shared[1:]:
            close(np.asarray(method.solve(statistic)), solve(problem(), method))


@pytest.mark.parametrize("name", ["wudi", "aswudi", "actmat"])
def test_deltas_of_low_rank(name):
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((10, 2)) @ rng.standard_normal((2, 12)) for _ in range(3)]
    method = ADDITIVE[name]("auto")
    narrow = method.of_rank(3)
    close(solve(deltas, narrow), solve(deltas, ADDITIVE[name]("full")), 1e-7)
    assert told(deltas, narrow)["factor_error"] < 1e-12
    assert told(problem(m=10, n=12), narrow)["factor_error"] > 1e-2
    with pytest.raises(CfmergeError, match="form='auto'"):
        solve(deltas, method.of_rank(4))


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
            return jnp.sum(jnp.sin(jnp.arange(42.0).reshape(3, 14)) * method.solve(gather(moved, method)))

        quotient = (merge(1e-5) - merge(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.jit(jax.grad(merge))(0.0), quotient, rtol=1e-4)


@pytest.mark.parametrize("method", [actmat(), swudi(), power(), cauchy_poe(iterations=3), two_sided(), optmerge()],
                         ids=lambda m: m.name)  # fmt: skip
def test_experts_that_did_not_change_a_tensor(method):
    """Nothing is divided by their norm, in the merge or in its derivative; all of them together give zero."""
    rows = [jnp.asarray(d, jnp.float32) for d in problem()]
    slope = jax.jit(jax.grad(lambda ds: jnp.sum(method.solve(gather(ds, method)))))
    for deltas in ([rows[0], 0 * rows[0], rows[1]], [0 * rows[0]] * 3):
        assert all(np.isfinite(g).all() for g in slope(deltas))
        merged, report = method.solve_with_report(gather(deltas, method))
        assert np.isfinite(merged).all()
        assert all(np.isfinite(value).all() for value in report.values())
    assert not np.any(merged)


def test_numbers_may_be_traced():
    deltas = [jnp.asarray(d, jnp.float32) for d in problem()]

    @jax.jit
    def merge(a, b):
        made = [tact(a, rtol=b), actmat(ridge=b), wudi(b), swudi(time=a, alpha=b), aswudi(share=a),
                anchored(b), power(a, b), cauchy_poe(a, b), two_sided(a, b, 3), optmerge(ridge=b)]  # fmt: skip
        return [method.solve(gather(deltas, method)) for method in made]

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
