"""Sums of full weights, Model Stock, interpolations on the sphere, and merges of a base with one expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check, check_states, load, names

import cfmerge
from cfmerge import linalg, methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import Context, Found

# --- the peers' own numbers ---------------------------------------------------------------------------------------


def golden_method(case):
    """Our method for a peer's case: its parameters under our names; no base: on the full weights."""
    params, library_method = case["params"], case["method"]
    on = "deltas" if "base" in load(case) else "weights"
    return {
        "mergekit.linear": lambda: methods.linear(params["normalize"]),
        "mergekit.task_arithmetic": lambda: methods.task_arithmetic(params["lambda"], params["normalize"]),
        "mergekit.slerp": lambda: methods.slerp(params["t"]),
        "mergekit.nuslerp": lambda: methods.nuslerp(params["nuslerp_flatten"], params["nuslerp_row_wise"], on),
        "mergekit.multislerp": lambda: methods.multislerp(params["normalize_weights"], on, params["eps"]),
        "mergekit.karcher": lambda: methods.karcher(params["max_iter"], params["tol"]),
        "mergekit.model_stock": lambda: methods.model_stock(params["filter_wise"]),
        "mergekit.nearswap": lambda: methods.nearswap(params["t"]),
        "mergekit.arcee_fusion": lambda: methods.arcee_fusion(),
        "fusion_bench.simple_average": lambda: methods.average(),
        "fusion_bench.weighted_average": lambda: methods.linear(params["normalize"]),
        "fusion_bench.task_arithmetic": lambda: methods.task_arithmetic(params["scaling_factor"]),
        "fusion_bench.model_stock": lambda: methods.model_stock(angle="degrees"),
        "fusion_bench.slerp": lambda: methods.slerp(params["t"], threshold=params["DOT_THRESHOLD"]),
        "fusion_bench.expo": lambda: methods.expo(params["extrapolation_factor"]),
    }[library_method]()


TENSORS = [
    name
    for name in names("mk_linear", "mk_task_arithmetic", "mk_slerp", "fb_slerp", "mk_nuslerp", "mk_multislerp",
                      "mk_karcher", "mk_model_stock", "mk_nearswap", "mk_arcee_fusion")
    if name != "mk_model_stock_negative_cos"
]  # fmt: skip
STATES = names("fb_simple_average", "fb_weighted_average", "fb_task_arithmetic", "fb_model_stock", "fb_expo")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_the_peers(name):
    case = CASES[name]
    check(case, golden_method(case), weights=case["params"].get("weight"))


@pytest.mark.parametrize("name", STATES)
def test_models_of_the_peers(name):
    case = CASES[name]
    check_states(case, golden_method(case), weights=case["params"].get("weights"))


def test_negative_cosines_of_the_peer():
    """It moves away from the experts; here the tensor stays at the base, and says so."""
    case = CASES["mk_model_stock_negative_cos"]
    check(case, methods.model_stock(clamp=False))
    arrays = load(case)
    deltas = [arrays[f"expert_{t}"] - arrays["base"] for t in range(3)]
    merged, told = solve(methods.model_stock(), deltas, arrays["base"])
    assert np.all(merged == 0)
    condition, message = methods.model_stock().notes["clamped"]
    assert condition(told["clamped"])
    assert "leaves them at the base" in message.format(value=told["clamped"])


# --- helpers ------------------------------------------------------------------------------------------------------


def solve(method, deltas, base=None, weights=None, dtype="float64"):
    """`X` and the report, of the method alone: nothing is rounded by adding the base."""
    with jax.enable_x64(dtype == "float64"):
        deltas = [jnp.asarray(delta, dtype) for delta in deltas]
        base = jnp.zeros_like(deltas[0]) if base is None else jnp.asarray(base, dtype)
        statistic = method.init(base)
        for number, (delta, weight) in enumerate(zip(deltas, weights or [1.0] * len(deltas), strict=True)):
            statistic = method.see(statistic, delta, jnp.asarray(weight, dtype), Context(number=number))
        merged, told = method.solve(statistic)
        return np.asarray(merged), {name: float(value) for name, value in told.items()}


