"""Experts of another base, and experts that are nearly the same: told by the merge that reads them."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import cfmerge
from cfmerge.engine.sampling import ENTRIES, Sampler
from cfmerge.models import Kind

SHAPE = (40, 24)


def normal(*seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def model(change=0.0, seed=0, foreign=()):
    """Four matrices, those in `foreign` unrelated to the base's; and a bias, which tells nothing."""
    tensors = {
        f"layers.{n}.weight": normal(100 + n if n in foreign else n) + np.float32(change) * normal(n, seed)
        for n in range(4)
    }
    return tensors | {"bias": np.full(SHAPE[0], 5.0 * seed, np.float32)}


BASE = model()
OWN = {"one": model(0.05, 1), "two": model(0.05, 2)}


def merged(tmp_path, experts, method="average", **options):
    for name, tensors in {"base": BASE, **experts}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    paths = {name: tmp_path / name for name in experts}
    return cfmerge.merge(tmp_path / "base", paths, method, output=tmp_path / "out", **options)


@pytest.mark.parametrize("method", ["average", "ace", "tsv_m"])
def test_experts_of_the_base_that_differ_are_not_told_of(tmp_path, method):
    result = merged(tmp_path, OWN, method)
    assert result.warnings == ()
    assert not any("same" in note for note in result.notes)


@pytest.mark.parametrize("method", ["average", "ace", "tsv_m"])
def test_an_expert_of_another_base_is_warned_of(tmp_path, method):
    result = merged(tmp_path, {**OWN, "stranger": model(0.05, 3, foreign=(0, 1, 2))}, method)
    assert "expert 'stranger' does not seem to come from this base: 3 of 4 matrices" in result.warnings[0]
    assert "expert 'stranger' does not seem" in (tmp_path / "out" / "README.md").read_text()


def test_an_expert_with_some_matrices_of_its_own_is_not_foreign(tmp_path):
    assert merged(tmp_path, {**OWN, "third": model(0.05, 3, foreign=(0, 1))}).warnings == ()


def test_foreign_experts_may_be_allowed(tmp_path):
    experts = {**OWN, "stranger": model(0.05, 3, foreign=(0, 1, 2, 3))}
    assert merged(tmp_path, experts, allow=["other-base"]).warnings == ()


def twin(name, noise):
    tensors = {key: value.copy() for key, value in OWN[name].items()}
    for n in range(4):
        tensors[f"layers.{n}.weight"] += np.float32(noise) * normal(n, 9)
    return tensors


@pytest.mark.parametrize("method", ["average", "tsv_m"])
def test_experts_that_are_nearly_the_same_are_told_of(tmp_path, method):
    result = merged(tmp_path, {**OWN, "twin": twin("one", 0.002)}, method)
    assert [note for note in result.notes if "experts 'one' and 'twin' are nearly the same (cosine" in note]


def test_experts_that_only_point_the_same_way_are_not_told_of(tmp_path):
    longer = {key: BASE[key] + 1.5 * (value - BASE[key]) for key, value in OWN["one"].items()}
    result = merged(tmp_path, {**OWN, "longer": longer, "cousin": twin("two", 0.02)})
    assert not any("nearly the same" in note for note in result.notes)


def test_merges_in_memory_warn_too():
    with pytest.warns(UserWarning, match="expert 'stranger' does not seem to come from this base: 4 of 4 matrices"):
        cfmerge.merge_params(BASE, {**OWN, "stranger": model(0.05, 3, foreign=range(4))}, "average")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfmerge.merge_params(BASE, OWN, "average")


def test_a_delta_in_a_stack_of_layers_is_taken_as_one():
    """Of two tensors of three layers each, an expert gives the first whole, and of the second its delta."""
    segment = SimpleNamespace(job=SimpleNamespace(parameter=SimpleNamespace(kind=Kind.MATRIX)), entries=3 * 40 * 24)
    unit = SimpleNamespace(row=None, layers=range(3), segments=[segment] * 2, spans=[slice(0, 1), slice(1, 2)])
    base, delta = (np.stack([[normal(start + n, t) for n in range(3)] for t in range(2)]) for start in (0, 10))
    sampler = Sampler(unit, experts=1)
    sampler.base(base)
    sampler.expert(0, np.stack([base[0] + delta[0], delta[1]]), np.repeat([1.0, 0.0], 3))
    found = sampler.told()
    step = math.ceil(3 * 40 * 24 / ENTRIES) | 1
    np.testing.assert_allclose(found.gram, [[np.sum(delta.reshape(2, -1)[:, ::step].astype(float) ** 2)]], rtol=1e-5)
