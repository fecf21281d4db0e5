"""A streamed merge is the merge: the same as all at once, however it is cut, and the same bytes again."""

import json
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors
import yaml

import cfmerge
from cfmerge import methods
from cfmerge.engine import cutting
from cfmerge.recipe import load as load_recipe

METHODS = {
    "ace": {}, "average": {}, "task_arithmetic": {"scale": 0.4},
}  # fmt: skip
BF16 = np.dtype(ml_dtypes.bfloat16)


def weights_of(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_all_at_once(family, tmp_path, load, method):
    """To 1e-6 of the largest entry: XLA may fuse the steps of one compiled program otherwise than eager calls."""
    parameters = METHODS[method]
    cfmerge.merge(family.base, family.experts, method, parameters=parameters, output=tmp_path / "out")
    base, *experts = family.tensors
    expected = cfmerge.merge_params(base, experts, methods.make(method, parameters))
    found = load(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], np.asarray(tensor), rtol=0, atol=1e-6 * np.abs(tensor).max())
        assert not np.array_equal(found[name], base[name])


def assert_alike(one, other, method):
    """The same bytes; of ACE, whose solves of a stack have other last bits on some processors, the same numbers."""
    if method != "ace":
        assert weights_of(one) == weights_of(other)
        return
    found = cfmerge.open(other)
    for name, array in cfmerge.open(one).items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max())


@pytest.mark.parametrize("method", METHODS)
def test_stacks_and_pieces_do_not_matter(family, tmp_path, monkeypatch, method):
    """Tensors alone, in stacks, or in pieces of 64 entries: the same bytes."""
    cfmerge.merge(family.base, family.experts, method, output=tmp_path / "whole")
    for constant in ("ENTRIES", "STACKED"):
        monkeypatch.setattr(cutting, constant, 64)
    cfmerge.merge(family.base, family.experts, method, output=tmp_path / "cut")
    assert_alike(tmp_path / "whole", tmp_path / "cut", method)


def test_memory_does_not_matter(family, tmp_path):
    cfmerge.merge(family.base, family.experts, "ace", output=tmp_path / "much", memory="1GB")
    cfmerge.merge(family.base, family.experts, "ace", output=tmp_path / "little", memory=24_000)
    assert_alike(tmp_path / "much", tmp_path / "little", "ace")


@pytest.mark.parametrize("method", METHODS)
def test_order_of_experts_does_not_matter(family, tmp_path, load, method):
    """Up to the rounding of sums of another order."""
    cfmerge.merge(family.base, family.experts, method, output=tmp_path / "forth")
    cfmerge.merge(family.base, family.experts[::-1], method, output=tmp_path / "back")
    forth, back = load(tmp_path / "forth"), load(tmp_path / "back")
    for name, tensor in forth.items():
        np.testing.assert_allclose(back[name], tensor, rtol=0, atol=2e-6 * np.abs(tensor).max())


def test_shards_of_the_inputs_do_not_matter(family, make_model, tmp_path, load):
    sharded = [make_model(tmp_path / f"s{n}", tensors, shards=n + 2) for n, tensors in enumerate(family.tensors)]
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "one")
    cfmerge.merge(sharded[0], sharded[1:], "average", output=tmp_path / "many")
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert all(np.array_equal(one[name], many[name]) for name in one | many)


def test_same_bytes_again_and_for_every_hash_seed(family, tmp_path, contents):
    """Everything that is written, the card too; in other processes."""
    script = "import sys, cfmerge; cfmerge.merge(sys.argv[1], sys.argv[3:], 'ace', output=sys.argv[2])"
    cfmerge.merge(family.base, family.experts, "ace", output=tmp_path / "here")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, family.base, tmp_path / f"seed{seed}", *family.experts],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
        )
        for seed in (0, 7)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert contents(tmp_path / "seed0") == contents(tmp_path / "seed7") == contents(tmp_path / "here")


