"""The public least squares: one layer or a batch, against the methods that solve the same, and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from least_squares_parts import close, problem, ridged, sums

import cfmerge
from cfmerge import CfmergeError, covariance, least_squares, methods

WEIGHTS = [1.0, 0.5, 2.0]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def gather(deltas, estimate, weights=None, rows=False):
    """The sums, with `estimate(delta)` as each covariance."""
    found = least_squares.init(jnp.asarray(deltas[0]), rows=rows)
    for delta, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True):
        found = least_squares.add(found, jnp.asarray(delta), estimate(jnp.asarray(delta)), weight)
    return found


def measured(n, experts=3, seed=7):
    """Full-rank input covariances."""
    samples = np.random.default_rng(seed).standard_normal((experts, 4 * n, n))
    return np.swapaxes(samples, 1, 2) @ samples / (4 * n)


def by_method(deltas, method, **options):
    base = np.zeros_like(deltas[0])
    return np.asarray(cfmerge.merge_tensor(base, deltas, method, **options))


@pytest.mark.parametrize("rows", [False, True])
def test_the_pseudo_inverse_of_the_deltas_grams_is_actmat(rows):
    deltas = problem(m=3, n=12)
    merged, _ = least_squares.solve(gather(deltas, covariance.of_delta, WEIGHTS, rows))
    close(merged, by_method(deltas, methods.actmat(), weights=WEIGHTS), 1e-8)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("anchor", ["zero", "mean", "sum"])
def test_a_ridge_to_an_anchor_over_grams_of_unit_trace_is_anchored(rows, anchor):
    deltas = problem(m=3, n=12)
    found = gather(deltas, lambda delta: covariance.unit_trace(covariance.of_delta(delta)), WEIGHTS, rows)
    merged, report = least_squares.solve(found, 0.1, anchor)
    close(merged, by_method(deltas, methods.anchored(ridge=0.1, anchor=anchor), weights=WEIGHTS))
    assert 0 < float(report["ridge_ratio"]) < 1
    assert not report["no_cholesky"]


@pytest.mark.parametrize(
    ("estimate", "method"),
    [
        (lambda d: covariance.unit_trace(covariance.of_power(d, 0.5)), lambda: methods.power(0.5, 0.25)),
        (lambda d: covariance.of_largest(d, 0.5), lambda: methods.tact(0.5)),
    ],
    ids=["power", "tact"],
)
def test_other_estimates_are_those_of_their_methods(estimate, method):
    deltas = problem(m=5, n=8)
    found = gather(deltas, estimate)
    options = {"ridge": 0.25, "anchor": "mean"} if method().name == "power" else {}
    close(least_squares.solve(found, **options)[0], by_method(deltas, method()), 1e-8)


@pytest.mark.parametrize(("a", "ridge"), [(0.9, 0.0), (1.0, 0.2)])
def test_covariances_that_were_measured_give_regmean(a, ridge):
    deltas, grams = problem(m=5, n=8), measured(8)
    found = least_squares.init(deltas[0])
    for delta, gram, weight in zip(deltas, grams, WEIGHTS, strict=True):
        found = least_squares.add(found, delta, covariance.boosted_diagonal(jnp.asarray(gram), a), weight)
    merged, _ = least_squares.solve(found, ridge, "mean")
    close(merged, by_method(deltas, methods.regmean(a, ridge), moments=list(grams), weights=WEIGHTS), 1e-10)


@pytest.mark.parametrize("rows", [False, True])
def test_centred_estimates_give_the_homogeneous_branch_of_ace_but_for_its_prior(rows):
    """ACE's right side is the centred deltas; `1 c`, a matrix of rank one, is added to its system."""
    deltas = problem(m=3, n=12)
    centred = [np.asarray(covariance.centred(jnp.asarray(delta))) for delta in deltas]
    found = gather(centred, covariance.of_delta, rows=rows)
    x_0 = np.asarray(least_squares.solve(found, 0.07, "mean")[0])

    gram = sum(d.T @ d for d in centred)
    n, lam = len(gram), 0.07 * np.trace(gram) / len(gram)
    row = np.linalg.solve(gram + lam * np.eye(n), gram.mean(axis=0))  # c M^-1
    merged = x_0 - np.outer(x_0.sum(axis=1), row) / (1 + row.sum())
    close(merged, by_method(deltas, methods.ace(tau=np.inf)), 1e-9)
    # and the estimate by name is the Gram of the centred rows
    close(covariance.dense(covariance.of_centred(jnp.asarray(deltas[0]))), centred[0].T @ centred[0])


def test_a_covariance_of_ones_own_against_numpy():
    deltas, own = problem(m=4, n=6), measured(6)
    found = least_squares.init(deltas[0])
    for delta, sigma, weight in zip(deltas, own, WEIGHTS, strict=True):
        found = least_squares.add(found, delta, sigma, weight)
    gram, cross, total = sums(deltas, own, WEIGHTS)
    anchor = np.random.default_rng(1).standard_normal((4, 6))
    for target, given in ((anchor, anchor), (total, "sum"), (total / sum(WEIGHTS), "mean"), (0 * total, "zero")):
        close(least_squares.solve(found, 0.3, given)[0], ridged(gram, cross, 0.3, target))
    close(least_squares.solve(found)[0], cross @ np.linalg.inv(gram))
    curvature = sum(w * np.trace(d @ s @ d.T) for w, d, s in zip(WEIGHTS, deltas, own, strict=True))
    close(found.experts.kappa, curvature)


