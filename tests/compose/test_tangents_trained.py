"""Linearised fine-tuning: the loss is the formula, and what it finds is the least-squares solution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tangent_parts import X, base, component, network

import cfmerge
from cfmerge.compose.tangent_training import State, fit, loss, norm, start, step
from cfmerge.compose.tangents import Tangents, linearised

Y = jax.nn.one_hot(jnp.array([0, 1, 1, 0]), 2)


def test_the_loss_is_the_rescaled_square_loss_and_the_norm_that_is_not_squared():
    tangent = component(1)
    outputs = np.asarray(linearised(network, base(), tangent, X), np.float64)
    length = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in tangent.values()))
    want = np.mean((outputs - 5 * np.asarray(Y)) ** 2) + 0.01 * length
    assert loss(network, base(), tangent, X, Y, 5.0, 0.01) == pytest.approx(want, rel=1e-5)


def test_the_norm_has_a_gradient_at_zero_and_its_direction_elsewhere():
    zero = jax.grad(norm)({"a": jnp.zeros(3)})["a"]
    np.testing.assert_array_equal(zero, np.zeros(3))
    np.testing.assert_allclose(jax.grad(norm)({"a": jnp.array([3.0, 4.0])})["a"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_training_starts_from_zero_or_nearly_so_and_moves(value):
    tangent = start(base(), value=value)
    assert {float(leaf.ravel()[0]) for leaf in tangent.values()} == {np.float32(value)}
    optimiser = optax.adam(1e-2)
    state, first = step(network, optimiser, base(), State(tangent, optimiser.init(tangent)), X, Y, 3.0)
    assert first == pytest.approx(float(jnp.mean((network(base(), X) - 3 * Y) ** 2)), rel=1e-5)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3 for leaf in state.tangent.values())


def test_only_chosen_leaves_train():
    assert list(start(base())) == ["head/kernel", "hidden/bias", "hidden/kernel"]
    assert list(start(base(), "hidden/*")) == ["hidden/bias", "hidden/kernel"]
    assert list(start(base(), ["*/bias", "head/*"])) == ["head/kernel", "hidden/bias"]
    found = fit(network, base(), [(X, Y)], optax.adam(1e-2), trains="head/*")
    assert list(found) == ["head/kernel"]
    with pytest.raises(cfmerge.CfmergeError, match=r"'heads/\*' matches no leaf.*head/kernel"):
        start(base(), "heads/*")


def test_training_finds_the_least_squares_solution():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((40, 3)), jnp.float32)
    y = jax.nn.one_hot(jnp.arange(40) % 2, 2)
    found = fit(network, base(), [(x, y)] * 500, optax.sgd(1.0), trains="head/*", kappa=3.0, penalty=0.0)
    hidden = np.tanh(x @ base()["hidden"]["kernel"] + base()["hidden"]["bias"])
    want = np.linalg.lstsq(hidden, 3 * y - network(base(), x))[0]
    least = float(loss(network, base(), {"head/kernel": jnp.asarray(want)}, x, y, 3.0, 0.0))
    assert float(loss(network, base(), start(base(), "head/*"), x, y, 3.0)) > 2 * least
    assert float(loss(network, base(), found, x, y, 3.0, 0.0)) < 1.001 * least


def test_training_goes_on_from_a_tangent_and_what_it_gives_is_a_component():
    optimiser = optax.sgd(0.1)
    once = fit(network, base(), [(X, Y)] * 2, optimiser)
    again = fit(network, base(), [(X, Y)], optimiser, initial=fit(network, base(), [(X, Y)], optimiser))
    for leaf in once:
        np.testing.assert_allclose(again[leaf], once[leaf], rtol=1e-6)
    assert Tangents(base()).add("once", once).apply(network, X).shape == (4, 2)


def test_a_network_of_several_inputs_takes_them_as_a_tuple():
    def scaled(params, x, scale):
        return scale * network(params, x)

    assert loss(scaled, base(), component(1), (X, 2.0), Y) != loss(scaled, base(), component(1), (X, 1.0), Y)