def test_lapack_has_one_thread_in_a_process_that_has_not_used_it(family, tmp_path):
    """Its threads fight with XLA's, and the last bits depend on their number."""
    script = """
        import sys, cfmerge, threadpoolctl
        seen = set()
        def progress(*_):
            seen.update(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
        cfmerge.merge(sys.argv[1], sys.argv[3:], "tsv_m", output=sys.argv[2], progress=progress)
        print(seen)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), family.base, tmp_path / "out", *family.experts]
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "{1}\n"


def test_inputs_are_not_changed(family, tmp_path, contents):
    before = contents(family.base.parent)
    for method in METHODS:
        cfmerge.merge(family.base, family.experts, method, output=tmp_path / method)
    assert contents(family.base.parent) == before


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float64)])
def test_the_base_dtype_is_kept(make_model, tmp_path, llama, load, dtype):
    """Computed in float32 (float64 for a float64 base) and rounded once. mergekit promotes to float32."""
    base = make_model(tmp_path / "base", llama(dtype=dtype))
    experts = [
        make_model(tmp_path / "e1", llama(1)),
        make_model(tmp_path / "e2", llama(2, dtype)),
        make_model(tmp_path / "e3", llama(3, np.float64)),
    ]
    cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    stored = [load(path) for path in experts]
    wide = np.float64 if dtype == np.float64 else np.float32
    for name, tensor in load(tmp_path / "out").items():
        assert tensor.dtype == dtype
        exact = sum(tensors[name].astype(wide).astype(np.float64) for tensors in stored) / 3
        error = np.abs(tensor.astype(np.float64) - exact)
        # half a unit of the dtype, and the rounding of the computation
        limit = np.abs(exact) * float(ml_dtypes.finfo(dtype).eps) / 2 + 8 * np.finfo(wide).eps * np.abs(exact).max()
        assert (error <= limit).all(), name


def test_ace_on_a_float64_base(make_model, tmp_path, llama, load):
    base, *experts = [
        make_model(tmp_path / f"m{number}", {k: v for k, v in llama(number, np.float64).items() if "q_proj" in k})
        for number in range(3)
    ]
    result = cfmerge.merge(base, experts, "ace", output=tmp_path / "out")
    assert not any("ill-conditioned" in note for note in result.notes)
    found = load(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float64)}
    tensors = [load(path) for path in (base, *experts)]
    single = [{name: tensor.astype(np.float32) for name, tensor in model.items()} for model in tensors]
    expected = cfmerge.merge_params(single[0], single[1:], methods.ace())
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, np.asarray(expected[name]), rtol=0, atol=2e-5)
        assert not np.array_equal(tensor, tensor.astype(np.float32))


def test_experts_of_mixed_dtypes(make_model, tmp_path, llama, load):
    """Tensors of one stack may be stored in different dtypes within one expert."""
    base = make_model(tmp_path / "base")
    tensors = llama(1)
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].astype([BF16, np.float16, np.float32, np.float64][number % 4])
    one, two = make_model(tmp_path / "one", tensors), make_model(tmp_path / "two", llama(2))
    cfmerge.merge(base, [one, two], "average", output=tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        expected = (tensors[name].astype(np.float64) + llama(2)[name]) / 2
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", "both", "none"])
def test_dtype_of_the_output(make_model, family, tmp_path, llama_config, load, key):
    """Tensors and config.json change, integers do not."""
    config = {k: v for k, v in llama_config.items() if k != "torch_dtype"}
    keys = {"both": ["torch_dtype", "dtype"], "none": []}.get(key, [key])
    buffers = {"model.position_ids": np.arange(4)}
    base = make_model(tmp_path / "base", family.tensors[0] | buffers, config | dict.fromkeys(keys, "float32"))
    cfmerge.merge(base, family.experts, "average", output=tmp_path / "out", dtype="bfloat16")
    found = load(tmp_path / "out")
    assert found.pop("model.position_ids").dtype == np.int64
    assert {tensor.dtype for tensor in found.values()} == {BF16}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | dict.fromkeys(keys or ["dtype"], "bfloat16")


def test_kept_tensors_get_the_dtype_too(family, tmp_path, load):
    rules = [{"match": "lm_head.weight", "method": "keep-base"}]
    cfmerge.merge(family.base, family.experts, "average", rules=rules, dtype="float16", output=tmp_path / "out")
    head = load(tmp_path / "out")["lm_head.weight"]
    assert head.dtype == np.float16
    assert np.array_equal(head, family.tensors[0]["lm_head.weight"].astype(np.float16))


def test_mean_in_bfloat16_is_rounded_once(make_model, tmp_path, load):
    """The mean of 1 + i/128, i = 0..6, is 1.0234375; sums in bfloat16 give 1.0156 (fusion_bench)."""

    def model(name, value):
        return make_model(tmp_path / name, {"model.norm.weight": np.full(8, value, BF16)})

    base = model("base", 1)
    experts = [model(f"e{i}", 1 + i / 128) for i in range(7)]
    cfmerge.merge(base, experts, "average", output=tmp_path / "out", allow=["base-as-expert"])
    assert load(tmp_path / "out")["model.norm.weight"].astype(float).tolist() == [1.0234375] * 8


def test_empty_and_scalar_tensors(make_model, tmp_path, load):
    def model(name, value):
        tensors = {
            "logit_scale": np.array(value, np.float32), "empty.weight": np.zeros((0, 4), np.float32),
            "norm.weight": np.full(8, value, np.float32),
        }  # fmt: skip
        return make_model(tmp_path / name, tensors)

    models = [model("a", 0), model("b", 1), model("c", 2)]
    cfmerge.merge(models[0], models[1:], "average", output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert found["logit_scale"].shape == ()
    assert found["logit_scale"] == 1.5
    assert found["empty.weight"].shape == (0, 4)


def test_weights_of_experts(family, tmp_path, load):
    """Weights 1 and 3 of one and 1 of another: 0.8 of the first (mergekit: 0.5)."""
    one, other = map(str, family.experts[:2])
    experts = [cfmerge.Expert(one, "a", 1), cfmerge.Expert(one, "b", 3), cfmerge.Expert(other, "c", 1)]
    cfmerge.merge(family.base, experts, "average", output=tmp_path / "out", allow=["duplicate-experts"])
    for name, tensor in load(tmp_path / "out").items():
        expected = 0.8 * family.tensors[1][name].astype(float) + 0.2 * family.tensors[2][name]
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)


# --- what lies beside the tensors ---------------------------------------------------------------------------------


def test_output_shards(family, tmp_path, load, llama):
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "one")
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "many", shard_size="1000B")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    for shard in shards:
        with safetensors.safe_open(shard, "numpy") as file:
            listed = {name for name, place in index["weight_map"].items() if place == shard.name}
            assert set(file.keys()) == listed
    tensors = llama()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert all(np.array_equal(one[name], many[name]) for name in one | many)
    again = cfmerge.merge(tmp_path / "many", family.experts, "average", output=tmp_path / "again")
    assert len(again.plan.base.files) == len(shards)


def test_side_files(family, tmp_path, contents):
    for name in ("tokenizer.json", "generation_config.json", "1_Pooling/config.json", "LICENSE"):
        (family.base / name).parent.mkdir(exist_ok=True)
        (family.base / name).write_text(f'"{name} ä"')
    (family.base / "README.md").write_text("the base's own card")
    (family.experts[0] / "special.json").write_text("{}")
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
    before, after = contents(family.base), contents(tmp_path / "out")
    for name in before:
        same = name not in {"README.md", "model.safetensors"}
        assert (after[name] == before[name]) == same, name
    assert set(after) == set(before)
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "named", side_files=str(family.experts[0]))
    assert set(contents(tmp_path / "named")) == {"README.md", "model.safetensors", "config.json", "special.json"}


def test_side_files_that_are_not_there(family, refused, tmp_path):
    refused(["side_files", "nowhere"], family.base, family.experts, side_files=str(tmp_path / "nowhere"))


def test_card(family, tmp_path, contents):
    """Front matter of the hub, the SHA-256 of every input, counts, versions."""
    result = cfmerge.merge(family.base, family.experts, "ace", output=tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["base_model"] == ["m0", "m1", "m2", "m3"]
    assert {"merge", "cfmerge", "ace"} <= set(told["tags"])
    assert told["library_name"] == "transformers"
    sums = contents(family.base.parent)
    for number in range(4):
        assert sums[f"m{number}/model.safetensors"] in body
    assert sorted(result.digests.values()) == sorted(sums[f"m{n}/model.safetensors"] for n in range(4))
    assert "| matrix | ace | 6 |" in body
    assert f"cfmerge {cfmerge.__version__}" in body


def test_names_of_the_hub_in_the_card(family, make_model, tmp_path, llama_config):
    base = make_model(tmp_path / "b", config=llama_config | {"_name_or_path": "org/base-model"})
    cfmerge.merge(base, family.experts, "average", output=tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert front["base_model"][0] == "org/base-model"


def test_merge_again_from_the_card(family, tmp_path, contents, monkeypatch):
    """Every option of the recipe is in the card; relative paths are those of the working directory."""
    monkeypatch.chdir(tmp_path)
    (family.base / "tokenizer.json").write_text("{}")
    result = cfmerge.merge(
        "in/m0", [cfmerge.Expert("in/m1", "größte", 0.5), cfmerge.Expert("in/m2"), cfmerge.Expert("in/m3", weight=2)],
        "task_arithmetic", parameters={"scale": "0.25"}, output="out", dtype="bfloat16", shard_size="700B",
        rules=[{"match": "*.up_proj.*", "method": "keep-base"}, {"match": "lm_head.*", "method": "skip"}],
    )  # fmt: skip
    recipe = load_recipe(result.output / "README.md")
    assert recipe.parameters == {"scale": 0.25, "normalise": False}
    again = cfmerge.merge_recipe(recipe, "again")
    assert contents(again.output) == contents(result.output)


def test_ace_again_from_the_card(family, tmp_path, contents):
    result = cfmerge.merge(family.base, family.experts, "ace", parameters={"eps": 1e-5}, output=tmp_path / "out")
    again = cfmerge.merge_recipe(load_recipe(result.output / "README.md"), tmp_path / "again")
    assert contents(again.output) == contents(result.output)


def test_reports_and_progress(family, tmp_path, llama):
    """Progress adds up to what the plan said; reports name every solved tensor."""
    read = []
    result = cfmerge.merge(
        family.base, family.experts, "ace", output=tmp_path / "out", progress=lambda name, count: read.append(count)
    )
    assert sum(read) == result.plan.bytes_to_read == 4 * sum(tensor.nbytes for tensor in llama().values())
    assert set(result.reports) == {name for name in llama() if "_proj" in name}
    assert all("gate" in report for report in result.reports.values())
