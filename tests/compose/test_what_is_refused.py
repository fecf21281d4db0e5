"""What composed results refuse by name, and what they keep whole: recipes, tables that were changed, outputs."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from composed_parts import models
from safetensors.numpy import load_file, save_file

import cfmerge
from cfmerge import compose
from cfmerge.compose.smile_layers import layers_of
from cfmerge.errors import CfmergeError, NonFiniteError

Q, BIAS = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
SMILE = "smile(rank=3, gate=2)"


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_model):
    """The directory of a base and two experts, `base`, `a`, `b`, and a result of EMR, `out`."""
    folder = tmp_path_factory.mktemp("refused")
    for name, own in zip(("base", "a", "b"), models(2), strict=True):
        make_model(folder / name, own, None)
    compose.build(folder / "base", experts(folder), "emr", output=folder / "out")
    return folder


def experts(folder):
    return {task: folder / task for task in "ab"}


REFUSED = {
    "adapter_out": (8, "`adapter_out: 8`: a composed result is no adapter"),
    "chat_template": ("chatml", "`chat_template: chatml`: a composed result has no tokenizer"),
    "format": ("torch", "`format: torch`.*cfmerge materialise --format"),
    "side_files": ("x", "`side_files: x`: a composed result has no files beside"),
    "statistics": ("x", "`statistics: x`"),
    "vocabulary": ("union", "`vocabulary: union`.*say base"),
    "heads": ("drop", "`heads: drop`: the base is no part.*keep-base"),
    "rules": (
        [{"match": "*norm*", "method": "skip"}],
        "model.norm.weight: a rule says skip.*--rule .match=model.norm.weight, method=keep-base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_only_one_checkpoint_can_have_is_refused_by_name(family, key):
    value, message = REFUSED[key]
    with pytest.raises(CfmergeError, match=message):
        compose.plan(family / "base", experts(family), "emr", **{key: value})


def test_a_system_that_is_none_is_told_with_the_systems(family):
    with pytest.raises(CfmergeError, match=r"unknown system 'foo'; there is: emr, smile, tall, tsv_c"):
        compose.plan(family / "base", experts(family), "foo")


def test_smile_refuses_more_experts_a_token_than_there_are_and_a_top_k_for_one_layer(family):
    with pytest.raises(CfmergeError, match=r"top_k must be from 1 to the number of experts, 2, not 3"):
        compose.plan(family / "base", experts(family), "smile(rank=3, gate=2, top_k=3)")
    rules = [{"match": Q, "method": "smile", "parameters": {"rank": 3, "gate": 2, "top_k": 2}}]
    with pytest.raises(CfmergeError, match=r"a rule says top_k=2, and top_k is one for the whole model, 1"):
        compose.plan(family / "base", experts(family), SMILE, rules=rules)
    with pytest.raises(CfmergeError, match=r"top_k must be at least 1, not 0"):
        compose.plan(family / "base", experts(family), "smile(top_k=0)")


def test_none_in_a_text_is_the_dense_rank(family):
    for text in ("smile(rank=none, gate=2)", "smile(rank=null, gate=2)", "smile(rank=None, gate=2)"):
        assert compose.plan(family / "base", experts(family), text).method.parameters["rank"] is None
    planned = compose.plan(family / "base", experts(family), "smile", parameters={"rank": "none", "gate": 2})
    assert planned.method.parameters["rank"] is None


def test_the_rule_that_a_wide_gate_prints_keeps_the_whole_layer(family):
    with pytest.raises(CfmergeError, match=r'gate=8 .*--rule "match=model\S+_proj.weight, method=keep-base"'):
        compose.plan(family / "base", experts(family), "smile(rank=3, gate=8)")
    rule = {"match": Q, "method": "keep-base"}
    planned = compose.plan(family / "base", experts(family), SMILE, rules=[rule])
    assert not any("q_proj" in name for name in planned.entries)
    assert any(BIAS in note for note in planned.notes)
    with pytest.raises(CfmergeError, match=r"gate must be at least 1, not 0$"):
        compose.plan(family / "base", experts(family), "smile(rank=3, gate=0)")


def test_a_result_is_no_place_for_a_model_of_it(family, tmp_path):
    compose.build(family / "base", experts(family), "emr", output=tmp_path / "out")
    for output in (tmp_path / "out", tmp_path / "out" / "model", tmp_path):
        with pytest.raises(CfmergeError, match=r"(holds|lies in) an input"):
            compose.materialise(tmp_path / "out", "a", output, overwrite=True)
    assert compose.load(tmp_path / "out").tasks == ("a", "b")


@pytest.mark.parametrize("option", [{"memory": "1GB"}, {"seed": 0}, {"overwrite": True}])
def test_options_of_checkpoints_are_refused_for_trees(option):
    tensors = models(2)
    with pytest.raises(CfmergeError, match=rf"build of pytrees: {next(iter(option))}: of checkpoints"):
        compose.build(tensors[0], tensors[1:], "emr", **option)


def test_a_base_that_lacks_a_tensor_is_told_though_the_result_keeps_nothing_of_it(family, tmp_path, make_model):
    base = models(2)[0]
    made = compose.build(family / "base", experts(family), SMILE, output=tmp_path / "out")
    lost = {name: value for name, value in base.items() if name != "model.norm.weight"}
    make_model(tmp_path / "base", lost, None)
    with pytest.raises(CfmergeError, match=r"base: has no 'model.norm.weight', which the base had"):
        compose.materialise(made, "a", tmp_path / "model", base=tmp_path / "base")
    with pytest.raises(CfmergeError, match=r"base: has no 'model.norm.weight'"):
        made.materialise("a", lost)


def test_a_base_with_one_of_two_tied_tensors_is_the_same_base(tmp_path, make_model):
    embedding, config = "model.embed_tokens.weight", {"model_type": "llama", "tie_word_embeddings": True}
    for name, own in zip(("base", "a", "b"), models(2), strict=True):
        make_model(tmp_path / name, {**own, "lm_head.weight": own[embedding]}, config)
    make_model(tmp_path / "again", models(2)[0], config)
    compose.build(tmp_path / "base", experts(tmp_path), "emr", output=tmp_path / "out")
    done = compose.materialise(tmp_path / "out", "a", tmp_path / "model", base=tmp_path / "again")
    whole = compose.materialise(tmp_path / "out", "a", tmp_path / "whole")
    found, expected = (load_file(one.output / "model.safetensors") for one in (done, whole))
    assert all(np.array_equal(found[name], expected[name]) for name in models(2)[0])


def test_a_recipe_in_the_table_that_was_changed_is_told(family, tmp_path):
    shutil.copytree(family / "out", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "composition.json").read_text())
    (tmp_path / "out" / "composition.json").write_text(json.dumps(table | {"recipe": "a: {"}))
    with pytest.raises(CfmergeError, match=r"composition.json: its recipe was changed"):
        compose.materialise(tmp_path / "out", "a", tmp_path / "model")


def test_a_format_that_is_none_is_told(family, tmp_path):
    with pytest.raises(CfmergeError, match=r"unknown format 'touch'; did you mean 'torch'"):
        compose.materialise(family / "out", "a", tmp_path / "model", format="touch")


def test_a_relative_base_is_found_from_another_directory(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family)
    compose.build("base", {"a": "a", "b": "b"}, "emr", output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert compose.materialise("out", "a", "model").output.is_dir()


def test_an_expert_that_lacks_a_bias_or_a_weight_keeps_its_place_in_the_layers(tmp_path, make_model):
    tensors = models(3)
    del tensors[1][BIAS], tensors[3][Q]
    for name, own in zip(("base", "a", "b", "c"), tensors, strict=True):
        make_model(tmp_path / name, own, None)
    told = [{"path": str(tmp_path / task), "partial": task != "b"} for task in "abc"]
    content = {"base": str(tmp_path / "base"), "experts": told, "method": "smile", "parameters": {"rank": 8, "gate": 2}}
    compose.build_recipe(cfmerge.recipe.parse(content, "here"), tmp_path / "out")
    made = compose.load(tmp_path / "out")
    layer = layers_of(made.parts)[Q]
    assert layer.up.shape[0] == layer.bias.shape[0] == 3
    assert not layer.bias[0].any()
    assert not layer.up[2].any()
    np.testing.assert_allclose(layer.bias[2], tensors[3][BIAS] - tensors[0][BIAS])
    for task, own in zip("abc", tensors[1:], strict=True):
        found = load_file(compose.materialise(made, task, tmp_path / f"{task}-again").output / "model.safetensors")
        for name in (Q, BIAS):
            np.testing.assert_allclose(found[name], own.get(name, tensors[0][name]), atol=1e-5)


def test_a_model_that_does_not_fit_its_dtype_is_told(tmp_path, make_model):
    base = {"weight": np.full((2, 3), 6e4, np.float16)}
    moved = [{"weight": base["weight"] + np.float16(delta)} for delta in (5e3, 5e3)]
    moved[1]["weight"] = base["weight"].copy()
    for name, own in zip(("base", "a", "b"), (base, *moved), strict=True):
        make_model(tmp_path / name, own, None)
    how = {"output": tmp_path / "out", "allow": ["base-as-expert"]}
    made = compose.build(tmp_path / "base", experts(tmp_path), "emr", **how)
    made = compose.Artifact(made.about, made.parts, np.array([9.0, 1.0]))
    with pytest.raises(NonFiniteError, match=r"base: tensor 'weight' of the task's model.*does not fit float16"):
        compose.materialise(made, "a", tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"does not fit float16"):
        made.materialise("a", base)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("system", ["emr", "tall"])
def test_running_statistics_are_each_tasks_own_so_that_no_variance_is_negative(system):
    base = {"bn.running_var": np.full(4, 0.5, np.float32), "bn.weight": np.ones(4, np.float32)}
    rng = np.random.default_rng(0)
    experts = [{name: (rng.random(4) + 0.01).astype(np.float32) for name in base} for _ in range(4)]
    made = compose.build(base, experts, system)
    for task, own in zip(made.tasks, experts, strict=True):
        np.testing.assert_allclose(made.materialise(task, base)["bn.running_var"], own["bn.running_var"], rtol=1e-5)
    assert set(made.parts["bn.weight"]) == {"shared", "masks"}


def test_a_base_in_fp8_is_read_again_as_it_was_when_the_result_was_made(tmp_path, make_model):
    rng = np.random.default_rng(0)
    wide = [{"layers.0.q_proj.weight": rng.standard_normal((8, 8)).astype(np.float32)} for _ in range(3)]
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    for name, own in zip(("base", "a", "b"), wide, strict=True):
        made = {name: value.astype(ml_dtypes.float8_e4m3fn) for name, value in own.items()}
        made["layers.0.q_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)
        make_model(tmp_path / name, None, config)
        save_file(made, tmp_path / name / "model.safetensors")
    compose.build(tmp_path / "base", experts(tmp_path), "tsv_c(ratio=1)", output=tmp_path / "out", dequantize=True)
    done = compose.materialise(tmp_path / "out", "b", tmp_path / "model")
    found = load_file(done.output / "model.safetensors")
    assert {name: value.dtype.name for name, value in found.items()} == {"layers.0.q_proj.weight": "bfloat16"}
    expected = wide[2]["layers.0.q_proj.weight"].astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(found["layers.0.q_proj.weight"].astype(np.float32), expected, atol=0.02)
    assert "quantization_config" not in json.loads((done.output / "config.json").read_text())


WRONG = {
    "another system": (lambda t: t.update(system="ties"), "system should be one of emr, tall, tsv_c, smile"),
    "parts of another": (lambda t: t.update(system="tsv_c"), r"tsv_c keeps no parts \['masks', 'shared'\]"),
    "a task twice": (lambda t: t.update(tasks=["a", "a"]), r"tasks should be names, each once"),
    "tasks that are a text": (lambda t: t.update(tasks="ab"), r"a list of names is expected, found 'ab'"),
    "no tasks": (lambda t: t.update(tasks=[]), r"tasks should be names"),
    "numbers for tasks": (lambda t: t.update(tasks=[1, 2]), r"a list of names is expected"),
    "a negative side": (lambda t: t["tensors"][Q].update(shape=[-8, -8]), r"not negative is expected, found -8"),
    "a side that is a text": (lambda t: t["tensors"][Q].update(shape=["8", 8]), r"whole number"),
    "another shape": (lambda t: t["tensors"][Q].update(shape=[8, 9]), rf"'{Q}' has shape \(8, 9\), and its part"),
    "an endless shape": (lambda t: t["tensors"][Q].update(shape=[1 << 60] * 3), r"and its part"),
    "a task's number": (lambda t: t["tensors"][Q].update(tasks=[0, 7]), r"tasks should be numbers below 2"),
    "by_entry": (lambda t: t["tensors"][Q].update(by_entry=False), r"by_entry should be true, found False"),
    "a layout": (lambda t: t["tensors"][Q].update(layout="xyz"), r"layout should be a letter of b, o and i"),
    "a dtype": (lambda t: t["tensors"][Q].update(dtype="float7"), r"is not whole, or was changed.*float7"),
    "a number that is none": (lambda t: t["scales"].update(a=float("nan")), r"scales should be finite"),
    "heads of a path": (
        lambda t: t.update(tasks=["../a", "b"], scales={"../a": 1, "b": 1}, heads={"../a": ["x"]}),
        r"task '../a' cannot be a file's name",
    ),
    "heads of none": (lambda t: t.update(heads={"z": ["x"]}), r"unknown task 'z'"),
    "heads that are a list": (lambda t: t.update(heads=["a"]), r"was changed"),
    "a config that is none": (lambda t: t.update(configs={"a": 3}), r"configs objects"),
    "a tensor twice": (lambda t: t["tensors"][Q].update(also=[BIAS]), r"a tensor is told of twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_was_changed_is_told_before_anything_is_made_of_it(family, tmp_path, case):
    change, message = WRONG[case]
    shutil.copytree(family / "out", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "composition.json").read_text())
    change(table)
    (tmp_path / "out" / "composition.json").write_text(json.dumps(table))
    with pytest.raises(CfmergeError, match=message) as told:
        compose.load(tmp_path / "out")
    assert "composition.json" in str(told.value)


def test_a_part_that_the_table_does_not_tell_of_is_told(family, tmp_path):
    shutil.copytree(family / "out", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file({**load_file(file), f"more/{Q}": np.zeros(1, np.float32)}, file)
    with pytest.raises(CfmergeError, match=rf"tensor 'more/{Q}' is not in composition.json"):
        compose.load(tmp_path / "out")
