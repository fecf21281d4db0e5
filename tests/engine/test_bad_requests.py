"""Bad requests of good models: weights, words, outputs, memory and rules that cannot be.

As in test_bad_models.py, the message names what, where and the way out, and nothing is left on disk.
"""

import numpy as np
import pytest
import yaml
from bad_models import Q, spoil

import cfmerge
from cfmerge import Expert, Rule
from cfmerge.errors import CfmergeError
from cfmerge.recipe import load, parse, parse_size

# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, -1, 0), (0, 0, 0), (0.1, 0.2, -0.3)])
def test_weights_that_sum_to_nothing(family, refused, weights):
    """mergekit writes infinity and NaN; 0.1 + 0.2 - 0.3 is not 0 in floating-point."""
    experts = [Expert(str(path), weight=weight) for path, weight in zip(family.experts, weights, strict=True)]
    refused(["sum to 0", f"m1: {weights[0]}", f"m2: {weights[1]}"], family.base, experts)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(family, refused, weight):
    experts = [Expert(str(family.experts[0]), weight=weight), Expert(str(family.experts[1]))]
    refused([str(family.experts[0]), "weight", str(weight)], family.base, experts)


def test_negative_weight_with_ace(family, refused):
    experts = [Expert(str(family.experts[0]), weight=-1), *(Expert(str(path)) for path in family.experts[1:])]
    refused(["'m1'", "positive weights", "-1", "task_arithmetic"], family.base, experts, "ace")


# --- unknown words -----------------------------------------------------------------------------------------------


def test_unknown_method(family, refused):
    refused(["'averge'", "did you mean 'average'"], family.base, family.experts, "averge")
    refused(["'zzz'", "ace", "task_arithmetic"], family.base, family.experts, "zzz")


def test_unknown_parameter(family, refused):
    words = ["'task_arithmetic'", "'scael'", "did you mean 'scale'"]
    refused(words, family.base, family.experts, "task_arithmetic", parameters={"scael": 1})


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("task_arithmetic", {"scale": "much"}, ["'scale'", "'much'", "number"]),
        ("task_arithmetic", {"scale": [1]}, ["'scale'", "[1]"]),
        ("task_arithmetic", {"scale": float("nan")}, ["scale", "finite", "nan"]),
        ("ace", {"eps": -1}, ["eps", "positive", "-1"]),
        ("ace", {"k_frac": 1.5}, ["k_frac", "[0, 1]", "1.5"]),
        ("ace", {"gate": "papre"}, ["'gate'", "'papre'"]),
        ("ace", {"rank": 2.5}, ["'rank'", "2.5"]),
    ],
)
def test_bad_value_of_a_parameter(family, refused, method, parameters, words):
    refused(words, family.base, family.experts, method, parameters=parameters)


UNKNOWN_KEYS = {
    "recipe": ({"methdo": "ace"}, ["'methdo'", "did you mean 'method'"]),
    "expert": ({"experts": [{"path": "x", "wieght": 2}]}, ["'wieght'", "experts", "did you mean 'weight'"]),
    "rule": ({"rules": [{"match": "*", "metod": "skip"}]}, ["'metod'", "rules", "did you mean 'method'"]),
    "top-level option of other tools": ({"normalize": True}, ["'normalize'"]),
}


@pytest.mark.parametrize("place", UNKNOWN_KEYS)
def test_unknown_key(tmp_path, place):
    content, words = UNKNOWN_KEYS[place]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "b", "experts": ["x", "y"]} | content))
    with pytest.raises(CfmergeError) as caught:
        load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base": None}, ["base"]),
        ({"experts": "x"}, ["experts"]),
        ({"experts": [3]}, ["experts"]),
        ({"experts": [{"name": "x"}]}, ["path"]),
        ({"experts": [{"path": "x", "weight": "heavy"}]}, ["weight"]),
        ({"parameters": [1]}, ["parameters"]),
        ({"heads": "export-all"}, ["export-all", "heads"]),
        ({"on_nonfinite": "ignore"}, ["ignore", "on_nonfinite"]),
        ({"allow": ["everything"]}, ["everything", "allow"]),
        ({"dtype": "float8"}, ["float8", "dtype"]),
        ({"precision": "half"}, ["half", "precision"]),
        ({"rules": [{"method": "skip"}]}, ["match"]),
        ({"rules": [{"match": "*", "kind": "matrices"}]}, ["matrices", "kind"]),
    ],
)
def test_bad_value_in_a_recipe(content, words):
    with pytest.raises(CfmergeError) as caught:
        parse({"base": "b", "experts": ["x", "y"]} | content, "recipe.yaml")
    for word in ["recipe.yaml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("r.yaml", "a: [", "not valid YAML"),
        ("r.yaml", "- 1", "mapping"),
        ("r.yaml", "", "mapping"),
        ("README.md", "# A model", "no recipe"),
        ("r.yaml", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_broken_recipe_file(tmp_path, name, content, word):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CfmergeError, match=word) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "five", "-1", "0", "nan", "1.2.3GB", "5XB", "5 G B"])
