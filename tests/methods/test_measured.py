"""Fisher merging, RegMean and LOT: the peers' numbers, the formulas in plain NumPy, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check_states, load, names, states

import cfmerge
from cfmerge import linalg
from cfmerge.errors import CfmergeError
from cfmerge.methods import Context, fisher, lot, make, regmean


def problem(seed=0, m=6, n=9, experts=3, tokens=40, rank=None):
    """Deltas and the Grams of each expert's inputs."""
    rng = np.random.default_rng(seed)
    deltas = [rng.standard_normal((m, n)) for _ in range(experts)]
    inputs = [rng.standard_normal((tokens, rank or n)) @ rng.standard_normal((rank or n, n)) for _ in range(experts)]
    return deltas, [x.T @ x / tokens for x in inputs]


def statistic_of(method, deltas, moments, weights=None):
    statistic = method.init(jnp.zeros_like(jnp.asarray(deltas[0])))
    weights = weights or [1.0] * len(deltas)
    for number, (delta, moment, weight) in enumerate(zip(deltas, moments, weights, strict=True)):
        context = Context(number=number, moment=jnp.asarray(moment, jnp.asarray(delta).dtype))
        statistic = method.see(statistic, jnp.asarray(delta), weight, context)
    return statistic


def solved(method, deltas, moments, weights=None):
    """The merged delta and the report, in float64."""
    with jax.enable_x64(True):
        result, report = method.solve(statistic_of(method, deltas, moments, weights))
        return np.asarray(result), {name: float(value) for name, value in report.items()}


def merged(*arguments):
    return solved(*arguments)[0]


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-300))


def noted(method, report):
    return {name for name, (condition, _) in method.notes.items() if condition(report[name])}


# --- Fisher merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("fb_fisher"))
@pytest.mark.filterwarnings("ignore:.*below the floor")
def test_fisher_is_the_peers(name):
    case, arrays = CASES[name], load(CASES[name])
    moments = [states(arrays, f"fisher_{t}") for t in range(case["num_experts"])]
    params = case["params"]
    method = fisher(params["minimal_fisher_weight"], "add", params["normalize_fisher_weight"])
    check_states(case, method, moments=moments, weights=params["fisher_scaling_coefficients"])


def fishers(seed=1, shape=(6, 9), experts=3):
    return list(np.random.default_rng(seed).standard_normal((experts, *shape)) ** 2)


@pytest.mark.parametrize("shape", [(6, 9), (7,)])
def test_fisher_equals_the_formula(shape):
    deltas, weights = list(np.random.default_rng(0).standard_normal((3, *shape))), [0.5, 1.0, 2.0]
    information = fishers(shape=shape)
    over = sum(w * f for w, f in zip(weights, information, strict=True))
    expected = sum(w * f * d for w, f, d in zip(weights, information, deltas, strict=True)) / over
    close(merged(fisher(floor=0), deltas, information, weights), expected)
    close(merged(fisher(floor=0), deltas, [np.ones(shape)] * 3), np.mean(deltas, axis=0))


def test_floors():
    deltas, information = problem()[0], fishers()
    for f in information:
        f[0] = 1e-9
        f[1] = 0
    information[0][2] = 0
    report = solved(fisher(), deltas, information)[1]
    assert report["below_floor"] == pytest.approx(2 / 6)
    for method in (fisher(), fisher(below="raise"), fisher(below="add")):
        close(merged(method, deltas, information)[1], np.mean(deltas, axis=0)[1])
    close(merged(fisher(), deltas, information)[0], np.mean(deltas, axis=0)[0])
    raised = [np.maximum(f, 0.5) for f in information]
    close(merged(fisher(0.5, "raise"), deltas, information), merged(fisher(0), deltas, raised))
    close(merged(fisher(0.5, "add"), deltas, information), merged(fisher(0), deltas, [f + 0.5 for f in information]))
    tiny = solved(fisher(), deltas, [1e-12 * f for f in information])
    close(tiny[0], np.mean(deltas, axis=0))
    assert noted(fisher(), tiny[1]) == {"below_floor"}
    assert noted(fisher(), report) == set()


def test_the_floor_does_not_depend_on_the_weights_scale():
    deltas, information = problem()[0], [1e-6 * f for f in fishers()]
    close(merged(fisher(), deltas, information), merged(fisher(), deltas, information, [1e-3] * 3))


