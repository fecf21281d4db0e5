"""Shared by the tests of methods."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(unoptimised):
    """All of them, where a file does not say otherwise."""
