"""Recipes that come with cfmerge: named on the command line in place of a file, and what the published ones do."""

import numpy as np
import pytest

import cfmerge
from cfmerge.cli.recipes import recipes
from cfmerge.cli.texts import make_recipe
from cfmerge.errors import CfmergeError
from cfmerge.recipe import load
from cfmerge.recipe.shipped import names, shipped

LAYERS = ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj")
TABLES = ("wte", "wpe")
SHAPES = {  # one shape of matrices, not square: each is compiled
    **{f"{name}.weight": (16, 4) for name in (*LAYERS, *TABLES)},
    "h.0.attn.c_attn.bias": (4,),
}
CONFIG = {"model_type": "gpt2", "architectures": ["GPT2Model"], "n_layer": 1, "n_embd": 4, "n_head": 2}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, make_model):
    """A base without a head, and two experts with one: as GPT-2 and its classifiers lie on the hub."""
    root, generator = tmp_path_factory.mktemp("gpt2"), np.random.default_rng(0)

    def drawn(scale):
        return {name: scale * generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}

    base = drawn(1.0)
    make_model(root / "base", base, CONFIG)
    deltas = [drawn(0.1), drawn(0.12)]
    for number, delta in enumerate(deltas):
        tensors = {f"transformer.{name}": value + delta[name] for name, value in base.items()}
        tensors["score.weight"] = generator.standard_normal((2 + number, 4)).astype(np.float32)
        make_model(root / f"e{number}", tensors, CONFIG | {"architectures": ["GPT2ForSequenceClassification"]})
    return root, base, deltas


def test_gpt2_as_published_solves_the_stored_matrices(gpt2, tmp_path):
    """`as_published(D) == ace(D^T)^T`, tables of tokens and positions solved, the rest averaged, no head."""
    root, base, deltas = gpt2
    asked = {"base": str(root / "base"), "experts": [str(root / "e0"), str(root / "e1")]}
    recipe = make_recipe("ace-published-gpt2", asked)
    result = cfmerge.merge_recipe(recipe, tmp_path / "out")
    merged = cfmerge.open(tmp_path / "out")
    assert merged.keys() == base.keys()
    solved = {name for name, report in result.reports.items() if "gate" in report}
    assert solved == {f"{name}.weight" for name in (*LAYERS, *TABLES)}
    method = cfmerge.methods.ace(eps=0.04, zero_delta="keep")
    for name in ("h.0.attn.c_attn.weight", "wte.weight"):
        experts = [base[name] + delta[name] for delta in deltas]
        np.testing.assert_allclose(merged[name], cfmerge.merge_tensor(base[name], experts, method), atol=2e-5)
    bias = "h.0.attn.c_attn.bias"
    np.testing.assert_allclose(merged[bias], base[bias] + (deltas[0][bias] + deltas[1][bias]) / 2, atol=1e-6)


@pytest.mark.parametrize("name", names())
def test_each_says_all_but_base_and_experts(name):
    recipe = load(name)
    assert (recipe.base, recipe.experts) == ("", [])
    assert shipped(name).about.startswith("ACE-Merging as published")
    with pytest.raises(CfmergeError, match="no base and no experts: give --base and --expert"):
        make_recipe(name, {})


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ace-published-gpt2").write_text("base: mine\nexperts: [a, b]\n")
    assert load("ace-published-gpt2").base == "mine"


def test_options_are_put_over_it():
    recipe = make_recipe("ace-published-gpt2", {"base": "base", "experts": ["a", "b"], "parameters": ["eps=0.1"]})
    assert recipe.parameters == {"eps": "0.1", "tau": 0.3, "k_frac": 0.3, "zero_delta": "keep"}


def test_a_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(CfmergeError, match="comes with cfmerge; did you mean 'ace-published-gpt2'"):
        load("ace-publishd-gpt2")
    with pytest.raises(CfmergeError, match="unknown recipe 'clip'"):
        shipped("clip")


def test_they_are_listed(capsys):
    recipes()
    told = capsys.readouterr().out
    assert all(name in told for name in names())
    recipes("ace-published-clip")
    assert "eps: 1.0e-5" in capsys.readouterr().out
