"""The examples in the docstrings of public names run, and print what they say."""

import doctest
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge

ROOMS = ("linalg", "covariance", "least_squares")  # modules all of whose functions and classes are public
OF_ROOMS = [
    f"{room}.{name}"
    for room in ROOMS
    for name, found in vars(getattr(cfmerge, room)).items()
    if not name.startswith("_")
    and callable(found)
    and getattr(found, "__module__", "").startswith(f"cfmerge.{room}")
    and not isinstance(found, types.ModuleType)
]
EXPECTED = [*OF_ROOMS, "methods.gcv", "methods.ridge_path"]  # public names that have an example
INNER = {  # of the modules above, the parts of what is public
    "least_squares.Grams", "least_squares.Rows", "least_squares.Sums", "least_squares.anchor_of",
    "least_squares.growth", "least_squares.stacked",
}  # fmt: skip


def docstring(name: str) -> str:
    found = cfmerge
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.getdoc(found) or ""


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in INNER])
def test_an_example_runs(name, tmp_path, monkeypatch):
    """In an empty directory; it sees `jax`, `jnp`, `np`, `cfmerge` and its public modules."""
    monkeypatch.chdir(tmp_path)
    rooms = {room: getattr(cfmerge, room) for room in (*ROOMS, "methods")}
    known = {"jax": jax, "jnp": jnp, "np": np, "cfmerge": cfmerge, **rooms}
    test = doctest.DocTestParser().get_doctest(docstring(name), known, name, None, 0)
    assert test.examples, f"{name} has no example in its docstring"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=told.append).failed == 0, "".join(told)


def test_every_function_of_the_public_modules_is_among_them():
    assert INNER.issubset(EXPECTED)
    for name in ("linalg.gram", "linalg.leading", "covariance.of_delta", "least_squares.solve"):
        assert name in EXPECTED
