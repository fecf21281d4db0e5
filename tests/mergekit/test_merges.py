"""Merges from mergekit's YAML on the command line: one of each kind, chains, and what `plan` prints."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

import cfmerge
from cfmerge import mergekit

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path, make_model, llama, monkeypatch):
    """base, a and b in the working directory; the base's tensors, and theirs, by name."""
    monkeypatch.chdir(tmp_path)
    tensors = {name: llama(number) for number, name in enumerate(("base", "a", "b"))}
    for name, own in tensors.items():
        make_model(tmp_path / name, own)
    return tensors


def cli(*words):
    done = subprocess.run([sys.executable, "-m", "cfmerge", *map(str, words)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def written(*contents, file="m.yml"):
    with open(file, "w") as out:
        out.write("---\n".join(yaml.safe_dump(content, sort_keys=False) for content in contents))
    return file


def weighted(**weights):
    return [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]


def test_out_may_follow_the_file(models, tmp_path, load):
    file = written({"merge_method": "linear", "models": weighted(a=3, b=1), "dtype": "float32"})
    done = cli("merge", file, "OUT")
    assert done.returncode == 0, done.stderr
    expected = {name: (3 * models["a"][name] + models["b"][name]) / 4 for name in models["a"]}
    out = load(tmp_path / "OUT")
    assert all(np.allclose(out[name], expected[name], atol=1e-6) for name in expected)
    for words in (("merge", file), ("merge", file, "OUT", "-o", "OTHER")):
        wrong = cli(*words)
        assert wrong.returncode == 2
        assert "--output" in wrong.stderr
    changed = cli("merge", file, "-o", "OTHER", "--dtype", "bfloat16", "--json")
    assert json.loads(changed.stdout.splitlines()[-1])["method"] == "linear"
    assert {tensor.dtype.name for tensor in load(tmp_path / "OTHER").values()} == {"bfloat16"}


@pytest.mark.parametrize("method", ["multislerp", "karcher", "nuslerp"])
def test_merges_without_a_base_are_of_the_full_weights(models, tmp_path, load, method):
    """They change when both models are moved, as merges of deltas do not."""
    weights = weighted(a=1, b=1) if method != "karcher" else [{"model": "a"}, {"model": "b"}]
    (stage,) = mergekit.load(written({"merge_method": method, "models": weights}))
    cfmerge.merge_recipe(stage.recipe, "OUT")
    a, b, out = (tensors[Q].ravel() for tensors in (models["a"], models["b"], load(tmp_path / "OUT")))
    mean = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    expected = mean / np.linalg.norm(mean) * (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    assert np.allclose(out, expected, atol=1e-4)


def test_sums_of_deltas_with_a_switch_a_filter_and_a_gradient(models, tmp_path, load):
    content = {
        "merge_method": "task_arithmetic", "base_model": "base", "parameters": {"lambda": 0.5, "normalize": False},
        "models": weighted(a=[{"filter": "q_proj", "value": [1, 3]}, {"value": 0}], b=1),
    }  # fmt: skip
    (stage,) = mergekit.load(written(content))
    cfmerge.merge_recipe(stage.recipe, "OUT")
    out, base, a, b = (*[load(tmp_path / "OUT")], *models.values())
    for name, weight in {Q: 1, Q.replace(".0.", ".1."): 3, "model.norm.weight": 0}.items():
        expected = base[name] + 0.5 * (weight * (a[name] - base[name]) + b[name] - base[name])
        assert np.allclose(out[name], expected, atol=1e-6)


def test_a_frankenmerge_is_a_copy(models, tmp_path, load):
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("a", "b")]
    (stage,) = mergekit.load(written({"merge_method": "passthrough", "slices": slices}))
    cfmerge.merge_recipe(stage.recipe, "OUT")
    out = load(tmp_path / "OUT")
    for k, (name, number) in enumerate((("a", 0), ("a", 1), ("b", 0), ("b", 1))):
        new, old = Q.replace(".0.", f".{k}."), Q.replace(".0.", f".{number}.")
        assert out[new].tobytes() == models[name][old].tobytes()
    assert json.loads((tmp_path / "OUT/config.json").read_text())["num_hidden_layers"] == 4


CHAIN = (
    {"name": "first", "merge_method": "linear", "models": weighted(a=1, b=1), "dtype": "float32"},
    {"merge_method": "slerp", "base_model": "base", "models": [{"model": "first"}], "parameters": {"t": 1.0}},
)


def test_a_chain_keeps_its_stages_and_takes_them_again_while_they_are_current(models, tmp_path, load):
    file = written(*CHAIN)
    done = cli("merge", file, "OUT", "--json")
    assert done.returncode == 0, done.stderr
    first, _ = (json.loads(line) for line in done.stdout.splitlines() if '"done"' in line)
    assert (first["stage"], first["output"]) == ("first", str(tmp_path / "OUT-stages/first"))
    assert np.allclose(load(tmp_path / "OUT")[Q], (models["a"][Q] + models["b"][Q]) / 2, atol=1e-6)
    made = (tmp_path / "OUT-stages/first/model.safetensors").stat().st_mtime_ns

    again = cli("merge", file, "OUT", "--overwrite", "--json")  # everything anew
    assert "kept" not in again.stdout
    made, before = (tmp_path / "OUT-stages/first/model.safetensors").stat().st_mtime_ns, made
    assert made > before

    done = cli("merge", written(CHAIN[0], {**CHAIN[1], "parameters": {"t": 0.0}}), "OTHER")
    assert done.returncode == 0, done.stderr
    os.rename("OUT-stages", "NEXT-stages")
    done = cli("merge", file, "NEXT", "--json")
    assert json.loads(done.stdout.splitlines()[0])["kept"] is True
    assert (tmp_path / "NEXT-stages/first/model.safetensors").stat().st_mtime_ns == made

    (tmp_path / "a/model.safetensors").touch()  # an input is newer
    os.rename("NEXT-stages", "LAST-stages")
    done = cli("merge", file, "LAST")
    assert done.returncode == 1
    assert "LAST-stages/first" in done.stderr
    assert "--overwrite" in done.stderr


def test_plan_prints_the_recipe_that_it_became(models):
    file = written(*CHAIN)
    done = cli("plan", file, "--no-calibration")
    assert done.returncode == 0, done.stderr
    assert "stage first" in done.stdout
    assert "it is planned when first is merged" in done.stdout
    (_, last) = mergekit.load(file)
    assert last.recipe.brief() in done.stdout
    assert "linear (normalise=True)" in done.stdout
    told = json.loads(cli("plan", written(CHAIN[0]), "--no-calibration", "--json").stdout)
    assert (told["recipe"]["method"], told["recipe"]["allow"]) == ("linear", ["base-as-expert"])
    ours = cli("plan", "--base", "base", "-e", "a", "-e", "b", "--no-calibration")
    assert "experts:" not in ours.stdout


def test_a_chain_is_for_merge_and_plan_alone(models):
    wrong = cli("accumulate", written(*CHAIN), "-o", "STATS")
    assert wrong.returncode == 1
    assert "2 documents are a chain of merges" in wrong.stderr