def test_normalised_fishers_have_no_scale():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (4, 3), "a/bias": (3,)}

    def tree(positive=False):
        values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        return {name: value**2 for name, value in values.items()} if positive else values

    base, experts, information = tree(), [tree() for _ in range(3)], [tree(True) for _ in range(3)]
    scaled = [{name: s * f for name, f in own.items()} for s, own in zip((1e-2, 1, 1e3), information, strict=True)]
    one = cfmerge.merge_params(base, experts, fisher(0, normalise=True), moments=information)
    other = cfmerge.merge_params(base, experts, fisher(0, normalise=True), moments=scaled)
    norms = [np.sqrt(sum(np.sum(f**2) for f in own.values())) for own in information]
    for name in shapes:
        weights = [own[name] / norm for own, norm in zip(information, norms, strict=True)]
        expected = sum(w * expert[name] for w, expert in zip(weights, experts, strict=True)) / sum(weights)
        np.testing.assert_allclose(one[name], expected, atol=1e-5)
        np.testing.assert_allclose(other[name], expected, atol=1e-5)
    nothing = [{name: 0 * f for name, f in own.items()} for own in information]
    with pytest.warns(UserWarning, match="below the floor in 100%"):
        mean = cfmerge.merge_params(base, experts, fisher(normalise=True), moments=nothing)
    np.testing.assert_allclose(mean["a/bias"], np.mean([e["a/bias"] for e in experts], axis=0), atol=1e-6)


# --- RegMean ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("fb_regmean"))
def test_regmean_is_the_peers(name):
    case, arrays = CASES[name], load(CASES[name])
    moments = [{"weight": arrays[f"gram_{t}"]} for t in range(case["num_experts"])]
    check_states(case, regmean(case["params"]["reduce_non_diagonal_ratio"]), moments=moments)


def boosted(gram, a):
    return a * gram + (1 - a) * np.diag(np.diag(gram))


def regmean_reference(deltas, grams, a, ridge=0.0, weights=None):
    weights = weights or [1.0] * len(deltas)
    grams = [w * boosted(g, a) for w, g in zip(weights, grams, strict=True)]
    mean = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    rho = ridge * np.trace(sum(grams)) / len(grams[0])
    system = sum(grams) + rho * np.eye(len(grams[0]))
    return (sum(d @ g for d, g in zip(deltas, grams, strict=True)) + rho * mean) @ np.linalg.inv(system)


@pytest.mark.parametrize("shape", [(6, 9), (9, 4)])
@pytest.mark.parametrize(("a", "ridge"), [(0.9, 0.0), (0.0, 0.0), (1.0, 0.1)])
def test_regmean_equals_the_formula(shape, a, ridge):
    deltas, grams = problem(m=shape[0], n=shape[1])
    weights = [1.0, 0.5, 2.0]
    close(merged(regmean(a, ridge), deltas, grams, weights), regmean_reference(deltas, grams, a, ridge, weights))


def test_deltas_or_weights_are_the_same():
    deltas, grams = problem()
    base = np.random.default_rng(9).standard_normal(deltas[0].shape)
    close(merged(regmean(), [base + d for d in deltas], grams), base + merged(regmean(), deltas, grams))


def test_regmean_minimises_the_outputs_error():
    """At a = 1: the gradient of `sum ||(X - D_t) X_t||^2` is zero."""
    deltas, grams = problem()
    best = merged(regmean(1.0), deltas, grams)
    assert np.max(np.abs(sum((best - d) @ g for d, g in zip(deltas, grams, strict=True)))) < 1e-9


@pytest.mark.parametrize("rank", [None, 2])
def test_one_expert_and_equal_experts_are_returned(rank):
    deltas, grams = problem(rank=rank)
    for ridge in (0.0, 0.3):
        close(merged(regmean(ridge=ridge), deltas[:1], grams[:1]), deltas[0])
        close(merged(regmean(ridge=ridge), deltas[:1] * 3, grams), deltas[0])
    close(merged(regmean(), [*deltas, 0 * deltas[0]], [*grams, 0 * grams[0]]), merged(regmean(), deltas, grams))
    assert np.all(merged(regmean(), [0 * d for d in deltas], grams) == 0)


