"""`cfmerge spaces`, and `--align` on the command line."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import cfmerge
from cfmerge.cli import app
from cfmerge.cli.texts import alignment

BERT = {"encoder.layer.0.intermediate.dense.weight": (6, 4), "encoder.layer.0.output.dense.weight": (4, 6),
        "encoder.layer.0.output.dense.bias": (4,)}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def model(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {name: np.ones(shape, np.float32) for name, shape in BERT.items()}
    return make_model(tmp_path / "model", tensors, config={"model_type": "bert"})


def test_a_model_s_spaces_are_shown_as_a_table_that_can_be_read_again(model, tmp_path):
    done = run("spaces", model)
    assert done.exit_code == 0, done.output
    shown = yaml.safe_load(done.stdout)
    assert shown["sizes"] == {"mlp0": 6, "hidden": 4}
    assert shown["spaces"]["encoder.layer.0.output.dense.weight"] == "hidden, in mlp0"
    (tmp_path / "own.yaml").write_text(done.stdout)
    assert yaml.safe_load(run("spaces", model, "--spaces", "own.yaml").stdout) == shown
    assert json.loads(run("spaces", model, "--json").stdout) == shown


def test_a_blank_table_fits_a_model_of_any_architecture(make_model, tmp_path):
    other = make_model(tmp_path / "other", {"blocks.0.up": np.ones((3, 2), np.float32)}, config={})
    refused = run("spaces", other)
    assert isinstance(refused.exception, cfmerge.CfmergeError)
    blank = run("spaces", other, "--blank").stdout
    assert yaml.safe_load(blank) == {"spaces": {"blocks.0.up": "-, -"}}
    assert "blocks.0.up: -, -  # (3, 2)" in blank


def test_how_models_are_aligned_as_text():
    assert alignment("weights") == {"method": "weights"}
    assert alignment("method=weights, to=math, seed=3") == {"method": "weights", "to": "math", "seed": 3}
    assert alignment("{method: weights, sweeps: 5}") == {"method": "weights", "sweeps": 5}
    with pytest.raises(cfmerge.CfmergeError, match=r"--align 'to=math, weights': 'weights' is not KEY=VALUE"):
        alignment("to=math, weights")


def test_a_merge_is_aligned_from_the_command_line(model, tmp_path):
    done = run("merge", "--base", model, "-e", model, "-m", "average", "--align", "weights", "--allow", "one-expert",
               "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert cfmerge.recipe.load(tmp_path / "out/README.md").align == cfmerge.Align()


@pytest.fixture
def pair(make_model, tmp_path, monkeypatch):
    """Two MLPs of one architecture, joint moments of their features, and a table."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    shapes = {"up": (6, 4), "mid": (5, 6), "down": (3, 5)}
    models = {name: {key: np.asarray(generator.normal(size=shape), np.float32) for key, shape in shapes.items()}
              for name in "ab"}  # fmt: skip
    x = generator.normal(size=(50, 4))
    moments = cfmerge.align.Moments(("a", "b"))
    first = [np.maximum(x @ model["up"].T, 0) for model in models.values()]
    moments.add("first", first)
    moments.add("second", [np.maximum(h @ m["mid"].T, 0) for h, m in zip(first, models.values(), strict=True)])
    moments.save("joint.safetensors")
    for name, model in models.items():
        make_model(tmp_path / name, model, config={})
    (tmp_path / "spaces.yaml").write_text("spaces:\n  up: first, in -\n  mid: second, in first\n  down: -, in second\n")
    return models


def test_models_are_zipped_into_one_checkpoint(pair, tmp_path):
    done = run("zip", "a", "b", "--moments", "joint.safetensors", "--spaces", "spaces.yaml", "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["spaces"] == {"first": 6, "second": 5}
    expected = cfmerge.align.zip_models(
        cfmerge.align.parse_spaces({"up": "first, in -", "mid": "second, in first", "down": "-, in second"},
                                   {name: tensor.shape for name, tensor in pair["a"].items()}),
        pair, cfmerge.align.Moments.load("joint.safetensors"),
    ).joint()  # fmt: skip
    found = cfmerge.open_checkpoint("out")
    for name, tensor in expected.items():
        np.testing.assert_allclose(found.read(name), tensor, rtol=1e-6)


def test_a_zip_that_stops_is_a_trunk_with_heads(pair):
    done = run(
        "zip", "left=a", "right=b", "--from-weights", "--stop-at", "first", "--spaces", "spaces.yaml", "-o", "out"
    )
    assert done.exit_code == 0, done.output
    zipped = cfmerge.align.load_zipped("out")
    assert (zipped.models, set(zipped.trunk)) == (("left", "right"), {"up"})
    assert set(zipped.heads["left"]) == {"mid", "down"}


def test_a_zip_needs_moments_or_leave_to_take_weights(pair, tmp_path):
    done = run("zip", "a", "b", "--spaces", "spaces.yaml", "-o", "out")
    assert isinstance(done.exception, cfmerge.CfmergeError)
    assert "give joint moments of the models' features" in str(done.exception)
    assert not (tmp_path / "out").exists()
    both = run(
        "zip", "a", "b", "--moments", "joint.safetensors", "--from-weights", "--spaces", "spaces.yaml", "-o", "out"
    )
    assert "leave `moments` or `from_weights` out" in str(both.exception)


def test_a_head_is_that_of_one_of_the_models_and_of_a_zip_all_through(pair, tmp_path):
    options = ["--from-weights", "--spaces", "spaces.yaml", "-o", "out"]
    unknown = run("zip", "left=a", "right=b", "--head", "lfet", *options)
    assert "head: there is no model 'lfet'; did you mean 'left'?" in str(unknown.exception)
    partial = run("zip", "left=a", "right=b", "--head", "left", "--stop-at", "first", *options)
    assert "stops at 'first' keeps the head of every model" in str(partial.exception)
    assert not (tmp_path / "out").exists()


def test_a_plan_says_how_models_are_aligned(model):
    done = run("plan", "--base", model, "-e", model, "-m", "average", "--align", "many", "--allow", "one-expert")
    assert "align   to base by many" in done.stdout, done.output


def test_a_zip_replaces_what_is_there_with_leave_and_never_one_of_its_models(pair, tmp_path):
    def zipped(output, *more):
        return run(
            "zip", "a", "b", "--from-weights", "--stop-at", "first", "--spaces", "spaces.yaml", "-o", output, *more
        )

    assert zipped("out").exit_code == 0
    assert "exists already" in str(zipped("out").exception)
    again = zipped("out", "--overwrite")
    assert again.exit_code == 0, again.output
    assert "holds an input" in str(zipped("a", "--overwrite").exception)
    assert set(cfmerge.open("a")) == {"up", "mid", "down"}


def test_moments_are_saved_over_others_with_leave(pair):
    moments = cfmerge.align.Moments.load("joint.safetensors")
    with pytest.raises(cfmerge.CfmergeError, match="exists already"):
        moments.save("joint.safetensors")
    moments.save("joint.safetensors", overwrite=True)
    assert cfmerge.align.Moments.load("joint.safetensors").spaces == moments.spaces
