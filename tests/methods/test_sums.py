"""Averages and task arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge import methods


def test_average_is_accumulated_in_float32():
    """The mean of 1 + i/128, i = 0..6, is 1.0234; summing in bfloat16 gives 1.0156."""
    base = jnp.ones((1,), jnp.bfloat16)
    experts = [jnp.full((1,), 1 + i / 128, jnp.bfloat16) for i in range(7)]
    merged = cfmerge.merge_tensor(base, experts, methods.average())
    assert float(merged[0]) == float(jnp.asarray(1 + 3 / 128, jnp.bfloat16))


def test_weights():
    experts = [np.full((2, 3), value, np.float32) for value in (1.0, 3.0)]
    base = np.zeros((2, 3), np.float32)
    assert np.all(cfmerge.merge_tensor(base, experts, methods.average(), weights=[3, 1]) == 1.5)
    assert np.all(cfmerge.merge_tensor(base, experts, methods.task_arithmetic(0.5), weights=[2, -1]) == -0.5)
    with pytest.raises(cfmerge.CfmergeError, match="sum to 0"):
        cfmerge.merge_tensor(base, experts, methods.average(), weights=[0, 0])


@pytest.mark.parametrize("method", [methods.average(), methods.task_arithmetic(1 / 3)])
def test_scale_one_over_t_is_the_average(method):
    rng = np.random.default_rng(0)
    base, *experts = (rng.standard_normal((4, 2, 3)).astype(np.float32) for _ in range(4))
    merged = cfmerge.merge_tensor(base, experts, method)
    np.testing.assert_allclose(merged, np.mean(experts, axis=0), atol=1e-6)


def test_scale_must_be_finite():
    with pytest.raises(cfmerge.CfmergeError, match="scale must be finite"):
        methods.task_arithmetic(float("nan"))