def test_limits_and_scales():
    deltas, grams = problem()
    result = merged(regmean(ridge=0.05), deltas, grams)
    close(merged(regmean(ridge=1e12), deltas, grams), np.mean(deltas, axis=0))
    close(merged(regmean(), deltas, [np.eye(9)] * 3), np.mean(deltas, axis=0))
    for scale in (1e-8, 1e8):
        close(merged(regmean(ridge=0.05), [scale * d for d in deltas], grams), scale * result)
        close(merged(regmean(ridge=0.05), deltas, [scale * g for g in grams]), result)
    turn, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((9, 9)))
    turned = merged(regmean(1.0, 0.05), [d @ turn for d in deltas], [turn.T @ g @ turn for g in grams])
    close(turned, merged(regmean(1.0, 0.05), deltas, grams) @ turn)


@pytest.mark.parametrize("method", [regmean(), lot(), fisher()])
def test_statistics_add_up_and_forget(method):
    deltas, moments = problem(experts=4)
    moments = fishers(experts=4) if method.needs.moments == "fisher" else moments
    with jax.enable_x64(True):
        whole = statistic_of(method, deltas, moments)
        halves = jax.tree.map(jnp.add, statistic_of(method, deltas[:2], moments[:2]),
                              statistic_of(method, deltas[2:], moments[2:]))  # fmt: skip
        context = Context(number=3, moment=jnp.asarray(moments[3]))
        forgotten = method.see(whole, jnp.asarray(deltas[3]), -1.0, context)
        close(method.solve(halves)[0], method.solve(whole)[0])
        close(method.solve(forgotten)[0], method.solve(statistic_of(method, deltas[:3], moments[:3]))[0])


def test_inputs_of_any_scale_are_solved_in_float32():
    """A few inputs a thousand times larger than the rest, as in language models: no loss with the unit diagonal."""
    deltas, grams = problem(n=30, tokens=200)
    scale = np.where(np.arange(30) % 7 == 0, 1e3, 1e-3)
    grams = [g * scale * scale[:, None] for g in grams]
    exact = regmean_reference(deltas, grams, 0.9)
    method = regmean()
    single = [np.asarray(d, np.float32) for d in deltas], [np.asarray(g, np.float32) for g in grams]
    got, report = method.solve(statistic_of(method, *single))
    close(np.asarray(got, np.float64), exact, 1e-4)
    assert 0.1 / 30 <= float(report["ridge_ratio"]) <= 1
    system = sum(boosted(g, 0.9) for g in grams)
    values = np.linalg.eigvalsh(system / np.sqrt(np.outer(np.diag(system), np.diag(system))))
    assert float(report["ridge_ratio"]) <= 1.01 * values[0] / values[-1]


def test_unused_inputs_get_the_mean():
    deltas, grams = problem()
    for gram in grams:
        gram[[2, 5]] = gram[:, [2, 5]] = 0
    result, report = solved(regmean(), deltas, grams)
    close(result[:, [2, 5]], np.mean(deltas, axis=0)[:, [2, 5]])
    rest = [0, 1, 3, 4, 6, 7, 8]
    reference = regmean_reference([d[:, rest] for d in deltas], [g[np.ix_(rest, rest)] for g in grams], 0.9)
    close(result[:, rest], reference)
    assert noted(regmean(), report) == {"unused_inputs"}
    result, report = solved(regmean(), deltas, [0 * g for g in grams])
    close(result, np.mean(deltas, axis=0))


def test_a_failed_factorisation_is_told_and_defined():
    deltas, grams = problem(rank=1, experts=2)
    result, report = solved(regmean(1.0), deltas, grams)
    assert np.isfinite(result).all()
    assert "no_cholesky" in noted(regmean(), report)
    for gram in grams:  # what the inputs reach is fitted all the same
        assert np.linalg.norm((result - np.mean(deltas, axis=0)) @ gram) < 10 * np.linalg.norm(gram)


# --- LOT ----------------------------------------------------------------------------------------------------------


def test_lot_equals_the_formula():
    deltas, grams = problem(rank=2)
    weights = [1.0, 0.5, 2.0]
    gram = sum(w * g for w, g in zip(weights, grams, strict=True))
    cross = sum(w * d @ g for w, d, g in zip(weights, deltas, grams, strict=True))
    result, report = solved(lot(), deltas, grams, weights)
    close(result, cross @ np.linalg.pinv(gram, rcond=1e-10, hermitian=True))
    assert report["rank"] == 6
    assert noted(lot(), report) == {"cut"}
    close(merged(lot(), *problem()), merged(regmean(1.0), *problem()))


