"""Methods of one's own: in a file that a recipe names, or in an installed package with an entry point."""

import os
import subprocess
import sys

import numpy as np
import pytest
import toys

import cfmerge
from cfmerge.core import registry
from cfmerge.errors import CfmergeError
from cfmerge.planning import plugins
from cfmerge.recipe import load as load_recipe

PLUGIN = '''
from __future__ import annotations

import jax.numpy as jnp

from cfmerge.methods import Method, Needs, Number, Transform, register


@register
def plain_sum(factor: Number = 1.0) -> Method:
    """The sum of the deltas, times a number."""
    return Method("plain_sum", jnp.zeros_like, lambda s, delta, weight: s + weight * delta, lambda s: (factor * s, {}),
                  needs=Needs("entry"))


@register
def opposite() -> Transform:
    """The other way."""
    return Transform("opposite", jnp.negative)
'''


@pytest.fixture(autouse=True)
def clean():
    """What a test registers is forgotten; what was loaded once is loaded again."""
    with toys.registered():
        plugins._load_file.cache_clear()
        yield
    plugins._load_file.cache_clear()


@pytest.fixture
def family(make_model, tmp_path):
    return toys.small_family(make_model, tmp_path / "in")


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def expected(family, factor):
    base, *experts = family.tensors
    return {name: base[name] + factor * sum(expert[name] - base[name] for expert in experts) for name in base}


def close(found, expected):
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=2e-6)


def test_a_method_in_a_file(family, plugin, tmp_path, load):
    text = f"""
base: {family.base}
experts: [{", ".join(map(str, family.experts.values()))}]
method: opposite >> plain_sum(factor=0.5)
plugins: [{plugin}]
rules:
- match: "*norm*"
  method: plain_sum
"""
    (tmp_path / "recipe.yaml").write_text(text)
    result = cfmerge.merge_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    norms = {name: tensor for name, tensor in expected(family, 1).items() if "norm" in name}
    close(load(result.output), expected(family, -0.5) | norms)
    again = cfmerge.merge_recipe(load_recipe(result.output / "README.md"), tmp_path / "again")
    close(load(again.output), load(result.output))


def test_loaded_once(family, plugin, tmp_path):
    options = {"plugins": [str(plugin)]}
    cfmerge.merge(family.base, family.experts, "plain_sum", output=tmp_path / "one", **options)
    plugin.write_text("raise RuntimeError('again')")
    cfmerge.merge(family.base, family.experts, "plain_sum", output=tmp_path / "two", **options)
    cfmerge.sweep(family.base, family.experts, ["plain_sum", "average"], output=tmp_path / "three", **options)


def test_in_sweeps_and_statistics(family, plugin, tmp_path, load):
    """Without a merge before them, so that they load it themselves."""
    options = {"plugins": [str(plugin)]}
    found = cfmerge.sweep(
        family.base, family.experts, ["plain_sum", "plain_sum(factor=2)"], output=tmp_path / "sweep", **options
    )
    close(load(found["plain_sum(factor=2)"].output), expected(family, 2))


def test_accumulating_loads_it_too(family, plugin, tmp_path, load):
    kept = cfmerge.accumulate(family.base, family.experts, "plain_sum", output=tmp_path / "kept", plugins=[str(plugin)])
    for name in ("plain_sum", "opposite"):  # as in another process
        registry._REGISTRY.pop(name)
    plugins._load_file.cache_clear()
    result = cfmerge.solve(kept, family.base, output=tmp_path / "out", plugins=[str(plugin)])
    close(load(result.output), expected(family, 1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["mine.py", "no such file"]),
        ("1 / 0", ["mine.py", "ZeroDivisionError"]),
        ("def x(:", ["mine.py", "SyntaxError"]),
        ("import a_module_that_is_not_there", ["mine.py", "a_module_that_is_not_there"]),
        (PLUGIN.replace("plain_sum", "average"), ["mine.py", "there is a method 'average' already"]),
    ],
)
def test_files_that_fail(family, refused, tmp_path, content, words):
    """Each time anew, and nothing is written."""
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    for _ in range(2):
        refused(words, family.base, family.experts, "average", plugins=[str(tmp_path / "mine.py")])


def test_a_file_that_is_no_python(family, refused, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    refused(["mine.txt", "not a Python file"], family.base, family.experts, plugins=[str(tmp_path / "mine.txt")])


def test_two_files_of_one_name(family, plugin, tmp_path):
    """The second does not silently take the first one's place."""
    other = tmp_path / "other/mine.py"
    other.parent.mkdir()
    other.write_text(PLUGIN.replace("factor * s", "-factor * s"))
    cfmerge.merge(family.base, family.experts, "plain_sum", output=tmp_path / "one", plugins=[str(plugin)])
    with pytest.raises(CfmergeError, match="there is a method 'plain_sum' already"):
        cfmerge.merge(family.base, family.experts, "plain_sum", output=tmp_path / "two", plugins=[str(other)])


def test_entry_points(family, tmp_path, load):
    """Of a package that lies on the path: one that works, and one that does not."""
    for name, content in {"good": PLUGIN, "bad": "1 / 0"}.items():
        package, info = tmp_path / name, tmp_path / name / f"{name}_methods-1.0.dist-info"
        info.mkdir(parents=True)
        (package / f"{name}_methods.py").write_text(content)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-methods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cfmerge.methods]\nmine = {name}_methods\n")
    script = (
        "import sys, cfmerge\n"
        "try:\n"
        "    cfmerge.merge(sys.argv[1], sys.argv[3:], 'plain_sum(factor=2)', output=sys.argv[2])\n"
        "except cfmerge.CfmergeError as error:\n"
        "    sys.exit(str(error))\n"
    )
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", script, family.base, tmp_path / f"{name}-out", *family.experts.values()],
            env=os.environ | {"PYTHONPATH": str(tmp_path / name)}, stderr=subprocess.PIPE, text=True,
        )
        for name in ("good", "bad")
    }  # fmt: skip
    told = {name: process.communicate(timeout=300)[1] for name, process in running.items()}
    assert running["good"].returncode == 0, told["good"]
    close(load(tmp_path / "good-out"), expected(family, 2))
    assert running["bad"].returncode != 0
    assert "entry point 'mine' (bad_methods)" in told["bad"]
    assert "division by zero" in told["bad"]
    assert not (tmp_path / "bad-out").exists()
