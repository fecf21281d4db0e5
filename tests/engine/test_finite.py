"""Tensors of several experts that are not finite are told one by one, though they are looked at together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge.engine.steps import finite, finite_each


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_each_stack_and_tensor_has_its_flag(shape, dtype):
    plain = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    for bad, stack, tensor in itertools.product((np.nan, np.inf, -np.inf, None), range(2), range(3)):
        arrays = plain.copy()
        if bad is not None:
            arrays[(stack, tensor, *(-1 for _ in shape[1:]))] = bad
        stacks = [jnp.asarray(one, dtype) for one in arrays]
        expected = np.ones((2, 3), bool)
        expected[stack, tensor] = bad is None
        assert (np.asarray(finite_each(stacks)) == expected).all()
        assert (np.asarray(finite_each(stacks[:1])) == np.asarray(finite(stacks[0]))).all()


def test_under_a_transformation():
    stacks = jnp.stack([jnp.ones((2, 3, 4)), jnp.full((2, 3, 4), jnp.nan).at[:, 1:].set(0.0)])
    flags = jax.jit(jax.vmap(lambda a, b: finite_each([a, b])))(stacks[:, 0], stacks[:, 1])
    assert flags.tolist() == [[[True] * 3] * 2, [[False, True, True]] * 2]