def test_lot_leaves_the_base_where_no_input_points():
    deltas, grams = problem(rank=2, experts=1)
    reached = grams[0] @ np.linalg.pinv(grams[0], rcond=1e-10)
    close(merged(lot(), deltas, grams), deltas[0] @ reached)
    assert np.all(merged(lot(), deltas, [0 * grams[0]]) == 0)
    assert solved(lot(0.999999), deltas, grams)[1]["rank"] == 1


def test_pseudo_inverse_and_its_derivative():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        half = jnp.asarray(rng.standard_normal((3, 7)))
        change = jnp.asarray(rng.standard_normal((3, 7)))

        def total(half):
            inverse, rank, least = linalg.pseudo_inverse(half.T @ half)
            return jnp.sum(jnp.sin(inverse)), (inverse, rank, least)

        (_, (inverse, rank, least)), gradient = jax.value_and_grad(total, has_aux=True)(half)
        close(inverse, np.linalg.pinv(half.T @ half, rcond=1e-10))
        values = np.linalg.svd(half)[1] ** 2
        assert int(rank) == 3
        assert float(least) == pytest.approx(values[-1] / values[0])
        difference = (total(half + 1e-6 * change)[0] - total(half - 1e-6 * change)[0]) / 2e-6
        np.testing.assert_allclose(jnp.sum(gradient * change), difference, rtol=1e-6)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*directions of the inputs were cut")
@pytest.mark.parametrize(("method", "rank"), [(regmean(), 1), (lot(), None), (lot(), 1), (fisher(), None)])
def test_jit_vmap_and_gradients(method, rank):
    deltas, moments = problem(experts=2, rank=rank, m=3, n=5)
    moments = fishers(shape=(3, 5), experts=2) if method.needs.moments == "fisher" else moments

    def merge(deltas, moments):
        return cfmerge.merge_tensor(jnp.zeros((3, 5)), list(deltas), method, moments=list(moments))

    deltas, moments = jnp.asarray(np.stack(deltas), jnp.float32), jnp.asarray(np.stack(moments), jnp.float32)
    plain = np.asarray(jax.jit(merge)(deltas, moments))
    batch = jax.vmap(merge)(jnp.stack([deltas, 2 * deltas]), jnp.stack([moments, moments]))
    np.testing.assert_allclose(batch[0], plain, atol=2e-3 * np.max(np.abs(plain)))
    gradients = jax.grad(lambda d, m: jnp.sum(merge(d, m) ** 2), (0, 1))(deltas, moments)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("scale", [1e-38, 1e-8, 1e8])
@pytest.mark.parametrize("method", [regmean(), lot(), fisher()])
def test_finite_in_finite_out(method, scale):
    deltas, moments = problem(rank=2)
    moments = fishers() if method.needs.moments == "fisher" else moments
    for factors in ((scale, 1), (1, scale)):
        single = [np.float32(factors[0] * d) for d in deltas], [np.float32(factors[1] * m) for m in moments]
        assert np.isfinite(method.solve(statistic_of(method, *single))[0]).all()


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (fisher, {"floor": -1.0}, "fisher: floor must not be negative"),
        (regmean, {"a": 1.5}, r"regmean: a must lie in \[0, 1\]"),
        (regmean, {"ridge": -0.1}, "regmean: ridge must not be negative"),
        (lot, {"cutoff": 2.0}, r"lot: cutoff must lie in \[0, 1\]"),
    ],
)
def test_bad_parameters(factory, options, message):
    with pytest.raises(CfmergeError, match=message):
        factory(**options)


@pytest.mark.parametrize("name", ["regmean", "lot", "fisher"])
def test_what_was_measured_is_needed(name):
    method = make(name)
    deltas, _ = problem()
    statistic = method.init(jnp.zeros((6, 9)))
    with pytest.raises(CfmergeError, match=f"{name}: an expert comes without its"):
        method.see(statistic, jnp.asarray(deltas[0], jnp.float32))
    with pytest.raises(CfmergeError, match=r"of shape \(3, 3\), expected"):
        method.see(statistic, jnp.asarray(deltas[0], jnp.float32), 1.0, Context(moment=jnp.zeros((3, 3))))