def problem(experts=3, shape=(12, 10), scale=0.1, seed=0, shared=0.0):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    deltas = [scale * (shared * common + rng.standard_normal(shape)) for _ in range(experts)]
    return rng.standard_normal(shape), deltas


def close(got, expected, tolerance=1e-10):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def cosine(a, b):
    return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


def arc(v0, v1, t):
    """Shoemake's formula as it is written."""
    angle = np.arccos(cosine(v0, v1))
    return (np.sin((1 - t) * angle) * v0 + np.sin(t * angle) * v1) / np.sin(angle)


def logarithm(m, u):
    angle = np.arccos(np.clip(np.sum(m * u), -1, 1))
    return angle / np.sin(angle) * (u - np.cos(angle) * m)


def intrinsic_mean(tensors, weights, steps=200):
    """By logarithm and exponential map on whole tensors."""
    shares = np.asarray(weights) / np.sum(weights)
    units = [v / np.linalg.norm(v) for v in tensors]
    m = sum(p * u for p, u in zip(shares, units, strict=True))
    m /= np.linalg.norm(m)
    for _ in range(steps):
        tangent = sum(p * logarithm(m, u) for p, u in zip(shares, units, strict=True))
        length = np.linalg.norm(tangent)
        if length < 1e-14:
            break
        m = np.cos(length) * m + np.sin(length) / length * tangent
    return m * sum(p * np.linalg.norm(v) for p, v in zip(shares, tensors, strict=True))


# --- sums ---------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_sum_to_one_scale_the_base():
    base, deltas = problem(2)
    merged, _ = solve(methods.linear(False), deltas, base, [0.5, 0.4])
    close(base + merged, 0.5 * (base + deltas[0]) + 0.4 * (base + deltas[1]))
    normalised, _ = solve(methods.linear(), deltas, base, [0.5, 0.4])
    close(base + normalised, (base + merged) / 0.9)
    close(solve(methods.task_arithmetic(2.0, True), deltas, base, [3.0, 1.0])[0], 1.5 * deltas[0] + 0.5 * deltas[1])


@pytest.mark.parametrize(
    "method", [methods.linear(), methods.average(), methods.task_arithmetic(1.0, True), methods.multislerp()]
)
def test_weights_that_cancel_are_refused(method):
    """mergekit divides by their sum, and writes infinities."""
    base, deltas = problem(2)
    with pytest.raises(CfmergeError, match="sum to 0"):
        cfmerge.merge_tensor(base, [base + delta for delta in deltas], method, weights=[1, -1])
    assert np.isfinite(solve(method, deltas, base, [1.0, -1.0])[0]).all()


def test_an_expert_given_twice_counts_twice():
    """mergekit keeps one of the two: .5 instead of .8."""
    experts = [np.full((2, 2), value) for value in (1.0, 1.0, 0.0)]
    merged = cfmerge.merge_tensor(np.zeros((2, 2)), experts, methods.linear(), weights=[1, 3, 1])
    np.testing.assert_allclose(merged, 0.8, rtol=1e-6)


def ended(look, totals):
    """The findings that a look returns when it is sent the last totals."""
    with pytest.raises(StopIteration) as done:
        look.send(totals)
    return done.value.value


def test_metagpt_weighs_by_the_energy_of_the_whole_model():
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in {"a/kernel": (4, 3), "b/bias": (5,)}.items()}
    deltas = [{name: rng.standard_normal(b.shape) * (t + 1) for name, b in base.items()} for t in range(3)]
    energies = np.array([sum(np.sum(d**2) for d in delta.values()) for delta in deltas])
    shares = energies / energies.sum()
    expected = {name: sum(s * d[name] for s, d in zip(shares, deltas, strict=True)) for name in base}

    method = methods.metagpt()
    look = method.survey.look(0, [None] * 3)
    measure = next(look).of
    found = ended(look, sum(np.array([measure(jnp.asarray(d[name])) for d in deltas]) for name in base))
    np.testing.assert_allclose(found, shares, rtol=1e-6)
    informed = method.survey.informed(Found(found))
    for name in base:
        close(solve(informed, [d[name] for d in deltas])[0], expected[name], 1e-6)
    with jax.enable_x64(True):
        merged = cfmerge.merge_params(base, [{k: base[k] + d[k] for k in base} for d in deltas], method)
        for name in base:
            close(merged[name] - base[name], expected[name])


