"""Shared by the tests of what methods are written in."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys


@pytest.fixture(scope="module")
def own():
    with toys.registered(toys.times, toys.deeper, toys.toward, toys.by_chance, toys.middle, toys.squares, toys.unit,
                         toys.restore) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def deltas():
    generator = np.random.default_rng(3)
    return [jnp.asarray(generator.standard_normal((4, 3)), jnp.float32) for _ in range(3)]
