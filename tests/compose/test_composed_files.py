"""Composed results of files: the formula in NumPy, the same bytes whatever the pieces, formats, heads, ties, errors."""

import json

import ml_dtypes
import numpy as np
import pytest
from composed_parts import SYSTEMS, deltas_of, emr, models, truncated
from safetensors.numpy import load_file, save_file

import cfmerge
from cfmerge import compose
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError

Q, BIAS = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_model):
    """`(directory, tensors)` of a base and three experts, `base`, `a`, `b`, `c`."""
    folder, tensors = tmp_path_factory.mktemp("composed"), models()
    for name, own in zip(("base", *TASKS), tensors, strict=True):
        make_model(folder / name, own, None)
    return folder, tensors


def built(folder, output, system, **options):
    options = {"base": folder / "base", "experts": {task: folder / task for task in TASKS}} | options
    return compose.build(options.pop("base"), options.pop("experts"), system, output=output, **options)


def formula(system, tensors):
    """`{task: {name: model}}` in float64, of the papers' equations."""
    deltas, base = deltas_of(tensors), tensors[0]
    if system == "emr":
        unified, masks, scales = emr(deltas)
        own = {n: [scales[t] * masks[n][t] * unified[n] for t in range(3)] for n in deltas}
    elif system.startswith("tall"):
        summed = {n: d.sum(0) for n, d in deltas.items()}
        own = {
            n: [np.where(np.abs(x) > 0.5 * np.abs(summed[n] - x), summed[n], 0) for x in d] for n, d in deltas.items()
        }
    elif system == "tsv_c":
        own = {n: [truncated(x, min(x.shape) // 3) if x.ndim == 2 else x for x in d] for n, d in deltas.items()}
    else:
        kept = {n: d if "proj" in n else np.zeros_like(d) for n, d in deltas.items()}
        own = {n: [truncated(x, 3) if x.ndim == 2 else x for x in d] for n, d in kept.items()}
    return {task: {n: base[n] + own[n][t] for n in base} for t, task in enumerate(TASKS)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_materialised_model_is_the_papers_formula(family, tmp_path, system, contents):
    folder, tensors = family
    made = built(folder, tmp_path / "out", system)
    for task, expected in formula(system, tensors).items():
        done = compose.materialise(tmp_path / "out", task, tmp_path / task)
        found = load_file(done.output / "model.safetensors")
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-6)
            assert found[name].dtype == tensors[0][name].dtype
    again = compose.materialise(made, "b", tmp_path / "again")
    assert contents(again.output) == contents(tmp_path / "b")


@pytest.mark.parametrize("system", SYSTEMS)
def test_units_of_any_size_and_several_files_give_the_same_bytes(family, tmp_path, system, monkeypatch):
    folder, _ = family
    whole = built(folder, tmp_path / "whole", system)
    monkeypatch.setattr(cutting, "ENTRIES", 64)
    monkeypatch.setattr(cutting, "ROW", 32)
    monkeypatch.setattr(cutting, "STACKED", 1)
    cut = built(folder, tmp_path / "cut", system, memory="1MB", shard_size="600B")
    for name, parts in whole.parts.items():
        assert all(np.array_equal(values, cut.parts[name][part]) for part, values in parts.items())
    if whole.scales is not None:
        np.testing.assert_allclose(whole.scales, cut.scales, rtol=1e-5)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("system", SYSTEMS)
def test_trees_and_files_make_the_same_result_and_it_is_saved_and_loaded(family, tmp_path, system):
    folder, tensors = family
    files = built(folder, tmp_path / "out", system)
    trees = compose.build(tensors[0], dict(zip(TASKS, tensors[1:], strict=True)), system)
    trees.save(tmp_path / "saved")
    saved = compose.load(tmp_path / "saved")
    for one in (trees, saved):
        assert one.about.digests == files.about.digests
        for name, parts in files.parts.items():
            assert all(np.allclose(values, one.parts[name][part], atol=1e-6) for part, values in parts.items())
        assert one.about.entries == files.about.entries


def test_bfloat16_models_have_parts_in_bfloat16_or_in_the_dtype_that_is_asked_for(tmp_path, make_model):
    tensors = models(dtype=ml_dtypes.bfloat16)
    for name, own in zip(("base", *TASKS), tensors, strict=True):
        make_model(tmp_path / name, own, None)
    made = built(tmp_path, tmp_path / "out", "emr")
    assert made.parts[Q]["shared"].dtype == ml_dtypes.bfloat16
    wide = built(tmp_path, tmp_path / "wide", "emr", dtype="float32")
    assert wide.parts[Q]["shared"].dtype == np.float32
    only = built(tmp_path, tmp_path / "only", "emr", dtype="float32", experts={"a": tmp_path / "a"})
    done = compose.materialise(only, "a", tmp_path / "model")
    found = load_file(done.output / "model.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in tensors[1].items())  # one task is its expert


def test_formats_in_and_out(family, tmp_path):
    folder, tensors = family
    for name in ("base", *TASKS):
        cfmerge.convert(folder / name, tmp_path / f"{name}.npz")
    npz = {task: tmp_path / f"{task}.npz" for task in TASKS}
    made = built(folder, tmp_path / "out", "tsv_c", base=tmp_path / "base.npz", experts=npz)
    here = compose.materialise(made, "c", tmp_path / "c-again.npz")
    there = compose.materialise(made, "c", tmp_path / "c.msgpack", base=folder / "base")  # the same base elsewhere
    one, other = cfmerge.open(here.output), cfmerge.open(there.output)
    assert set(one) == set(other) == set(tensors[0])
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_rank_by_energy_keeps_that_share_of_every_layer(family, tmp_path):
    folder, tensors = family
    made = built(folder, tmp_path / "out", "smile(rank=0.7, gate=2)")
    for name, stack in deltas_of(tensors).items():
        if "up" in made.parts.get(name, {}):
            energies = np.linalg.svd(stack)[1] ** 2
            shares = np.cumsum(energies, 1) / energies.sum(1, keepdims=True)
            assert made.parts[name]["up"].shape[-1] == 1 + (shares < 0.7).sum(1).max()


def test_smile_says_what_it_leaves_at_the_base_and_can_keep_the_mean(family, tmp_path):
    folder, tensors = family
    planned = compose.plan(recipe(folder, "smile", {"rank": 3, "gate": 2}))
    (note,) = [note for note in planned.notes if "stay as in the base" in note]
    assert "model.norm.weight" in note
    assert "model.embed_tokens.weight" in note
    assert BIAS not in note
    made = built(folder, tmp_path / "out", "smile(rank=3, gate=2, others='mean')")
    done = compose.materialise(made, "a", tmp_path / "a")
    found = load_file(done.output / "model.safetensors")["model.norm.weight"]
    np.testing.assert_allclose(found, np.mean([one["model.norm.weight"] for one in tensors[1:]], 0), atol=1e-6)


def test_a_bias_stays_where_its_weight_does(family, tmp_path):
    folder, tensors = family
    rules = [{"match": "*q_proj.weight", "method": "keep-base"}]
    files = built(folder, tmp_path / "out", "smile(rank=3, gate=2)", rules=rules)
    trees = compose.build(tensors[0], tensors[1:], "smile(rank=3, gate=2)", rules=rules)
    for made in (files, trees):
        assert list(made.parts) == ["model.layers.0.mlp.up_proj.weight"]


def recipe(folder, system, parameters=None):
    return cfmerge.Recipe(str(folder / "base"), [str(folder / task) for task in TASKS], system, parameters or {})


def test_the_plan_tells_the_size_that_is_written(family, tmp_path):
    folder, _ = family
    planned = compose.plan(recipe(folder, "emr"))
    planned.run(tmp_path / "out")
    size = sum(array.nbytes for array in load_file(tmp_path / "out" / "model.safetensors").values())
    assert size == planned.bytes_to_write
    assert planned.prediction(calibrate=False).memory > 0


# --- heads, ties ---------------------------------------------------------------------------------------------------


def test_a_task_has_its_own_head_and_the_keys_of_its_config(tmp_path, make_model):
    tensors, config = models(), {"architectures": ["BertModel"], "model_type": "bert", "id2label": {"0": "x"}}
    make_model(tmp_path / "base", {**tensors[0], "classifier.weight": np.zeros((2, 8), np.float32)}, config)
    for t, task in enumerate(TASKS):
        head = np.full((t + 2, 8), t, np.float32)
        own = config | {"id2label": {str(n): f"{task}{n}" for n in range(t + 2)}}
        make_model(tmp_path / task, {**tensors[t + 1], "classifier.weight": head}, own)
    built(tmp_path, tmp_path / "out", "emr")
    made = compose.load(tmp_path / "out")
    assert made.heads["c"]["classifier.weight"].shape == (4, 8)
    done = compose.materialise(made, "c", tmp_path / "model")
    found = load_file(done.output / "model.safetensors")
    assert np.array_equal(found["classifier.weight"], np.full((4, 8), 2, np.float32))
    assert json.loads((done.output / "config.json").read_text())["id2label"]["3"] == "c3"


def test_tensors_that_are_tied_are_kept_once_and_written_under_both_names(tmp_path, make_model):
    tensors = models()
    for name, own in zip(("base", *TASKS), tensors, strict=True):
        tied = {**own, "lm_head.weight": own["model.embed_tokens.weight"]}
        make_model(tmp_path / name, tied, {"model_type": "llama", "tie_word_embeddings": True})
    made = built(tmp_path, tmp_path / "out", "tsv_c")
    assert sum("embed" in name or "lm_head" in name for name in made.parts) == 1
    done = compose.materialise(made, "b", tmp_path / "model")
    found = load_file(done.output / "model.safetensors")
    assert np.array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not np.array_equal(found["lm_head.weight"], tensors[0]["model.embed_tokens.weight"])


# --- what is wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def composed(family, tmp_path):
    folder, _ = family
    built(folder, tmp_path / "out", "emr")
    return tmp_path / "out"


def changed_table(composed, change):
    table = json.loads((composed / "composition.json").read_text())
    change(table)
    (composed / "composition.json").write_text(json.dumps(table))


def test_one_entry_of_the_base_that_has_changed_is_told(family, composed, tmp_path, make_model):
    _, tensors = family
    other = {name: value.copy() for name, value in tensors[0].items()}
    other[Q][7, 7] += 1e-6
    make_model(tmp_path / "other", other, None)
    with pytest.raises(CfmergeError, match=rf"other: tensor '{Q}' is not that of the base.*SHA-256.*expected"):
        compose.materialise(composed, "a", tmp_path / "model", base=tmp_path / "other")
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model*"))


def test_a_base_that_is_gone_is_told_with_the_way_out(composed, tmp_path):
    changed_table(composed, lambda table: table.update(base=str(tmp_path / "gone")))
    with pytest.raises(CfmergeError, match=r"gone.*made over the base.*--base"):
        compose.materialise(composed, "a", tmp_path / "model")


WRONG = {
    "another format": (lambda t: t.update(version=2), r"composition.json: should be 'cfmerge-composition', version 1"),
    "no tasks": (lambda t: t.pop("tasks"), r"composition.json: is not whole.*tasks"),
    "a scale is missing": (lambda t: t["scales"].pop("a"), r"composition.json: is not whole"),
    "an unknown tensor": (
        lambda t: t["tensors"].update({"new": t["tensors"].pop(Q)}), r"lacks '\w+/new', which composition.json tells of"
    ),
    "a tensor is not in the table": (lambda t: t["tensors"].pop(Q), rf"tensor '\w+/{Q}' is not in composition.json"),
    "another shape": (
        lambda t: t["tensors"][Q]["parts"]["shared"].update(shape=[4, 4]),
        rf"'shared/{Q}' is float32 \(8, 8\), expected float32 \(4, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_is_wrong_is_told(composed, case):
    change, message = WRONG[case]
    changed_table(composed, change)
    with pytest.raises(CfmergeError, match=message):
        compose.load(composed)


def test_files_that_are_not_whole_are_told(composed, tmp_path):
    file = composed / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(CfmergeError, match=r"model.safetensors.*truncated"):
        compose.load(composed)
    save_file({"x": np.zeros(1, np.float32)}, file)
    with pytest.raises(CfmergeError, match=r"lacks .*which composition.json tells of"):
        compose.load(composed)
    file.unlink()
    with pytest.raises(CfmergeError, match=r"out"):
        compose.load(composed)
    with pytest.raises(CfmergeError, match=r"holds no composed result"):
        compose.load(tmp_path)


def test_a_composed_result_is_no_model_and_its_systems_are_no_methods(family, composed, tmp_path):
    folder, _ = family
    with pytest.raises(CfmergeError, match=r"composed result, not a model.*cfmerge materialise"):
        cfmerge.merge(composed, [folder / "a", folder / "b"], output=tmp_path / "x")
    with pytest.raises(CfmergeError, match=r"emr makes a result that is not one checkpoint.*cfmerge compose"):
        cfmerge.merge(folder / "base", [folder / "a", folder / "b"], "emr", output=tmp_path / "x")
    with pytest.raises(CfmergeError, match=r"ties makes one checkpoint.*emr, smile, tall, tsv_c"):
        built(folder, tmp_path / "x", "ties")
    with pytest.raises(CfmergeError, match=r"gate=8 is not below the input width 8 of '.*_proj.weight'.*--rule"):
        built(folder, tmp_path / "x", "smile(gate=8)")
    assert not (tmp_path / "x").exists()