def test_metagpt_alone_weighs_by_the_energy_of_the_tensor():
    _, deltas = problem(3)
    energies = np.array([np.sum(d**2) for d in deltas])
    close(
        solve(methods.metagpt(), deltas)[0], sum(e * d for e, d in zip(energies, deltas, strict=True)) / sum(energies)
    )
    look = methods.metagpt().survey.look(0, [None] * 3)
    next(look)
    assert np.all(np.asarray(ended(look, np.zeros(3))) == 0)


# --- Model Stock --------------------------------------------------------------------------------------------------


def stock(deltas):
    """The formula, pair by pair."""
    count = len(deltas)
    pairs = [cosine(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    c = np.mean(pairs)
    return count * c / (1 + (count - 1) * c) * np.mean(deltas, axis=0)


@pytest.mark.parametrize("experts", [2, 5])
def test_model_stock_pair_by_pair(experts):
    _, deltas = problem(experts, shared=1.0)
    close(solve(methods.model_stock(), deltas)[0], stock(deltas))
    by_row = np.stack([stock([d[row] for d in deltas]) for row in range(12)])
    close(solve(methods.model_stock(filter_wise=True, clamp=False), deltas)[0], by_row, 1e-9)
    if experts == 2:
        close(solve(methods.model_stock(angle="degrees"), deltas)[0], stock(deltas))


def test_model_stock_goes_to_the_point_nearest_to_the_centre():
    """Experts at equal distances about a centre, in directions at right angles to it and to each other."""
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 5)))[0].T
    centre, deltas = 2 * directions[0], [2 * directions[0] + 3 * e for e in directions[1:]]
    merged, _ = solve(methods.model_stock(), deltas)
    mean = np.mean(deltas, axis=0)
    close(merged, np.dot(centre, mean) / np.dot(mean, mean) * mean)


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e8])
@pytest.mark.parametrize("options", [{}, {"angle": "degrees"}, {"filter_wise": True}])
def test_model_stock_has_no_floor_under_the_norms(scale, options):
    """mergekit takes two equal deltas of 64 entries of size 1e-5 for nearly orthogonal ones."""
    delta = np.full((8, 8), scale)
    merged, told = solve(methods.model_stock(**options), [delta, delta], dtype="float32")
    np.testing.assert_allclose(told["cosine"], 1, rtol=1e-6)
    np.testing.assert_allclose(merged, delta, rtol=1e-5)


def test_model_stock_of_opposite_deltas_stays_finite():
    """At the pole of the ratio."""
    _, (delta, _) = problem(2)
    for method in (methods.model_stock(), methods.model_stock(clamp=False)):
        merged, told = solve(method, [delta, -delta], dtype="float32")
        assert np.all(merged == 0)
        assert method.notes["clamped"][0](told["clamped"])


def test_model_stock_is_a_sum_over_experts():
    _, deltas = problem(4, shared=1.0)
    method = methods.model_stock(filter_wise=True)

    def seen(part, weight=1.0, start=None):
        statistic = method.init(jnp.zeros((12, 10))) if start is None else start
        for delta in part:
            statistic = method.update(statistic, jnp.asarray(delta, jnp.float32), weight)
        return statistic

    whole = method.solve(seen(deltas))[0]
    halves = jax.tree.map(jnp.add, seen(deltas[:2]), seen(deltas[2:]))
    np.testing.assert_allclose(method.solve(halves)[0], whole, atol=1e-6)
    forgotten = seen(deltas[3:], -1.0, seen(deltas))
    np.testing.assert_allclose(method.solve(forgotten)[0], method.solve(seen(deltas[:3]))[0], atol=1e-6)


