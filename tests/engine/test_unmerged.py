"""A recipe names the model whose integers, buffers and objects the output has."""

import json

import numpy as np
import pytest
from laid import laid
from safetensors.numpy import load_file

import cfmerge
from cfmerge.cli.texts import make_recipe
from cfmerge.errors import CfmergeError


def tensors(step: int) -> dict[str, np.ndarray]:
    return {
        "layer.weight": np.full((4, 3), float(step), np.float32),
        "updates": np.array([step, -step], np.int64),
        "flag": np.array([step > 1]),
        "attn.rotary_emb.inv_freq": np.full(4, 10.0 + step, np.float32),
    }


@pytest.fixture
def models(tmp_path):
    """`m0` (the base), `m1`, `m2`, and `m9`, which is none of the merge's."""
    for step in (0, 1, 2, 9):
        files = {"model.safetensors": tensors(step), "config.json": {"step": step}}
        laid(tmp_path / f"m{step}", files)
    return tmp_path


def merged(models, **options):
    result = cfmerge.merge(models / "m0", [models / "m1", models / "m2"], "average", output=models / "out", **options)
    return result, load_file(models / "out" / "model.safetensors")


@pytest.mark.parametrize(("named", "step"), [("base", 0), ("m2", 2), ("PATH", 9), ("m0", 0)])
def test_integers_and_buffers_are_those_of_the_named_model(models, named, step):
    """With its config beside them; what is merged is merged as ever."""
    unmerged = {"PATH": str(models / "m9"), "m0": str(models / "m0")}.get(named, named)
    result, out = merged(models, unmerged=unmerged)
    assert (out["layer.weight"] == 1.5).all()
    for name in ("updates", "flag", "attn.rotary_emb.inv_freq"):
        assert (out[name] == tensors(step)[name]).all(), name
        assert out[name].dtype == tensors(step)[name].dtype
    assert json.loads((models / "out" / "config.json").read_text()) == {"step": step}
    card = (models / "out" / "README.md").read_text()
    assert ("| unmerged |" in card) == (named == "PATH")
    assert result.plan.explicit_recipe.unmerged == unmerged


def test_without_the_key_integers_must_agree(models):
    with pytest.raises(CfmergeError, match=r"integers 'updates' .* differ from the base's"):
        merged(models)


def test_a_rule_keeps_the_bases(models):
    _, out = merged(models, unmerged="m2", rules=[{"match": "updates", "method": "keep-base"}])
    assert (out["updates"] == tensors(0)["updates"]).all()
    assert (out["flag"] == tensors(2)["flag"]).all()


def test_another_model_or_other_files_of_it_are_another_merge(models):
    """A run that goes on does not mix two."""
    plans = [
        cfmerge.plan(models / "m0", [models / "m1", models / "m2"], "average", unmerged=unmerged)
        for unmerged in ("base", "m2", str(models / "m9"))
    ]
    assert len({plan.digest for plan in plans}) == 3
    before = plans[2].digest
    laid(models / "m9", {"model.safetensors": tensors(8)})
    again = cfmerge.plan(models / "m0", [models / "m1", models / "m2"], "average", unmerged=str(models / "m9"))
    assert again.digest != before


def test_the_output_may_not_take_the_place_of_that_model(models, contents):
    before = contents(models / "m9")
    with pytest.raises(CfmergeError, match="m9"):
        cfmerge.merge(
            models / "m0", [models / "m1", models / "m2"], "average", unmerged=str(models / "m9"),
            output=models / "m9", overwrite=True,
        )  # fmt: skip
    assert contents(models / "m9") == before


WRONG = {
    "lacks": ({"updates": None}, ["lacks updates", "match=updates, method=keep-base"]),
    "shape": ({"updates": np.zeros(3, np.int64)}, ["'updates' is int64 (3,)", "int64 (2,)", "method=keep-base"]),
    "dtype": ({"updates": np.zeros(2, np.int32)}, ["'updates' is int32 (2,)", "int64 (2,)", "method=keep-base"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_does_not_fit_is_refused(models, wrong):
    """By name, with the rule that keeps the base's tensor; the rule helps."""
    change, words = WRONG[wrong]
    other = {name: array for name, array in {**tensors(9), **change}.items() if array is not None}
    path = laid(models / "odd", {"model.safetensors": other})
    with pytest.raises(CfmergeError) as caught:
        merged(models, unmerged=str(path))
    assert all(word in str(caught.value) for word in (*words, str(path))), str(caught.value)
    _, out = merged(models, unmerged=str(path), rules=[{"match": "updates", "method": "keep-base"}])
    assert (out["updates"] == tensors(0)["updates"]).all()
    assert (out["flag"] == tensors(9)["flag"]).all()


def test_a_model_that_is_not_there_is_refused(models):
    with pytest.raises(CfmergeError, match=r"unmerged: .*nowhere: no such file.*an expert's name, or the path"):
        merged(models, unmerged=str(models / "nowhere"))


def test_keys_that_do_not_go_together_are_refused(models):
    with pytest.raises(CfmergeError, match="unmerged: with `vocabulary`"):
        merged(models, unmerged="m2", vocabulary="union")
    recipe = cfmerge.Recipe(str(models / "m0"), [str(models / "m1")], "emr", unmerged="m1")
    with pytest.raises(CfmergeError, match="unmerged: a composed result"):
        cfmerge.compose.plan(recipe)


def test_the_command_line_says_it():
    assert make_recipe(None, {"base": "b", "experts": ["a"], "unmerged": "a"}).unmerged == "a"
