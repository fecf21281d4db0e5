"""Small checks that the tests of core share."""

import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError

BASE = jnp.zeros((4, 3))


def merged(method, deltas, **options):
    """The merged delta over a base of zeros."""
    return np.asarray(cfmerge.merge_tensor(BASE, deltas, method, **options))


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def fails(words, function, *arguments, **options):
    """The call raises an error that says all the words."""
    with pytest.raises(CfmergeError) as caught:
        function(*arguments, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