@pytest.mark.parametrize("rows", [False, True])
def test_sums_are_joined_and_forgotten(rows):
    deltas = problem(m=3, n=12)
    parts = [
        gather([delta], covariance.of_delta, [weight], rows) for delta, weight in zip(deltas, WEIGHTS, strict=True)
    ]
    whole = gather(deltas, covariance.of_delta, WEIGHTS, rows)
    joined = least_squares.join(least_squares.join(parts[0], parts[1]), parts[2])
    close(least_squares.solve(joined, 0.1)[0], least_squares.solve(whole, 0.1)[0])
    mixed = least_squares.join(least_squares.full(parts[0]), least_squares.join(parts[1], parts[2]))
    close(least_squares.solve(mixed, 0.1)[0], least_squares.solve(whole, 0.1)[0])
    left = least_squares.forget(whole, parts[1])
    expected = gather([deltas[0], deltas[2]], covariance.of_delta, [1.0, 2.0])
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    again = least_squares.add(least_squares.full(whole), deltas[1], covariance.of_delta(jnp.asarray(deltas[1])), -0.5)
    close(least_squares.solve(again, 0.1)[0], least_squares.solve(expected, 0.1)[0])


def merge(deltas, covariances, weights):
    """`(T, m, n)`, `(T, n, n)`, `(T,)`: the experts one after the other in a scan."""

    def step(found, expert):
        return least_squares.add(found, *expert), None

    found, _ = jax.lax.scan(step, least_squares.init(deltas[0]), (deltas, covariances, weights))
    return least_squares.solve(found, 0.1, "mean")[0]


def test_a_batch_of_layers_under_vmap_and_jit():
    layers = [(jnp.asarray(problem(seed, m=4, n=5)), jnp.asarray(measured(5, seed=seed))) for seed in range(3)]
    weights = jnp.asarray(WEIGHTS)
    deltas, covariances = (jnp.stack(parts) for parts in zip(*layers, strict=True))
    together = jax.jit(jax.vmap(merge, in_axes=(0, 0, None)))(deltas, covariances, weights)
    for merged, (own, sigma) in zip(together, layers, strict=True):
        gram, cross, total = sums(list(own), list(sigma), WEIGHTS)
        close(merged, ridged(gram, cross, 0.1, total / sum(WEIGHTS)))


def test_derivatives_are_those_of_the_solution():
    deltas, covariances = jnp.asarray(problem(m=3, n=4)), jnp.asarray(measured(4))
    weights = jnp.asarray(WEIGHTS)

    def loss(deltas, covariances, weights):
        return jnp.sum(merge(deltas, covariances, weights) ** 2)

    def plain(deltas, covariances, weights):
        gram = jnp.einsum("t,tij->ij", weights, covariances)
        anchor = jnp.einsum("t,tij->ij", weights, deltas) / jnp.sum(weights)
        cross = jnp.einsum("t,tmi,tij->mj", weights, deltas, covariances)
        system = gram + 0.1 * jnp.trace(gram) / 4 * jnp.eye(4)
        return jnp.sum((anchor + (cross - anchor @ gram) @ jnp.linalg.inv(system)) ** 2)

    got = jax.grad(loss, (0, 1, 2))(deltas, covariances, weights)
    for a, b in zip(got, jax.grad(plain, (0, 1, 2))(deltas, covariances, weights), strict=True):
        close(a, b, 1e-8)

    def of_estimate(delta):  # through the estimate and the pseudo-inverse as well
        found = least_squares.add(least_squares.init(delta), delta, covariance.of_centred(delta))
        return jnp.sum(least_squares.solve(found)[0] ** 2)

    gradient = jax.grad(of_estimate)(deltas[0])
    step = 1e-6 * np.random.default_rng(0).standard_normal(deltas[0].shape)
    change = of_estimate(deltas[0] + step) - of_estimate(deltas[0] - step)
    assert float(change) == pytest.approx(2 * float(jnp.sum(gradient * step)), rel=1e-4)


def test_experts_that_did_not_move_give_the_anchor():
    zero = np.zeros((3, 4))
    found = gather([zero, zero], covariance.of_delta)
    anchor = np.ones((3, 4))
    for ridge in (None, 0.0, 0.1):
        merged, report = least_squares.solve(found, ridge, anchor)
        np.testing.assert_array_equal(merged, anchor)
        assert not report["no_cholesky"]
    assert float(least_squares.solve(found, 0.1)[1]["growth"]) == 0


def test_growth_is_one_for_unrelated_deltas_that_are_summed():
    deltas = [10 * np.eye(1, 40, t) for t in range(4)]
    report = least_squares.solve(gather(deltas, covariance.of_delta), 1e-9)[1]
    assert float(report["growth"]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda found: least_squares.add(found, np.zeros((3, 5)), np.eye(4)), ["delta", "(3, 5)", "(3, 4)"]),
        (lambda found: least_squares.add(found, np.zeros((3, 4)), np.eye(3)), ["covariance", "(3, 3)", "(4, 4)"]),
        (
            lambda found: least_squares.add(found, np.zeros((3, 4)), covariance.Estimate(jnp.zeros((2, 5)))),
            ["covariance", "(2, 5)", "(any, 4)"],
        ),
        (lambda found: least_squares.solve(found, -0.1), ["ridge", "-0.1"]),
        (
            lambda found: least_squares.add(least_squares.init(found.total, rows=True), found.total, jnp.eye(4)),
            ["rows", "init(base)"],
        ),
        (
            lambda found: least_squares.add(
                least_squares.init(found.total, rows=True), found.total, covariance.of_delta(found.total), -1.0
            ),
            ["forgotten", "init(base)"],
        ),
        (lambda found: least_squares.solve(least_squares.init(found.total, rows=True), 0.1), ["no experts"]),
    ],
)
def test_errors_say_what_was_expected_and_found(call, words):
    with pytest.raises(CfmergeError) as caught:
        call(least_squares.init(jnp.zeros((3, 4))))
    for word in words:
        assert word in str(caught.value)
