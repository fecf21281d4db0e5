"""Shared by the tests of methods."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Code that is not optimised: compiling is most of the time that these tests take.

    They compare with NumPy and with the peers' numbers within tolerances. What asks for the same bits, and what works
    from end to end, is tested as users compile it.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
