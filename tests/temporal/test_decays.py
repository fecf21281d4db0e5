"""Decays of the learning rate as weights of checkpoints."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfmerge.errors import CfmergeError
from cfmerge.temporal.decays import coefficients, decay_weights

SHAPES = ("linear", "cosine", "inverse-sqrt", "ema=0", "ema=0.3", "ema=0.97")


@given(st.lists(st.floats(0, 1), max_size=12), st.integers(0, 99))
def test_decayed_updates_are_a_weighted_mean_of_checkpoints(factors, seed):
    """theta_0 + sum_i w_i g_i = sum_j c_j theta_j, for any decay."""
    w = np.sort(factors)[::-1]
    theta = np.random.default_rng(seed).standard_normal((len(w) + 1, 4))
    c = coefficients(w)
    decayed = theta[0] + sum((w[i] * (theta[i + 1] - theta[i]) for i in range(len(w))), np.zeros(4))
    np.testing.assert_allclose(c @ theta, decayed, rtol=0, atol=1e-12)
    assert c.sum() == pytest.approx(1, abs=1e-12)
    assert (c >= 0).all()


@pytest.mark.parametrize("k", range(9))
def test_a_linear_decay_is_the_uniform_mean(k):
    np.testing.assert_allclose(coefficients(decay_weights("linear", k)), np.full(k + 1, 1 / (k + 1)), rtol=1e-13)


@pytest.mark.parametrize("decay", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 2, 7])
def test_shapes_fall_from_one_to_zero(decay, k):
    w = decay_weights(decay, k)
    assert w.shape == (k,)
    assert w.dtype == np.float64
    assert (np.diff(np.concatenate([[1.0], w, [0.0]])) <= 0).all()
    assert coefficients(w).sum() == pytest.approx(1, abs=1e-14)
    if k == 0:
        assert coefficients(w).tolist() == [1.0]


def test_shapes_at_a_quarter():
    """Of a window of four steps: x = 1/4, 1/2, 3/4."""
    np.testing.assert_allclose(decay_weights("cosine", 3), (1 + np.cos(np.pi * np.array([1, 2, 3]) / 4)) / 2)
    np.testing.assert_allclose(decay_weights("inverse-sqrt", 3), [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])


@pytest.mark.parametrize("d", [0.0, 0.25, 0.9])
def test_an_ema_is_its_recursion(d):
    """r <- d r + (1 - d) theta, begun at the first checkpoint of the window."""
    theta = np.random.default_rng(0).standard_normal((6, 3))
    running = theta[0]
    for one in theta[1:]:
        running = d * running + (1 - d) * one
    np.testing.assert_allclose(coefficients(decay_weights(f"ema={d}", 5)) @ theta, running, rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", ["ema", "ema=", "ema=1", "ema=-0.1", "ema=nan", "ema=x"])
def test_an_ema_needs_its_factor(decay):
    with pytest.raises(CfmergeError, match=r"expected ema=D with 0 <= D < 1, such as ema=0\.9"):
        decay_weights(decay, 3)


def test_an_unknown_shape_is_named_with_the_nearest():
    with pytest.raises(CfmergeError, match="decay 'cosin' is not known; did you mean 'cosine'"):
        decay_weights("cosin", 3)
    with pytest.raises(CfmergeError, match="decay 'linear=2' is not known"):
        decay_weights("linear=2", 3)


@pytest.mark.parametrize("wrong", [[0.2, 0.4], [1.2], [-0.1], [np.nan]])
def test_what_is_no_decay_is_refused(wrong):
    with pytest.raises(CfmergeError, match="a decay falls from 1 to 0"):
        coefficients(np.array(wrong))
