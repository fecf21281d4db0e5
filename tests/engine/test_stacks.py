"""Stacks: outputs whose layers are those of the base, or of other models, under new numbers."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge import CfmergeError, Expert, LayerExpert, Layers, Recipe

BF16 = np.dtype(ml_dtypes.bfloat16)
PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")


def layer(tensors, number):
    return {part: tensors[f"model.layers.{number}.{part}"] for part in PARTS}


def same(a, b):
    """Whether two layers are the same bit by bit."""
    return all(a[part].tobytes() == b[part].tobytes() and a[part].dtype == b[part].dtype for part in a)


def made(recipe, tmp_path, load, name="out"):
    result = cfmerge.merge_recipe(recipe, tmp_path / name)
    return load(tmp_path / name), result


def test_layers_repeat_and_come_from_others_bit_by_bit(tmp_path, make_model, llama, llama_config, load):
    """bf16, with negative zeros, which no sum keeps."""
    a, b = llama(0, BF16), llama(1, BF16)
    b["model.layers.0.mlp.up_proj.weight"][0, :2] = [-0.0, 0.0]
    config = {**llama_config, "layer_types": ["full", "sliding"]}
    base, other = make_model(tmp_path / "a", a, config), make_model(tmp_path / "b", b, config)
    runs = [Layers((0, 2)), Layers((0, 1), base=str(other)), Layers((1, 2)), Layers((0, 1), base=str(other))]
    out, result = made(Recipe(str(base), layers=runs), tmp_path, load)
    sources = [(a, 0), (a, 1), (b, 0), (a, 1), (b, 0)]
    assert all(same(layer(out, k), layer(*where)) for k, where in enumerate(sources))
    assert out["model.embed_tokens.weight"].tobytes() == a["model.embed_tokens.weight"].tobytes()
    assert out["lm_head.weight"].tobytes() == b["lm_head.weight"].tobytes()  # behind the layers: of the last run
    assert out["model.norm.weight"].tobytes() == b["model.norm.weight"].tobytes()
    assert len(out) == 3 + 5 * len(PARTS)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_hidden_layers"] == 5
    assert written["layer_types"] == ["full", "sliding", "full", "sliding", "full"]
    assert {key: value for key, value in written.items() if key not in ("num_hidden_layers", "layer_types")} == {
        key: value for key, value in config.items() if key not in ("num_hidden_layers", "layer_types")
    }
    assert "config.json: num_hidden_layers, layer_types: changed for 5 layers (2 in the base)" in result.notes
    card = (tmp_path / "out/README.md").read_text()
    assert "# A stack of layers" in card
    assert "- a\n- b\n" in card
    again, _ = made(cfmerge.recipe.load(tmp_path / "out/README.md"), tmp_path, load, "again")
    assert all(again[name].tobytes() == out[name].tobytes() for name in out)


def test_layers_are_left_out_and_scaled(tmp_path, make_model, llama, load):
    a = llama(0, BF16)
    scale = [{"match": "*down_proj*", "value": 0.0}, {"match": "*q_proj*", "value": 0.3}, {"value": 1.0}]
    base = make_model(tmp_path / "a", a)
    out, _ = made(Recipe(str(base), layers=[Layers((1, 2)), Layers((1, 2), scale=scale)]), tmp_path, load)
    assert same(layer(out, 0), layer(a, 1))
    scaled, own = layer(out, 1), layer(a, 1)
    assert not scaled["mlp.down_proj.weight"].any()
    once = (own["self_attn.q_proj.weight"].astype(np.float32) * np.float32(0.3)).astype(BF16)
    assert scaled["self_attn.q_proj.weight"].tobytes() == once.tobytes()
    assert scaled["mlp.up_proj.weight"].tobytes() == own["mlp.up_proj.weight"].tobytes()


def test_a_gradient_runs_over_the_run_and_layers_outside_have_its_first_value(family, tmp_path, load):
    scale = {"gradient": [1.0, 0.5]}
    out, _ = made(Recipe(str(family.base), layers=[Layers((0, 2)), Layers((0, 2), scale=scale)]), tmp_path, load)
    a = family.tensors[0]
    assert same(layer(out, 2), layer(a, 0))
    assert np.array_equal(layer(out, 3)["mlp.up_proj.weight"], layer(a, 1)["mlp.up_proj.weight"] * np.float32(0.5))
    assert np.array_equal(out["model.norm.weight"], a["model.norm.weight"])


def test_each_run_merges_by_its_own_method_those_experts_that_take_part(family, tmp_path, load):
    experts = [Expert(str(path), name=name, weight=2.0) for path, name in zip(family.experts, "xyz", strict=True)]
    runs = [
        Layers((0, 2), experts=[LayerExpert("x", weight=1.0)], method="slerp", parameters={"t": {"gradient": [0, 1]}}),
        Layers((0, 1), experts=[LayerExpert("x", (1, 2), 3.0), LayerExpert("y")]),
        Layers((0, 2), experts=[]),
        Layers((1, 2), experts=["x", "y", LayerExpert("z", weight={"gradient": [4.0, 6.0]})]),
    ]
    recipe = Recipe(str(family.base), experts, "linear", layers=runs)
    out, result = made(recipe, tmp_path, load)
    base, x, y, z = family.tensors

    def close(found, expected):
        return all(np.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in found)

    def mean(*weighted):
        total = sum(weight for weight, _ in weighted)
        return {part: sum(weight * tensors[part] for weight, tensors in weighted) / total for part in PARTS}

    assert close(layer(out, 0), layer(base, 0))
    assert close(layer(out, 1), layer(x, 1))
    assert close(layer(out, 2), mean((3, layer(x, 1)), (2, layer(y, 0))))
    assert same(layer(out, 3), layer(base, 0))
    assert same(layer(out, 4), layer(base, 1))
    assert close(layer(out, 5), mean((2, layer(x, 1)), (2, layer(y, 1)), (6, layer(z, 1))))
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert np.allclose(out[embedding], base[embedding], atol=1e-6)  # of the first run, where t begins with 0
    expected = (2 * x[norm] + 2 * y[norm] + 4 * z[norm]) / 8  # of the last run, where the weight begins with 4
    assert np.allclose(out[norm], expected, atol=1e-6)
    counts = result.plan.counts()
    assert counts["matrix", "slerp"] == 6
    assert counts["matrix", "keep-base"] == 6


def test_repeated_layers_are_no_ties(family):
    """Equal bytes are merged once within a layer; but one layer can be merged in two ways."""
    runs = [Layers((0, 1), method="average"), Layers((0, 1), method="task_arithmetic", parameters={"scale": 2.0})]
    plan = cfmerge.make_plan(Recipe(str(family.base), [str(path) for path in family.experts], layers=runs))
    assert len(plan.jobs) == 3 + 2 * len(PARTS)
    assert plan.counts()["matrix", "task_arithmetic"] == 3


def test_rules_see_the_new_names(family, tmp_path, load):
    rules = [cfmerge.Rule("model.layers.2.*", method="keep-base")]
    recipe = Recipe(
        str(family.base), [str(path) for path in family.experts], "average", rules=rules,
        layers=[Layers((0, 2)), Layers((1, 2), method="ties")],
    )  # fmt: skip
    out, _ = made(recipe, tmp_path, load)
    assert same(layer(out, 2), layer(family.tensors[0], 1))
    assert not same(layer(out, 1), layer(family.tensors[0], 1))


def test_a_dtype_for_the_output_goes_with_the_count(family, tmp_path, load):
    out, _ = made(Recipe(str(family.base), dtype="bfloat16", layers=[Layers((0, 2)), Layers()]), tmp_path, load)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["num_hidden_layers"], written["torch_dtype"]) == (4, "bfloat16")
    assert {tensor.dtype for tensor in out.values()} == {BF16}


def test_a_nested_config(tmp_path, make_model, llama, llama_config):
    nested = {"model_type": "v", "text_config": {**llama_config, "layer_types": ["a", "b"]}}
    base = make_model(tmp_path / "a", llama(0), nested)
    cfmerge.merge_recipe(Recipe(str(base), layers=[Layers((1, 2)), Layers((0, 2))]), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["text_config"] == {**llama_config, "num_hidden_layers": 3, "layer_types": ["b", "a", "b"]}


def test_configs_of_other_models_that_differ_are_told(tmp_path, make_model, llama, llama_config):
    base = make_model(tmp_path / "a", llama(0), {**llama_config, "rope_theta": 10000})
    other = make_model(tmp_path / "b", llama(1), {**llama_config, "rope_theta": 500000})
    plan = cfmerge.make_plan(Recipe(str(base), layers=[Layers((0, 2)), Layers((0, 2), base=str(other))]))
    (note,) = [note for note in plan.notes if "rope_theta" in note]
    assert "rope_theta 10000 in the base, 500000 in" in note
    assert "num_hidden_layers" not in note


def refusals(tmp_path, make_model, llama, llama_config):
    """Recipes that are refused, and words of the message."""
    base = make_model(tmp_path / "a", llama(0))
    expert = make_model(tmp_path / "x", llama(1))
    bare = make_model(tmp_path / "bare", llama(0), None)
    wide = make_model(
        tmp_path / "wide", {n: np.ones([2 * d for d in t.shape], np.float32) for n, t in llama(0).items()}
    )
    mistral = make_model(tmp_path / "mistral", llama(0), {**llama_config, "model_type": "mistral"})
    tied = make_model(tmp_path / "tied", llama(0), {**llama_config, "tie_word_embeddings": True})
    renamed = make_model(tmp_path / "renamed", {f"lm.{n}": t for n, t in llama(0).items()})
    one = [str(expert)]
    return [
        ([Layers((0, 3))], [], base, ["layers[0]: range [0, 3]", "has 2 layers", "[0, 2] goes to the end"]),
        ([Layers((0, 2), base=str(wide))], [], base, ["wide do not fit on the base", "shape (24, 16), expected"]),
        ([Layers((0, 2), base=str(mistral))], [], base, ["model_type 'mistral'", "'llama'"]),
        ([Layers((0, 2), base=str(tied))], [], base, ["tie_word_embeddings True"]),
        ([Layers((0, 2), base=str(renamed))], [], base, ["has no layers called 'model.layers.*'", "look like 'lm."]),
        ([Layers((0, 2))], [], bare, ["does not say how many layers it has", "2 of 'model.layers.*'"]),
        ([Layers((0, 2), experts=["y"])], one, base, ["there is no expert 'y'; there is: x"]),
        ([Layers((0, 2), experts=["x", "x"])], one, base, ["expert 'x' is named twice"]),
        ([Layers((0, 2), experts=[LayerExpert("x", (0, 1))])], one, base, ["2 layers of the base meet 1 of expert"]),
        ([Layers((0, 1), experts=[LayerExpert("x", (2, 3))])], one, base, ["range [2, 3]", "has 2 layers"]),
        ([Layers((0, 2), experts=[])], one, base, ["expert 'x' takes part in no run"]),
        ([Layers((0, 2), scale=0.5)], one, base, ["scale is for layers that are copied"]),
        ([Layers((0, 2), method="ties")], [], base, ["a method or parameters, and no experts"]),
    ]  # fmt: skip


def test_what_cannot_be_stacked_is_refused(tmp_path, make_model, llama, llama_config):
    for layers, experts, base, words in refusals(tmp_path, make_model, llama, llama_config):
        with pytest.raises(CfmergeError) as caught:
            cfmerge.make_plan(Recipe(str(base), experts, "average", layers=layers, allow=["one-expert"]))
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_statistics_are_of_the_bases_own_layers(family):
    recipe = Recipe(str(family.base), [str(path) for path in family.experts], "ace", layers=[Layers((0, 2))])
    with pytest.raises(CfmergeError, match="layers: statistics are of the base's own layers"):
        cfmerge.make_plan(recipe, sums=True)


def test_wrong_runs_are_told_with_their_place():
    def fails(layers, *words):
        with pytest.raises(CfmergeError) as caught:
            cfmerge.recipe.parse({"base": "a", "layers": layers}, "x.yaml")
        assert all(word in str(caught.value) for word in words), str(caught.value)

    fails([{"range": [2, 2]}], "has no layers")
    fails([{"rnage": [0, 2]}], "unknown key 'rnage'", "did you mean 'range'")
    fails([{"experts": [{"nam": "a"}]}], "unknown key 'nam'", "did you mean 'name'")


@pytest.fixture
def cli(tmp_path):
    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "cfmerge", *map(str, words)], cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_layers_on_the_command_line(tmp_path, make_model, llama, load, cli):
    make_model(tmp_path / "a", llama(0))
    make_model(tmp_path / "b", llama(1))
    words = ("--base", "a", "--layers", "0:2", "--layers", "b@0:1")
    planned = cli("plan", *words, "--no-calibration")
    assert "a stack of layers" in planned.stdout
    assert "layers  0 to 0 of b" in planned.stdout
    assert cli("merge", *words, "-o", "out").returncode == 0
    assert same(layer(load(tmp_path / "out"), 2), layer(llama(1), 0))
    wrong = cli("merge", "--base", "a", "--layers", "0-2", "-o", "out2")
    assert wrong.returncode == 1
    assert "write FIRST:END, PATH@FIRST:END" in wrong.stderr
