"""Merges of models as they lie on people's disks: the output lies as the base does, and nothing is lost in silence."""

import json
import shutil

import numpy as np
import pytest
from laid import index, laid
from safetensors import safe_open
from safetensors.numpy import load_file

import cfmerge
from cfmerge.products.accumulate import accumulate


def tensors(number, *names, shape=(4, 4)):
    rng = np.random.default_rng(number)
    return {name: rng.standard_normal(shape).astype(np.float32) for name in names}


def merged(tmp_path, make, output="out", **options):
    """Models 0, 1, 2 of `make(number)` are laid out and merged by average: `(result, notes as one text)`."""
    paths = [laid(tmp_path / f"m{number}", make(number)) for number in range(3)]
    result = cfmerge.merge(paths[0], paths[1:], "average", output=tmp_path / output, **options)
    return result, "\n".join(result.notes)


def is_mean(found, make, file):
    one, two = (make(number)[file] for number in (1, 2))
    assert set(found) == set(one)
    for name in one:
        np.testing.assert_allclose(found[name], (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)


STEM = "diffusion_pytorch_model"
UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42"}


def test_a_component_of_diffusers_keeps_its_file_name(tmp_path):
    def make(number):
        return {f"{STEM}.safetensors": tensors(number, "mid.to_q.weight"), "config.json": UNET}

    result, _ = merged(tmp_path, make)
    is_mean(load_file(result.output / f"{STEM}.safetensors"), make, f"{STEM}.safetensors")
    assert "library_name: diffusers" in (result.output / "README.md").read_text()


def test_shards_of_diffusers_keep_their_names(tmp_path):
    names = ["a.to_q.weight", "b.to_q.weight"]

    def make(number):
        where = {name: f"{STEM}-0000{n}-of-00002.safetensors" for n, name in enumerate(names, 1)}
        files = {file: tensors(n, name) for n, (name, file) in enumerate(where.items(), 10 * number)}
        return {**files, f"{STEM}.safetensors.index.json": index(where), "config.json": UNET}

    result, _ = merged(tmp_path, make, shard_size="64B")
    content = json.loads((result.output / f"{STEM}.safetensors.index.json").read_text())
    for name, file in content["weight_map"].items():
        assert file.startswith(f"{STEM}-0000")
        assert set(load_file(result.output / file)) == {name}


def sentences(number, dense="model.safetensors"):
    paths = ["", "1_Pooling", "2_Dense"]
    return {
        "modules.json": [{"idx": n, "path": path, "type": "x"} for n, path in enumerate(paths)],
        "model.safetensors": tensors(number, "encoder.weight"), "config.json": {"model_type": "bert"},
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": number < 2},
        f"2_Dense/{dense}": tensors(9 + number, "linear.weight", shape=(2, 4)) if dense.startswith("model") else b"PK",
        "2_Dense/config.json": {"dtype": "float32"},
    }  # fmt: skip


def test_modules_of_sentence_transformers(tmp_path):
    result, notes = merged(tmp_path, sentences)
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        is_mean(load_file(result.output / file), sentences, file)
    assert "1_Pooling/config.json differs" in notes
    again = cfmerge.open_checkpoint(result.output)
    assert set(again.tensors) == {"encoder.weight", "2_Dense/linear.weight"}
    with pytest.raises(cfmerge.CfmergeError, match="name a directory"):
        cfmerge.merge(tmp_path / "m0", [tmp_path / "m1", tmp_path / "m2"], "average", output=tmp_path / "x.safetensors")
    merged_again = cfmerge.merge(
        tmp_path / "m0", [tmp_path / "m1", tmp_path / "m2"], "average", output=result.output, overwrite=True,
        dtype="float16",
    )  # fmt: skip
    assert load_file(result.output / "2_Dense/model.safetensors")["linear.weight"].dtype == np.float16
    assert json.loads((merged_again.output / "2_Dense/config.json").read_text()) == {"dtype": "float16"}


def test_a_module_in_a_format_that_is_not_read_is_the_bases_and_told(tmp_path):
    result, notes = merged(tmp_path, lambda number: sentences(number, "tf_model.h5"))
    assert (result.output / "2_Dense/tf_model.h5").read_bytes() == b"PK"
    assert "2_Dense/tf_model.h5: copied" in notes
    assert "2_Dense/tf_model.h5" in (result.output / "README.md").read_text()


def test_one_file_in_and_out(tmp_path):
    def make(number):
        return {"x.safetensors": tensors(number, "to_q.weight")}

    paths = [laid(tmp_path / f"m{number}", make(number)) / "x.safetensors" for number in range(3)]
    one = cfmerge.merge(paths[0], paths[1:], "average", output=tmp_path / "merged.safetensors")
    assert one.output == tmp_path / "merged.safetensors"
    is_mean(load_file(one.output), make, "x.safetensors")
    with safe_open(one.output, "numpy") as file:
        assert "method: average" in file.metadata()["cfmerge.recipe"]
    directory = cfmerge.merge(paths[0], paths[1:], "average", output=tmp_path / "out").output
    assert {path.name for path in directory.iterdir()} == {"x.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2", "merged.safetensors", "out"}


@pytest.mark.parametrize("place", ["the base", "in the base"])
def test_one_file_over_an_input(family, refused, place):
    output = family.base / ("model.safetensors" if place == "the base" else "new.safetensors")
    refused(["an input"], family.base, family.experts, output=output, overwrite=True)


def test_a_file_of_another_format_is_not_made(family, refused, tmp_path):
    refused([str(tmp_path / "out.gguf"), "NAME.safetensors"], family.base, family.experts, output=tmp_path / "out.gguf")


def test_heads_do_not_fit_one_file(family, refused, make_model, tmp_path, llama):
    heads = [make_model(tmp_path / x, llama(1) | {"score.weight": np.ones((2, 8), np.float32)}) for x in "ab"]
    refused(["heads", "name a directory"], family.base, heads, heads="export", output=tmp_path / "out.safetensors")


def test_experts_in_the_hubs_cache_are_called_by_their_repository(family, tmp_path):
    snapshots = []
    for number, name in enumerate(("alpha", "beta")):
        snapshots.append(tmp_path / f"models--org--{name}/snapshots" / (str(number + 1) * 40))
        shutil.copytree(family.experts[number], snapshots[-1])
    card = cfmerge.merge(family.base, snapshots, "average", output=tmp_path / "out").output / "README.md"
    assert "- org/alpha\n- org/beta\n" in card.read_text()
    assert "| alpha (org/alpha@111111111111) |" in card.read_text()
    assert "name: beta" in card.read_text()


def test_a_full_disk_while_statistics_are_accumulated(family, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(cfmerge.CfmergeError, match=r"output .*stats: it needs .* GB are free"):
        accumulate(family.base, family.experts, "average", output=tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_statistics_are_no_file(family, tmp_path):
    with pytest.raises(cfmerge.CfmergeError, match="name a directory"):
        accumulate(family.base, family.experts, "average", output=tmp_path / "stats.safetensors")
