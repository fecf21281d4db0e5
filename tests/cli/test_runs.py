"""`--run` on the command line: steps and weights are told, in a terminal and as JSON; wrong options are refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import cfmerge
from cfmerge.cli import app
from cfmerge.cli.runs import bar
from cfmerge.errors import CfmergeError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Four steps, the last of them half-written; the current directory is above it."""
    for step in (100, 200, 300, 400):
        tree = {"w": np.full((4, 3), step, np.float32), "updates": np.array([step])}
        cfmerge.save(tree, tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
    file = tmp_path / "run" / "checkpoint-400" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def cli(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_a_merge_tells_its_steps_and_weights(run):
    told = cli("merge", "--run", "run", "--decay", "ema=0.5", "-o", "out")
    assert told.splitlines()[0] == "run: 3 steps, weighted mean, decay ema=0.5"
    rows = [line.split() for line in told.splitlines()[1:5]]
    assert [row[:2] for row in rows] == [["step", "weight"], ["100", "0.2500"], ["200", "0.2500"], ["300", "0.5000"]]
    assert len(rows[3][2]) == 2 * len(rows[1][2]) == 2 * len(rows[2][2])
    assert "step 400 is left out: checkpoint-400: " in told
    assert (cfmerge.open("out")["w"] == 225).all()
    assert cfmerge.open("out")["updates"] == [300]


def test_a_merge_tells_it_as_json(run):
    events = [
        json.loads(line) for line in cli("merge", "--run", "run", "--last", "2", "-o", "out", "--json").splitlines()
    ]
    assert events[0] == {
        "event": "window", "run": "run", "decay": "linear",
        "steps": [
            {"step": 200, "path": "run/checkpoint-200", "weight": 0.5},
            {"step": 300, "path": "run/checkpoint-300", "weight": 0.5},
        ],
    }  # fmt: skip
    assert any("step 400 is left out" in note for note in events[-1]["notes_on_recipe"])
    assert cli("merge", "--run", "run", "-o", "quiet", "--quiet") == ""


def test_a_plan_shows_the_window_and_the_cost(run):
    plan = ("plan", "--run", "run", "--from", "100", "--to", "300", "--every", "2", "--no-calibration")
    told = cli(*plan, "--weights=-0.5,1.5")
    lines = told.splitlines()
    assert lines[0] == "run: 2 steps, weighted mean, weights as given"
    assert lines[2].split()[:2] == ["100", "-0.5000"]
    assert "\u2591" in lines[2]
    assert lines[3].split()[:2] == ["300", "1.5000"]
    assert "\u2588" * 32 in lines[3]
    assert "reads " in told
    content = json.loads(cli(*plan, "-m", "ties", "--json"))
    assert [step["weight"] for step in content["window"]["steps"]] == [None, 1.0]
    assert content["method"] == "ties"
    assert content["recipe"]["unmerged"] == "run/checkpoint-300"
    assert any("step 400" in note for note in content["notes_on_run"])


def test_a_card_repeats_the_merge(run):
    """Without the run's options: the recipe names steps and weights."""
    cli("merge", "--run", "run", "--decay", "cosine", "--extra-from", "100", "-o", "out", "-q")
    cli("merge", "out/README.md", "-o", "again", "-q")
    for name in ("w", "updates"):
        assert (cfmerge.open("again")[name] == cfmerge.open("out")[name]).all()
    assert cfmerge.open("again")["updates"] == [100]


REFUSED = {
    "--last: is of a training run; name its directory: --run DIR": ("--last", "3"),
    "--from: is of a training run": ("--from", "3", "--base", "b"),
    "leave --expert out": ("--run", "run", "-e", "run/checkpoint-100"),
    "leave --statistics out": ("--run", "run", "--statistics", "s"),
    "leave the recipe recipe.yaml out": ("recipe.yaml", "--run", "run"),
    "--weights 'a,b': write a number for each step": ("--run", "run", "--weights", "a,b"),
    "--decay and --weights both": ("--run", "run", "--weights", "1,2,3", "--decay", "linear"),
    "--weights: they sum to 6, .* --weights 0.166666667,0.333333333,0.5": ("--run", "run", "--weights", "1,2,3"),
    "a weighted mean has none; name the method": ("--run", "run", "-p", "scale=2"),
    "leave --layers out": ("--run", "run", "--layers", "0:1"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_do_not_go_together_are_refused(run, message):
    with pytest.raises(CfmergeError, match=message):
        cli("merge", *REFUSED[message], "-o", "out")


def test_bars():
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 4) == "██"
    assert bar(1 / 32, 4) == "▏"
    assert bar(7 / 32, 4) == "▉"
    assert bar(0.0, 4) == ""
    assert bar(-0.5, 4) == "░░"