# --- on the sphere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4])
def test_slerp_as_written(t):
    base, (a, b) = problem(2, scale=0.5)
    close(base + solve(methods.slerp(t), [a], base)[0], arc(base, base + a, t))
    close(base + solve(methods.slerp(t), [a, b], base)[0], arc(base + a, base + b, t))
    close(solve(methods.slerp(t, "deltas"), [a, b], base)[0], arc(a, b, t))
    close(solve(methods.nuslerp(), [a, b], base, [1 - t, t])[0], arc(a, b, t))


def test_slerp_is_linear_beyond_the_threshold():
    base, (a, b) = problem(2, scale=0.01)
    close(solve(methods.slerp(0.3), [a, b], base)[0], 0.7 * a + 0.3 * b)
    exact = arc(base + a, base + b, 0.3) - base
    close(solve(methods.slerp(0.3, threshold=1), [a, b], base)[0], exact)
    assert np.max(np.abs(exact - 0.7 * a - 0.3 * b)) > 1e-3 * np.max(np.abs(exact))


def test_nuslerp_by_rows_and_columns():
    base, (a, b) = problem(2, shape=(4, 3))
    rows = np.stack([arc(a[i], b[i], 0.25) for i in range(4)])
    close(solve(methods.nuslerp(flatten=False), [a, b], base, [3.0, 1.0])[0], rows)
    columns = np.stack([arc(a[:, j], b[:, j], 0.25) for j in range(3)], axis=1)
    close(solve(methods.nuslerp(False, True), [a, b], base, [3.0, 1.0])[0], columns)


@pytest.mark.parametrize("factor", [-1.0, -2.0, -3.0])
@pytest.mark.parametrize(
    "method", [methods.nuslerp(), methods.nuslerp(False), methods.slerp(0.5, "deltas"), methods.slerp(0.5, "deltas", 1)]
)
def test_opposite_tensors_are_interpolated_linearly(method, factor):
    """In float32 the sine of their angle is 1e-7, not 0: mergekit's nuslerp returns 1e7 times the weights."""
    _, (a,) = problem(1)
    merged, told = solve(method, [a, factor * a], dtype="float32")
    np.testing.assert_allclose(merged, (1 + factor) / 2 * a, atol=1e-6)
    assert method.notes["opposite"][0](told["opposite"])


def test_nuslerp_with_weights_that_cancel_goes_half_way():
    base, (a, b) = problem(2)
    merged, told = solve(methods.nuslerp(), [a, b], base, [1.0, -1.0])
    close(merged, arc(a, b, 0.5))
    assert told["weightless"]


@pytest.mark.parametrize("on", ["weights", "deltas"])
def test_multislerp_is_tangent_space_there_and_back(on):
    """mergekit's construction: project on the tangent space at the mean direction, sum, exponentiate."""
    base, deltas = problem(4)
    weights = np.array([1.0, 2.0, 0.5, 0.5])
    shares = weights / weights.sum()
    tensors = [base + d if on == "weights" else d for d in deltas]
    units = np.stack([v / np.linalg.norm(v) for v in tensors])
    mean = np.tensordot(shares, units, 1)
    mean /= np.linalg.norm(mean)
    tangent = sum(s * (u - np.sum(u * mean) * mean) for s, u in zip(shares, units, strict=True))
    length = np.linalg.norm(tangent)
    assert length < 1e-15
    expected = (np.cos(length) * mean + tangent) * sum(
        s * np.linalg.norm(v) for s, v in zip(shares, tensors, strict=True)
    )
    start = base if on == "weights" else 0
    close(start + solve(methods.multislerp(on=on), deltas, base, list(weights))[0], expected)
    twice, _ = solve(methods.multislerp(False, on), deltas, base, list(2 * shares))
    close(start + twice, 2 * expected)


def test_karcher_balances_its_logarithms():
    base, deltas = problem(4, scale=1.0, seed=3)
    tensors, weights = [base + d for d in deltas], [1.0, 2.0, 0.5, 1.0]
    merged, told = solve(methods.karcher(100, 1e-13), deltas, base, weights)
    m = (base + merged) / np.linalg.norm(base + merged)
    logarithms = [w * logarithm(m, v / np.linalg.norm(v)) for w, v in zip(weights, tensors, strict=True)]
    assert np.linalg.norm(sum(logarithms)) < 1e-12
    assert told["residual"] < 1e-12
    close(base + merged, intrinsic_mean(tensors, weights))
    mean, _ = solve(methods.multislerp(on="weights"), deltas, base, weights)
    assert np.max(np.abs(merged - mean)) > 1e-4  # the chordal mean is another one


