"""The least-squares family without data: the peers' numbers, the explicit formulas, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check, names
from least_squares_parts import by_energy, close, gather, problem, ridged, solve, sums, told

from cfmerge import covariance, methods
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
