"""Merges of models of different initialisation: the recipe's key `align`."""

import json

import flax.serialization
import numpy as np
import pytest
from space_models import GROUPED, TEXT, config_of, headers_of, outputs, saved, tensors_of, with_tensors

import cfmerge
from cfmerge import compose
from cfmerge.align import permute, random_permutations
from cfmerge.engine import cutting
from cfmerge.formats import journal
from cfmerge.models.space_tables import spaces_of
from cfmerge.products import carry_out

MLP = {"up.weight": (12, 6), "up.bias": (12,), "down.weight": (3, 12), "down.bias": (3,)}
TABLE = """
spaces:
  up.weight: hidden, in -
  up.bias: hidden
  down.weight: -, in hidden
  down.bias: "-"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mlps(here, make_model):
    """A base, an expert that is the base with noise and its neurons in another order, and a table of the spaces."""
    generator = np.random.default_rng(0)
    base = {name: np.asarray(generator.normal(size=shape), np.float32) for name, shape in MLP.items()}
    order = generator.permutation(12)
    noisy = {name: tensor + 0.01 * np.asarray(generator.normal(size=tensor.shape), np.float32)
             for name, tensor in base.items()}  # fmt: skip
    down = np.ascontiguousarray(noisy["down.weight"][:, order])  # the library writes arrays as they lie
    twin = {"up.weight": noisy["up.weight"][order], "up.bias": noisy["up.bias"][order], "down.weight": down,
            "down.bias": noisy["down.bias"]}  # fmt: skip
    make_model(here / "base", base, config={})
    make_model(here / "twin", twin, config={})
    (here / "spaces.yaml").write_text(TABLE)
    return base, noisy


def merged(name="out"):
    from safetensors.numpy import load_file

    return load_file(f"{name}/model.safetensors")


HOW = {"allow": ["one-expert"], "align": {"spaces": "spaces.yaml"}}


def test_an_expert_is_brought_into_the_order_of_the_base(mlps):
    result = cfmerge.merge("base", ["twin"], "average", output="out", **HOW)
    for name, tensor in merged().items():
        np.testing.assert_allclose(tensor, mlps[1][name], atol=1e-6)
    assert any("'twin' to 'base' by weights: inner product" in note for note in result.notes)
    assert "align:" in cfmerge.recipe.load("out/README.md").to_yaml()


def test_the_base_may_be_one_of_the_experts(mlps):
    cfmerge.merge("base", ["base", "twin"], "average", output="out", align=HOW["align"])
    for name, tensor in merged().items():
        np.testing.assert_allclose(tensor, (mlps[0][name] + mlps[1][name]) / 2, atol=1e-6)


def test_all_models_take_the_order_of_an_expert(mlps):
    cfmerge.merge("base", ["base", "twin"], "average", output="out", align={"spaces": "spaces.yaml", "to": "twin"})
    cfmerge.merge("base", ["base", "twin"], "average", output="ours", align=HOW["align"])
    theirs, ours = merged(), merged("ours")
    for name in ("up.weight", "up.bias"):
        np.testing.assert_allclose(np.sort(theirs[name].ravel()), np.sort(ours[name].ravel()), atol=1e-6)
    assert not np.allclose(theirs["up.bias"], ours["up.bias"])


@pytest.mark.parametrize("method", ["ties", "ace", "task_arithmetic", "tsv_m"])
def test_any_method_follows_and_small_memory_changes_nothing(mlps, here, make_model, method):
    make_model(here / "aligned", mlps[1], config={})
    make_model(here / "third", {name: tensor * 1.5 for name, tensor in mlps[0].items()}, config={})
    cfmerge.merge("base", ["third", "aligned"], method, output="expected")
    cfmerge.plan("base", ["third", "twin"], method, align=HOW["align"]).run(
        "out", memory="1KB" if method in {"ties", "task_arithmetic"} else None
    )
    for name, tensor in merged("expected").items():
        np.testing.assert_allclose(merged()[name], tensor, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("BertForSequenceClassification", TEXT), ("LlamaForCausalLM", GROUPED)],
    ids=["bert", "llama"],
)
def test_a_permuted_twin_merges_to_what_the_base_computes(here, kind, settings):
    base = saved(here / "base", kind, **settings)
    spaces = spaces_of(headers_of(base), config_of(base))
    twin = with_tensors(base, here / "twin", permute(spaces, tensors_of(base), random_permutations(spaces, 3)))
    cfmerge.merge("base", ["base", "twin"], "average", output="out", align={}, allow=["duplicate-experts"])
    np.testing.assert_allclose(outputs(here / "out", kind), outputs(twin, kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["many", "universe"])
def test_several_models_are_matched_at_once(mlps, here, make_model, method):
    order = np.random.default_rng(5).permutation(12)
    down = np.ascontiguousarray(mlps[0]["down.weight"][:, order])
    third = {"up.weight": mlps[0]["up.weight"][order], "up.bias": mlps[0]["up.bias"][order], "down.weight": down,
             "down.bias": mlps[0]["down.bias"]}  # fmt: skip
    make_model(here / "third", third, config={})
    result = cfmerge.merge(
        "base", ["third", "twin"], "average", output="out", align={"spaces": "spaces.yaml", "method": method}
    )
    for name, tensor in merged().items():
        np.testing.assert_allclose(tensor, (mlps[0][name] + mlps[1][name]) / 2, atol=1e-6)
    assert any(f"align: 3 models at once to 'base' by {method}:" in note for note in result.notes)


def test_models_are_matched_by_their_activations(mlps, here):
    def hidden(path):
        model = cfmerge.open_checkpoint(here / path)
        return np.maximum(x @ model.read("up.weight").T + model.read("up.bias"), 0)

    x = np.random.default_rng(1).normal(size=(200, 6))
    moments = cfmerge.align.Moments(("base", "twin"))
    moments.add("hidden", [hidden("base"), hidden("twin")])
    moments.save("joint.safetensors")
    how = {"spaces": "spaces.yaml", "method": "activations", "moments": "joint.safetensors"}
    cfmerge.merge("base", ["twin"], "average", output="out", align=how, allow=["one-expert"])
    for name, tensor in merged().items():
        np.testing.assert_allclose(tensor, mlps[1][name], atol=1e-6)
    with pytest.raises(cfmerge.CfmergeError, match="has moments of base, twin, none of 'other'; they go by the names"):
        cfmerge.merge("base", {"other": "twin"}, "average", output="again", align=how, allow=["one-expert"])
    assert not (here / "again").exists()
    own = cfmerge.align.Moments(("one", "other"))
    own.add("hidden", [hidden("base"), hidden("twin")])
    own.save("own.safetensors")  # of the experts alone, of which the base is one
    cfmerge.merge(
        "base", {"one": "base", "other": "twin"}, "average", output="again", align={**how, "moments": "own.safetensors"}
    )
    np.testing.assert_allclose(
        merged("again")["down.weight"], (mlps[0]["down.weight"] + mlps[1]["down.weight"]) / 2, atol=1e-6
    )


def test_heads_of_other_tasks_are_permuted_and_not_matched(here):
    base = saved(here / "base", "BertForSequenceClassification", **TEXT)
    spaces = spaces_of(headers_of(base), config_of(base))
    twin = permute(spaces, tensors_of(base), random_permutations(spaces, 3))
    twin["classifier.weight"] = np.concatenate([twin["classifier.weight"]] * 2)
    twin["classifier.bias"] = np.concatenate([twin["classifier.bias"]] * 2)
    with_tensors(base, here / "twin", twin)
    result = cfmerge.merge(
        "base", ["twin"], "average", output="out", align={}, allow=["one-expert"], heads="export"
    )  # fmt: skip
    exported = next((here / "out").rglob("*twin*/*.safetensors"), None) or next(
        (here / "out").rglob("*twin*.safetensors")
    )
    from safetensors.numpy import load_file

    head = next(tensor for name, tensor in load_file(exported).items() if name.endswith("classifier.weight"))
    np.testing.assert_allclose(head[:2], tensors_of(base)["classifier.weight"], atol=1e-6)
    assert any("not in all models in one shape, so not matched" in note for note in result.notes)


def test_a_part_of_a_model_has_a_part_of_the_spaces(here):
    base = saved(here / "first", "BertForSequenceClassification", **TEXT)
    spaces = spaces_of(headers_of(base), config_of(base))
    twin = permute(spaces, tensors_of(base), random_permutations(spaces, 3))
    lower = {name: tensor for name, tensor in twin.items() if "layer.1." not in name}
    with_tensors(base, here / "lower", lower)
    pooled = {name: tensor for name, tensor in twin.items() if "classifier" not in name}
    with_tensors(base, here / "pooled", pooled)
    with_tensors(base, here / "encoder", {name: tensor for name, tensor in pooled.items() if "pooler" not in name})
    for part in ("lower", "encoder"):
        cfmerge.merge(
            "first", [cfmerge.Expert(part, partial=True)], "average", output=f"out-{part}", **HOW | {"align": {}}
        )
        for name, tensor in merged(f"out-{part}").items():
            np.testing.assert_allclose(tensor, tensors_of(base)[name], atol=1e-6)
    with pytest.raises(cfmerge.CfmergeError, match=r"'pooled' .*nothing .* reads the space 'pooler' .*pooler\.dense"):
        cfmerge.merge("first", [cfmerge.Expert("pooled", partial=True)], "average", output="out", **HOW | {"align": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"align": {"to": "tvin", "spaces": "spaces.yaml"}},
            "expected base or an expert's name, found 'tvin'; did you",
        ),
        ({"align": {"spaces": "nowhere.yaml"}}, r"align: base .*nowhere\.yaml"),
        ({"align": {}}, "spaces: no table is for this model"),
        ({"align": {"spaces": "spaces.yaml"}, "layers": [{"range": [0, 1]}]}, "leave `align` or `layers` out"),
        (
            {"align": {}, "vocabulary": "union"},
            "`vocabulary: union` gives the base rows of experts, in their own order",
        ),
        ({"align": {}, "vocabulary": "twin"}, "`vocabulary: twin` gives the base rows of experts, in their"),
        ({"align": {"methods": "weights"}}, "unknown key 'methods'"),
        ({"align": {"method": "activations"}}, "method activations needs `moments: FILE`"),
        ({"align": {"moments": "joint.safetensors"}}, "method weights looks at weights, and takes no `moments`"),
        (
            {"align": {"method": "activations", "moments": "no.file", "spaces": "spaces.yaml"}},
            r"align: no\.file: cannot be read: No such file",
        ),
        (
            {"align": {"method": "weigths"}},
            r"align\.method: expected one of weights, many, universe, activations, found 'weigths'",
        ),
        ({"align": {"spaces": "spaces.yaml", "seed": -1}}, "the seed must lie in"),
        ({"align": {"spaces": "spaces.yaml", "sweeps": -1}}, "sweeps: expected a number of at least 0, found -1"),
    ],
    ids=[
        "to",
        "file",
        "family",
        "layers",
        "union",
        "vocabulary",
        "key",
        "no moments",
        "moments",
        "no file",
        "method",
        "seed",
        "sweeps",
    ],
)
def test_what_cannot_be_aligned_is_refused_before_anything_is_written(mlps, here, changes, message):
    with pytest.raises(cfmerge.CfmergeError, match=message):
        cfmerge.merge("base", ["twin"], "average", output="out", **{"allow": ["one-expert"], **changes})
    assert not (here / "out").exists()


def test_an_expert_that_is_called_base_and_is_another_model_is_refused(mlps, here, make_model):
    make_model(here / "other/base", mlps[1], config={})
    for experts in (["other/base", "twin"], {"base": "twin", "other": "other/base"}):
        with pytest.raises(cfmerge.CfmergeError, match=r"expert 'base' .* has the name that stands for the base"):
            cfmerge.merge("base", experts, "average", output="out", align=HOW["align"])
    cfmerge.merge("base", ["base", "twin"], "average", output="out", align=HOW["align"], unmerged="twin")


def test_what_changes_the_base_as_it_lies_is_aligned_to_the_base_alone(mlps, here):
    how = {"align": {"spaces": "spaces.yaml", "to": "twin"}, "allow": ["one-expert"]}
    for why, make in {
        "an adapter": lambda: cfmerge.merge("base", ["twin"], "average", output="out", adapter_out=2, **how),
        "statistics": lambda: cfmerge.accumulate("base", ["twin"], "ace", output="out", **how),
        "a composed result": lambda: compose.build("base", ["twin"], "emr", output="out", **how),
        "`unmerged`": lambda: cfmerge.merge("base", ["twin"], "average", output="out", unmerged="twin", **how),
    }.items():
        with pytest.raises(cfmerge.CfmergeError, match=f"align: to: twin: {why} .* align to the base"):
            make()
    cfmerge.accumulate("base", ["twin"], "ace", output="sums", **HOW)
    how = {"align": {"spaces": "spaces.yaml", "to": "again"}}
    with pytest.raises(cfmerge.CfmergeError, match="align: to: again: statistics are of changes of the base"):
        cfmerge.merge("base", {"again": "twin"}, "ace", statistics="sums", output="out", **how)
    assert not (here / "out").exists()


def test_moments_of_an_expert_that_is_permuted_are_refused(mlps, here, make_model):
    make_model(here / "moments", {"up.weight": np.eye(6, dtype=np.float32)})
    experts = [cfmerge.Expert("base"), cfmerge.Expert("twin", moments="moments")]
    with pytest.raises(cfmerge.CfmergeError, match=r"'twin' has moments \(moments\), which are in its own order"):
        cfmerge.merge("base", experts, "regmean", output="out", align=HOW["align"])


@pytest.mark.parametrize("method", ["weights", "many", "universe"])
def test_a_model_that_is_not_finite_is_named_or_left_out(mlps, here, make_model, method):
    broken = {name: tensor.copy() for name, tensor in mlps[1].items()}
    broken["up.weight"][2, 3] = np.nan
    make_model(here / "broken", broken, config={})
    how = {"output": "out", "align": {"spaces": "spaces.yaml", "method": method}}
    with pytest.raises(cfmerge.CfmergeError, match=r"'broken' .*'up\.weight' holds NaN or infinity.*skip-expert"):
        cfmerge.merge("base", ["base", "twin", "broken"], "average", **how)
    result = cfmerge.merge("base", ["base", "twin", "broken"], "average", on_nonfinite="skip-expert", **how)
    assert any("expert 'broken' was left out" in note for note in result.notes)
    for name, tensor in merged().items():
        np.testing.assert_allclose(tensor, (mlps[0][name] + mlps[1][name]) / 2, atol=1e-6)
    with pytest.raises(cfmerge.CfmergeError, match=r"base \(broken\): tensor 'up\.weight' holds NaN"):
        cfmerge.merge("broken", {"first": "base", "second": "twin"}, "average", **how | {"output": "again"})


@pytest.mark.parametrize("touched", [False, True], ids=["same table", "table touched"])
def test_a_merge_that_was_stopped_recalls_the_permutations(mlps, here, monkeypatch, touched):
    class Stopped(journal.FileJournal):
        def mark(self, ranges, told=None):
            super().mark(ranges, told)
            raise KeyboardInterrupt

    monkeypatch.setattr(cutting, "ENTRIES", 12)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    found, weight_matching = [], cfmerge.align.weight_matching
    monkeypatch.setattr(cfmerge.align, "weight_matching", lambda *a, **k: found.append(1) or weight_matching(*a, **k))
    cfmerge.merge("base", ["base", "twin"], "average", output="whole", align=HOW["align"])
    with monkeypatch.context() as patched:
        patched.setattr(carry_out, "FileJournal", Stopped)
        with pytest.raises(KeyboardInterrupt):
            cfmerge.merge("base", ["base", "twin"], "average", output="out", align=HOW["align"])
    if touched:
        (here / "spaces.yaml").write_text(TABLE + "# another table, for all that is known\n")
    found.clear()
    result = cfmerge.merge("base", ["base", "twin"], "average", output="out", align=HOW["align"])
    assert (bool(found), bool(result.resumed)) == (touched, not touched)
    assert (here / "out/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_models_of_other_widths_are_refused(mlps, here, make_model):
    wide = {"up.weight": np.ones((13, 6), np.float32), "up.bias": np.ones(13, np.float32),
            "down.weight": np.ones((3, 13), np.float32), "down.bias": np.ones(3, np.float32)}  # fmt: skip
    make_model(here / "wide", wide, config={})
    with pytest.raises(cfmerge.CfmergeError, match=r"shape|13 elements in the space 'hidden'"):
        cfmerge.merge("base", ["wide"], "average", output="out", **HOW)


def test_batch_norms_are_refused_without_leave(here):
    saved(here / "base", "ResNetForImageClassification", **RESNET)
    with pytest.raises(cfmerge.CfmergeError, match=r"running statistics of BatchNorm.*--allow batch-norm"):
        cfmerge.merge("base", ["base"], "average", output="out", align={}, allow=["one-expert"])
    allowed = ["one-expert", "batch-norm"]
    cfmerge.merge("base", ["base"], "average", output="out", align={}, allow=allowed)


def test_batch_norms_of_a_flax_checkpoint_are_refused_without_leave(here):
    tree = {"params": {"Dense_0": {"kernel": np.eye(3)}, "Dense_1": {"kernel": np.eye(3)}},
            "batch_stats": {"BatchNorm_0": {"mean": np.ones(3), "var": np.ones(3)}}}  # fmt: skip
    for name in ("base", "other"):
        (here / f"{name}.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    own = {"params/Dense_0/kernel": "in -, h", "params/Dense_1/kernel": "in h, -",
           "batch_stats/BatchNorm_0/mean": "h", "batch_stats/BatchNorm_0/var": "h"}  # fmt: skip
    (here / "own.yaml").write_text(json.dumps({"spaces": own}))
    with pytest.raises(cfmerge.CfmergeError, match=r"align: batch_stats/\S+ .*: running statistics of BatchNorm"):
        cfmerge.merge(
            "base.msgpack", ["other.msgpack"], "average", output="out.msgpack", align={"spaces": "own.yaml"},
            allow=["one-expert"],
        )  # fmt: skip


RESNET = {"num_channels": 3, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