def test_karcher_says_when_it_was_stopped():
    base, deltas = problem(3, scale=3.0)
    method = methods.karcher(1, 1e-9)
    _, told = solve(method, deltas, base)
    assert method.notes["unfinished"][0](told["unfinished"])
    assert told["residual"] > 1e-9


def test_karcher_with_the_base_as_one_more_model():
    base, deltas = problem(2, scale=0.5)
    zero = np.zeros_like(base)
    close(solve(methods.karcher(with_base=True), deltas, base)[0], solve(methods.karcher(), [zero, *deltas], base)[0])


@pytest.mark.parametrize(
    "method", [methods.multislerp(), methods.multislerp(on="weights"), methods.karcher(), methods.karcher(on="deltas")]
)
def test_opposite_directions_have_no_mean(method):
    """mergekit raises or returns NaN; here it is the weighted mean of the tensors, and a note."""
    _, (a,) = problem(1)
    merged, told = solve(method, [a, -3 * a], dtype="float32")
    np.testing.assert_allclose(merged, -a, atol=1e-6)
    assert method.notes["opposed"][0](told["opposed"])


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (methods.slerp(0.3, threshold=1), None),
        (methods.nuslerp(on="weights"), [0.7, 0.3]),
        (methods.nuslerp(flatten=False, on="weights"), [0.7, 0.3]),
        (methods.multislerp(on="weights"), [0.7, 0.3]),
        (methods.karcher(), [0.7, 0.3]),
    ],
    ids=["slerp", "nuslerp", "nuslerp-rows", "multislerp", "karcher"],
)
def test_float32_on_full_weights_resolves_small_deltas(method, weights):
    """Deltas of 1e-3 of the weights: cosines are 1 - 1e-6, of which float32 keeps a tenth; X must be right to 1e-5."""
    base, deltas = problem(2, shape=(64, 48), scale=1e-3)
    base, deltas = np.float32(base).astype(np.float64), [np.float32(d).astype(np.float64) for d in deltas]
    a, b = (base + d for d in deltas)
    if "flatten" in method.parameters and not method.parameters["flatten"]:
        expected = np.stack([arc(x, y, 0.3) for x, y in zip(a, b, strict=True)])
    elif method.name in ("slerp", "nuslerp"):
        expected = arc(a, b, 0.3)
    elif method.name == "karcher":
        expected = intrinsic_mean([a, b], weights)
    else:
        mean = 0.7 * a / np.linalg.norm(a) + 0.3 * b / np.linalg.norm(b)
        expected = mean / np.linalg.norm(mean) * (0.7 * np.linalg.norm(a) + 0.3 * np.linalg.norm(b))
    linear = 0.7 * deltas[0] + 0.3 * deltas[1]
    assert np.max(np.abs(expected - base - linear)) > 1e-4 * np.max(np.abs(linear))
    close(solve(method, deltas, base, weights, "float32")[0], expected - base, 1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_interpolations_are_homogeneous(scale):
    base, deltas = problem(2)
    for method in (methods.slerp(0.3), methods.nuslerp(), methods.multislerp(), methods.karcher()):
        merged, _ = solve(method, deltas, base, dtype="float32")
        scaled, _ = solve(method, [scale * d for d in deltas], scale * base, dtype="float32")
        close(scaled, scale * merged, 2e-6)


@pytest.mark.parametrize(
    "method", [methods.slerp(0.3), methods.karcher(2), methods.model_stock(angle="degrees", clamp=False)]
)
def test_derivatives_of_interpolations(method):
    base, deltas = problem(2, shape=(4, 3), scale=0.5)
    direction = problem(2, shape=(4, 3), seed=1)[1]
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def loss(deltas):
            statistic = method.init(jnp.asarray(base))
            for delta in deltas:
                statistic = method.update(statistic, delta, 1.0)
            return jnp.sum(method.solve(statistic)[0] ** 2)

        here, up, down = ([jnp.asarray(x + h * d) for x, d in zip(deltas, direction, strict=True)]
                          for h in (0, 1e-5, -1e-5))  # fmt: skip
        along = sum(float(jnp.sum(g * d)) for g, d in zip(loss(here)[1], direction, strict=True))
        np.testing.assert_allclose(along, (loss(up)[0] - loss(down)[0]) / 2e-5, rtol=1e-6)
        assert all(np.isfinite(g).all() for g in loss([here[0], here[0]])[1])


# --- one expert ---------------------------------------------------------------------------------------------------


def test_nearswap_clips_the_delta():
    """mergekit's form: `w = min(t / |D|, 1)`, `W_0 + w D`."""
    _, (delta,) = problem(1)
    weight = np.clip(0.05 / np.maximum(np.abs(delta), 1e-6), 0, 1)
    close(solve(methods.nearswap(0.05), [delta])[0], weight * delta)
    with pytest.raises(CfmergeError, match="nearswap: t must not be negative"):
        methods.nearswap(-1.0)


@pytest.mark.parametrize(
    ("scale", "dtype", "tolerance"), [(1e-4, "float32", 1e-5), (0.1, "float64", 1e-10), (3.0, "float64", 1e-10)]
)
def test_divergence_of_rows(scale, dtype, tolerance):
    """Against the definition in extended precision: for small deltas its terms cancel to second order."""
    from cfmerge.methods.pairs import row_divergence

    base, (delta,) = problem(1, scale=scale)
    base, delta = np.asarray(base, dtype), np.asarray(delta, dtype)
    wide, expert = base.astype(np.longdouble), base.astype(np.longdouble) + delta

    def log_softmax(x):
        return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))

    p, q = log_softmax(expert), log_softmax(wide)
    expected = np.sum(np.exp(p) * (p - q), axis=-1, keepdims=True)
    with jax.enable_x64(dtype == "float64"):
        got = row_divergence(jnp.asarray(base), jnp.asarray(delta))
    np.testing.assert_allclose(got, expected.astype(np.float64), rtol=tolerance)


