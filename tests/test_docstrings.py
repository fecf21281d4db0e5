"""The examples in the docstrings of public names run, and print what they say."""

import doctest
import inspect
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge.core import registry

ROOMS = (
    "linalg",
    "covariance",
    "least_squares",
    "align",
    "compose",
    "temporal",
)  # modules all of whose functions and classes are public
OF_ROOMS = [
    f"{room}.{name}"
    for room in ROOMS
    for name, found in vars(getattr(cfmerge, room)).items()
    if not name.startswith("_")
    and callable(found)
    and getattr(found, "__module__", "").startswith(f"cfmerge.{room}")
    and not isinstance(found, types.ModuleType)
]
PUBLIC = [
    name
    for name in cfmerge.__all__
    if name != "__version__" and not isinstance(getattr(cfmerge, name), types.ModuleType)
]
OF_METHODS = (  # what methods of one's own are written with
    "make", "register", "registry", "chain", "from_deltas", "draws", "Method", "Transform", "Needs", "Survey",
    "Measure", "gcv", "ridge_path", "merge_factors",
)  # fmt: skip
EXPECTED = [*PUBLIC, *OF_ROOMS, *(f"methods.{name}" for name in OF_METHODS)]  # public names that have an example
INNER = {  # of the modules above, the parts of what is public
    "least_squares.Grams", "least_squares.Rows", "least_squares.Sums", "least_squares.anchor_of",
    "least_squares.growth", "least_squares.stacked",
}  # fmt: skip


def docstring(name: str) -> str:
    found = cfmerge
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.getdoc(found) or ""


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model):
    """Two layers of shape (4, 3): `base`, two experts `math` and `code`, and `renamed`, an expert with other names."""
    folder = tmp_path_factory.mktemp("models")
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    for name, step, layer in (
        ("base", 0, "layer"),
        ("math", 1, "layer"),
        ("code", 3, "layer"),
        ("renamed", 5, "dense"),
    ):
        noise = step * np.random.default_rng(step).standard_normal((4, 3)).astype(np.float32)
        bias = np.full(4, step, np.float32)
        make_model(folder / name, {f"{layer}.weight": weight + noise, f"{layer}.bias": bias}, config={})
    return folder


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in INNER])
def test_an_example_runs(name, models, tmp_path, monkeypatch):
    """Beside the models; it sees `jax`, `jnp`, `np`, `cfmerge` and its public modules."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # an example may register a method
    rooms = {room: getattr(cfmerge, room) for room in (*ROOMS, "methods")}
    known = {"__name__": name, "jax": jax, "jnp": jnp, "np": np, "cfmerge": cfmerge, **rooms}
    test = doctest.DocTestParser().get_doctest(docstring(name), known, name, None, 0)
    assert test.examples, f"{name} has no example in its docstring"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=told.append).failed == 0, "".join(told)


def test_every_public_name_is_among_them():
    assert INNER.issubset(EXPECTED)
    for name in (
        "merge",
        "plan",
        "Recipe",
        "Statistics",
        "linalg.gram",
        "linalg.leading",
        "covariance.of_delta",
        "least_squares.solve",
    ):
        assert name in EXPECTED
