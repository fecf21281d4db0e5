"""`cfmerge time`: one command for each stage, as a training script calls them."""

import json

import numpy as np
import pytest
from toys import small
from typer.testing import CliRunner

import cfmerge
from cfmerge import temporal
from cfmerge.cli import app

BASE, *TREES = [small(number) for number in range(4)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, tree in zip(("base", "e1", "e2", "e3"), (BASE, *TREES), strict=True):
        cfmerge.save(tree, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(*arguments, fails=False):
    """The output of a command; of one that fails the message of its error."""
    done = CliRunner().invoke(app, ["time", *map(str, arguments)])
    if fails:
        assert isinstance(done.exception, cfmerge.CfmergeError), done.output
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_the_stages_of_a_stream(folder):
    made = cli(
        "init", "S", "--base", "base", "--protocol", "best-in-time", "--weight", "0.5", "--task", "one", "--task",
        "two", "--held-out", "far", "-o", "start",
    )  # fmt: skip
    assert "start  from which the next task starts; the next is one" in made
    assert "no expert yet" in cli("plan", "S")
    cli("store", "S", "e1", "--task", "one")
    assert "each new expert is read once" in cli("plan", "S")
    told = json.loads(cli("deploy", "S", "-o", "served", "--json"))
    assert told == {
        "event": "done", "output": "served", "step": 1, "rule": "ema(weight=0.5)", "experts": ["one"],
    }  # fmt: skip
    expected = temporal.combined("ema(weight=0.5)", BASE, TREES[:1])
    for name, array in cfmerge.open("served").items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)
    cli("evaluate", "S", "-s", "one=0.9", "-s", "two=0.1", "--score", "far=0.5")
    (folder / "scores.csv").write_text("task,score\none,0.2\ntwo,0.2\nfar,0.6\n")
    cli("evaluate", "S", "scores.csv", "--step", "0")
    table = cli("report", "S", "-o", "report")
    assert "0.500" in table
    assert "0.200" in table
    assert {path.name for path in (folder / "report").iterdir()} == {"report.md", "report.json", "scores.png"}
    assert json.loads(cli("report", "S", "--json"))["rows"][1]["knowledge_accumulation"] == 0.5
    assert "is forgotten; there is no expert" in cli("forget", "S", "one")
    assert json.loads(cli("plan", "S", "--json"))["experts"] == []


def test_a_deploy_tells_the_experts_in_the_window_alone(folder):
    cli("init", "S", "--base", "base", "--init", "base", "--deploy", "all", "--window", "2")
    for name in ("e1", "e2", "e3"):
        cli("store", "S", name, "--task", name)
    assert "served  by all over e2, e3\n" in cli("deploy", "S", "-o", "served")


def test_a_report_says_which_steps_have_no_scores(folder):
    cli("init", "S", "--base", "base", "--init", "base", "--deploy", "all", "--task", "one", "--held-out", "far")
    cli("store", "S", "e1", "--task", "one")
    assert "not defined: steps 0, 1 have no scores\n" in cli("report", "S")
    assert "1 score of step 1\n" in cli("evaluate", "S", "-s", "one=0.5")
    told = cli("report", "S")
    assert "not defined: step 0 has no scores\n" in told
    assert "not defined: step 1, zero-shot retention" in told


def test_a_store_alone_is_made_and_its_tasks_may_grow(folder):
    made = ("init", "S", "--base", "base", "--protocol", "offline", "--no-model")
    assert cli(*made, "--task", "one") == "S: the store; the next is one\n"
    assert not (folder / "S" / "init").exists()
    cli("store", "S", "e1", "--task", "one")
    assert "the next is two" in cli("init", "S", "--no-model", "--task", "one", "--task", "two")
    told = cli("init", "S", "--no-model", "--task", "two", fails=True)
    assert "was made with tasks=['one', 'two'], found tasks=['two']" in told


def test_options_of_a_recipe_reach_every_merge(folder):
    rule = "match=model.norm.weight, method=keep-base"
    cli("init", "S", "--base", "base", "--init", "zero-shot", "--deploy", "offline", "-r", rule, "--dtype", "bfloat16")
    cli("store", "S", "e1", "--task", "one")
    cli("deploy", "S", "-o", "served")
    got = cfmerge.open("served")
    np.testing.assert_allclose(got["model.norm.weight"].astype(np.float32), BASE["model.norm.weight"], rtol=1e-2)
    assert got.tensors["model.norm.weight"].dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("one,two,0.2\n", "expected two columns, task and score"),
        ("one,0.2\none,0.3\n", "'one' stands there twice"),
        ("one,many\ntwo,few\n", "'two': expected a number, found 'few'"),
        ('{"one": "0.2x"}', "'one': expected a number"),
        ("[1, 2]", "expected an object"),
        ('{"one": ', "is not valid JSON"),
        ("", "no scores"),
    ],
)
def test_a_table_of_scores_that_cannot_be_read_is_told(text, told, folder):
    cli("init", "S", "--base", "base", "--protocol", "offline", "--task", "one", "--task", "two")
    (folder / "scores").write_text(text)
    assert told in cli("evaluate", "S", "scores", fails=True)
    assert cli("evaluate", "S", "-s", "one", fails=True) == "--score 'one': write TASK=SCORE, such as --score cars=0.81"


def test_a_store_that_is_not_there_says_how_to_make_one(folder):
    assert "make one with its base: cfmerge time init" in cli("deploy", "S", fails=True)
    assert "name the rules of a new store" in cli("init", "S", "--base", "base", fails=True)
    assert not (folder / "S").exists()