def test_bad_size(text):
    with pytest.raises(CfmergeError, match="is not a size"):
        parse_size(text)


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "512MiB": 512 << 20, "1000": 1000, "1.5k": 1500, "2 GiB": 2 << 30, "7B": 7}
    assert {text: parse_size(text) for text in sizes} == sizes


# --- the output --------------------------------------------------------------------------------------------------


def test_output_exists(family, refused, make_model, tmp_path):
    make_model(tmp_path / "out")
    refused([str(tmp_path / "out"), "exists already", "--overwrite"], family.base, family.experts)


def test_output_is_a_file(family, refused, tmp_path):
    (tmp_path / "out").write_text("precious")
    for overwrite in (False, True):
        refused([str(tmp_path / "out"), "exists"], family.base, family.experts, overwrite=overwrite)


def test_output_is_an_empty_directory(family, tmp_path):
    (tmp_path / "out").mkdir()
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_overwrite(family, make_model, tmp_path, contents, llama):
    make_model(tmp_path / "out", {"old": np.ones(3, np.float32)}, shards=1)
    (tmp_path / "out/old.txt").write_text("old")
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out", overwrite=True)
    assert set(contents(tmp_path / "out")) == {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert set(cfmerge.open_checkpoint(tmp_path / "out").tensors) == set(llama())


def test_overwrite_of_what_is_no_model(family, refused, tmp_path):
    """A mistyped -o does not cost somebody their home directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    refused([str(tmp_path / "out"), "not overwritten"], family.base, family.experts, overwrite=True)


PLACES = {
    "the base": (lambda family: family.base, "holds an input"),
    "an expert": (lambda family: family.experts[1], "holds an input"),
    "around all inputs": (lambda family: family.base.parent, "holds an input"),
    "in the base": (lambda family: family.base / "merged", "lies in an input"),
    "deep in an expert": (lambda family: family.experts[2] / "a/b/c", "lies in an input"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_output_on_an_input(family, refused, place, overwrite):
    where, word = PLACES[place]
    output = where(family)
    refused([str(output), word], family.base, family.experts, output=output, overwrite=overwrite)


def test_output_is_a_base_of_links(family, refused, tmp_path):
    """The hub's cache holds links to files that lie elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in family.base.iterdir():
        (snapshot / file.name).symlink_to(file)
    words = [str(snapshot), "holds an input"]
    refused(words, snapshot, family.experts, output=snapshot, overwrite=True)


def test_output_is_a_link_to_the_base(family, refused, tmp_path):
    (tmp_path / "link").symlink_to(family.base)
    refused(["holds an input"], family.base, family.experts, output=tmp_path / "link", overwrite=True)


def test_new_parents_of_a_failed_output_do_not_stay(family, refused, tmp_path):
    spoil(family.experts[0], Q, np.nan)
    refused([repr(Q)], family.base, family.experts, output=tmp_path / "new/deep/out")


def test_unwritable_output(family, refused):
    words = ["/proc/none/out", "nothing was written"]
    refused(words, family.base, family.experts, output="/proc/none/out")


# --- memory ------------------------------------------------------------------------------------------------------


def test_not_enough_memory(family, refused):
    """Known from the headers: nothing is read. The named way out works."""
    spoil(family.experts[0], Q, np.nan)
    words = ["model.layers.0.mlp.down_proj.weight", "(8, 16)", "--memory", "method: average", "MiB"]
    refused(words, family.base, family.experts, "ace", memory=16_000)


def test_not_enough_memory_the_named_way_out(family, tmp_path):
    rules = [Rule("*.down_proj.weight", "average")]
    result = cfmerge.merge(family.base, family.experts, "ace", memory=16_000, rules=rules, output=tmp_path / "out")
    assert result.plan.counts()["matrix", "average"] == 2


def test_bad_memory(family, refused):
    refused(["'plenty'", "is not a size"], family.base, family.experts, memory="plenty")


# --- rules -------------------------------------------------------------------------------------------------------


def test_rule_that_matches_nothing(family, refused):
    words = ["'model.layer.*'", "no tensor", "names look like 'lm_head.weight'"]
    refused(words, family.base, family.experts, rules=[Rule("model.layer.*", "keep-base")])


def test_rule_behind_another(family, refused):
    rules = [Rule("model.*", "average"), Rule(Q, "keep-base")]
    refused([repr(Q), "earlier rule", "move it up"], family.base, family.experts, rules=rules)


def test_rule_with_an_unknown_method(family, refused):
    rules = [Rule(Q, "keep_base")]
    refused([repr(Q), "'keep_base'", "did you mean 'keep-base'"], family.base, family.experts, rules=rules)


def test_rule_with_parameters_for_nothing(family, refused):
    rules = [Rule(Q, "keep-base", {"scale": 1})]
    refused([repr(Q), "keep-base", "no parameters"], family.base, family.experts, rules=rules)


def test_nothing_to_merge(family, refused):
    refused(["nothing to merge"], family.base, family.experts, rules=[Rule("*", "keep-base")])