def test_arcee_fusion_takes_exact_quantiles():
    base, (delta,) = problem(1, shape=(9, 7))
    merged, told = solve(methods.arcee_fusion(), [delta], base)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)

    p, q = softmax(base + delta), softmax(base)
    score = np.abs(delta) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    low, median, high = np.quantile(score, [0.25, 0.5, 0.75], method="lower")
    keep = score >= median + 1.5 * (high - low)
    assert 0 < keep.sum() < keep.size
    close(merged, np.where(keep, delta, 0))
    np.testing.assert_allclose(told["kept"], keep.mean())


def test_expo_goes_beyond_the_expert():
    _, (delta,) = problem(1)
    close(solve(methods.expo(), [delta])[0], 1.1 * delta)
    close(solve(methods.expo(0.0), [delta])[0], delta)
    with pytest.raises(CfmergeError, match="expo takes 1 expert, found 2"):
        cfmerge.merge_tensor(delta, [delta, delta], methods.expo())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.slerp(t=float("inf")), "slerp: t must be finite"),
        (lambda: methods.slerp(threshold=1.5), r"slerp: threshold must lie in \[0, 1\]"),
        (lambda: methods.karcher(-1), "karcher: max_iter must not be negative"),
        (lambda: methods.karcher(tol=-1.0), "karcher: tol must not be negative"),
        (lambda: methods.multislerp(eps=-1.0), "multislerp: eps must not be negative"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(CfmergeError, match=message):
        make()


def test_norms_do_not_overflow():
    for scale in (1e-30, 1.0, 1e30):
        x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]]) * scale
        np.testing.assert_allclose(linalg.norm(x, -1), [[5 * scale], [0]], rtol=1e-6)
        np.testing.assert_allclose(linalg.unit(x, -1), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.all(jax.grad(lambda x: linalg.norm(x).sum())(jnp.zeros((2, 2))) == 0)
    assert np.isfinite(linalg.unit(jnp.full((3,), 1e-42))).all()
