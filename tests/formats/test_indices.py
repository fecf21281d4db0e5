"""Several safetensors in one directory: the index decides, whatever its stem; the others are told and not read."""

import json

import numpy as np
import pytest
from laid import index, laid, ones

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint


def refused(path, *words):
    with pytest.raises(CfmergeError) as caught:
        open_checkpoint(path)
    for word in words:
        assert word in str(caught.value)


def value(model, name):
    return float(model.read(name)[0, 0])


def test_the_index_decides_where_a_tensor_is_in_two_files(tmp_path):
    """An overlay holds the new copy, a shard still the old one; a shard that nothing points to is not opened."""
    where = {"a": "model-00001-of-00001.safetensors", "b": "model-overlay.safetensors"}
    model = open_checkpoint(laid(tmp_path, {
        "model-00001-of-00001.safetensors": ones("a") | ones("b", value=9), "model-overlay.safetensors": ones("b"),
        "stale.safetensors": b"no safetensors at all", "model.safetensors.index.json": index(where),
    }))  # fmt: skip
    assert [value(model, name) for name in ("a", "b")] == [1, 1]
    assert any("'b' is read from model-overlay.safetensors, not from model-00001" in note for note in model.notes)
    assert any("stale.safetensors: not read" in note for note in model.notes)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16"),
        ("model.fp16.safetensors.index.json", "model.fp16"),
        ("unet.safetensors.index.json", "unet"),
    ],
)
def test_an_index_of_any_stem(tmp_path, name, stem):
    where = {"a": "x-1.safetensors", "b": "x-2.safetensors"}
    files = {"x-1.safetensors": ones("a"), "x-2.safetensors": ones("b"), name: index(where)}
    model = open_checkpoint(laid(tmp_path, files))
    assert set(model.tensors) == {"a", "b"}
    assert model.notes == model.left_out == ()
    (folder,) = model.folders
    assert (folder.stem, folder.index, folder.sharded) == (stem, name, True)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 3}, {"total_size": "many", "x": [1]}, "odd"])
def test_the_metadata_of_an_index_is_no_judge(tmp_path, metadata):
    files = {"a.safetensors": ones("a"), "model.safetensors.index.json": index({"a": "a.safetensors"}, metadata)}
    assert set(open_checkpoint(laid(tmp_path, files)).tensors) == {"a"}


def test_an_index_without_its_shards_does_not_hide_the_file_that_they_became(tmp_path):
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files = {"model.safetensors": ones("a", "b"), "model.safetensors.index.json": index(where)}
    assert set(open_checkpoint(laid(tmp_path, files)).tensors) == {"a", "b"}


def test_an_index_before_a_file_of_the_same_stem(tmp_path):
    where = {"a": "model-1.safetensors"}
    files = {"model.safetensors": ones("old"), "model-1.safetensors": ones("a")}
    model = open_checkpoint(laid(tmp_path, files | {"model.safetensors.index.json": index(where)}))
    assert set(model.tensors) == {"a"}
    assert any("model.safetensors: not read" in note for note in model.notes)


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (["model", "consolidated", "adapter_model", "model.fp16"], "model"),
        (["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"], "diffusion_pytorch_model"),
        (["model.fp16"], "model.fp16"),
        (["weights", "weights.fp16"], "weights"),
        (["weights", "consolidated", "optimizer"], "weights"),
        (["consolidated"], "consolidated"),
    ],
)
def test_the_file_that_is_the_model(tmp_path, there, read):
    model = open_checkpoint(laid(tmp_path, {f"{stem}.safetensors": ones(stem) for stem in there}))
    assert set(model.tensors) == {read}
    assert model.folders[0].stem == read
    assert all(any(f"{stem}.safetensors" in note for note in model.notes) or "more" in model.notes[0]
               for stem in there if stem != read)  # fmt: skip


def test_two_files_that_may_be_the_model(tmp_path):
    refused(laid(tmp_path, {"a.safetensors": ones("a"), "b.safetensors": ones("b")}), "2 safetensors files")


def test_two_indices_of_unknown_stems(tmp_path):
    files = {f"{x}.safetensors.index.json": index({x: f"{x}.safetensors"}) for x in "ab"}
    refused(laid(tmp_path, files | {"a.safetensors": ones("a")}), "2 indices", "a.safetensors.index.json")


def header(metadata):
    entries = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(entries if metadata == "missing" else {"__metadata__": metadata} | entries).encode()
    return len(text).to_bytes(8, "little") + text + np.ones(1, np.float32).tobytes()


@pytest.mark.parametrize(
    ("metadata", "kept", "odd"),
    [
        ("missing", {}, False),
        (None, {}, False),
        ({}, {}, False),
        ({"format": "pt"}, {"format": "pt"}, False),
        ({"recipe": {"alpha": 0.3, "ä": [1, None]}}, {"recipe": '{"alpha": 0.3, "ä": [1, null]}'}, True),
        ({"step": 3, "none": None, "yes": True, "list": []},
         {"step": "3", "none": "null", "yes": "true", "list": "[]"}, True),
    ],
)  # fmt: skip
def test_odd_metadata_is_no_corruption(tmp_path, metadata, kept, odd):
    (tmp_path / "m.safetensors").write_bytes(header(metadata))
    model = open_checkpoint(tmp_path / "m.safetensors")
    assert model.read("a").tolist() == [1]
    assert model.metadata == kept
    assert any("is not text" in note for note in model.notes) == odd


def test_a_range_of_the_flat_tensor_is_read(tmp_path):
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    model = open_checkpoint(laid(tmp_path, {"model.safetensors": {"a": tensor, "empty": tensor[:0]}}))
    assert model.read("a", 5, 3).tolist() == [5, 6, 7]
    assert model.read("a", 12, 0).tolist() == []
    assert model.read("empty", 0, 0).shape == (0,)
    assert model.grain("a") == 1
    with pytest.raises(IndexError, match="12 entries"):
        model.read("a", 10, 3)


def test_files_of_something_else_in_a_folder(tmp_path):
    """Which of them is a model is not asked, where nothing says that the folder belongs to the model."""
    files = {f"loras/{name}.safetensors": ones(name) for name in "xy"}
    model = open_checkpoint(laid(tmp_path, {"model.safetensors": ones("a"), **files}))
    assert set(model.tensors) == {"a"}
    assert any("loras/x.safetensors" in note for note in model.left_out)
