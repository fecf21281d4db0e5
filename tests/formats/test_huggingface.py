"""Model directories: shards, indices, ties, and what is not a model."""

import json
import shutil

import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint

INDEX = "model.safetensors.index.json"


def refused(path, *words):
    with pytest.raises(CfmergeError) as caught:
        open_checkpoint(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_a_model(tmp_path, llama, make_model, shards):
    model = open_checkpoint(make_model(tmp_path / "m", llama(), shards=shards))
    assert len(model.files) == shards
    assert set(model.tensors) == set(llama())
    for name, tensor in llama().items():
        assert model.tensors[name].shape == tensor.shape
        assert np.array_equal(model.read(name), tensor)
    assert model.config["model_type"] == "llama"
    assert set(model.side_files) == {"config.json"}


def test_reads_one_file(tmp_path, llama, make_model):
    directory = make_model(tmp_path / "m")
    model = open_checkpoint(directory / "model.safetensors")
    assert set(model.tensors) == set(llama())
    assert model.config == {}
    assert model.side_files == {}


def test_reads_a_directory_with_one_file_of_another_name(tmp_path, make_model, llama):
    directory = make_model(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert set(open_checkpoint(directory).tensors) == set(llama())


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", "sub/x.safetensors", ".."])
def test_index_may_not_point_outside(tmp_path, make_model, place):
    directory = make_model(tmp_path / "m", shards=2)
    (directory / "sub").mkdir()
    for path in (tmp_path / "elsewhere.safetensors", directory / "sub/x.safetensors"):
        shutil.copy(directory / "model-00001-of-00002.safetensors", path)
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = place
    (directory / INDEX).write_text(json.dumps(content))
    refused(directory, INDEX, repr(place), "outside")


def test_index_lists_a_tensor_that_its_shard_lacks(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(content))
    refused(directory, INDEX, "'model.ghost.weight'", "model-00001-of-00002.safetensors", "fetch it again")


def test_index_puts_a_tensor_into_the_wrong_shard(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    content = json.loads((directory / INDEX).read_text())
    place = content["weight_map"]["lm_head.weight"]
    other = {"1": "2", "2": "1"}[place[10]]
    content["weight_map"]["lm_head.weight"] = f"model-0000{other}-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(content))
    refused(directory, INDEX, "'lm_head.weight'", f"model-0000{other}")


def test_shard_with_a_tensor_that_the_index_does_not_list(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    content = json.loads((directory / INDEX).read_text())
    del content["weight_map"]["lm_head.weight"]
    (directory / INDEX).write_text(json.dumps(content))
    refused(directory, INDEX, "'lm_head.weight'", "does not list 1 tensors")


def test_the_same_tensor_in_two_shards(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors")
    refused(directory, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "both")


def test_missing_shard(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "model-00002-of-00002.safetensors", "missing", "fetch it again")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_broken_index(tmp_path, make_model, content):
    directory = make_model(tmp_path / "m", shards=2)
    (directory / INDEX).write_text(content)
    refused(directory, INDEX)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_broken_config(tmp_path, make_model, content):
    directory = make_model(tmp_path / "m")
    (directory / "config.json").write_bytes(content)
    refused(directory, "config.json", "JSON")


def test_pickles_only(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(tmp_path, "pytorch_model.bin", "truncated or corrupt")


def test_adapter(tmp_path, make_model):
    directory = make_model(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    refused(directory, "adapter", "as an expert")


def test_several_files_without_an_index(tmp_path, make_model):
    directory = make_model(tmp_path / "m", shards=2)
    (directory / INDEX).unlink()
    refused(directory, "2 safetensors files", "model-00001-of-00002.safetensors", INDEX)


def test_empty_directory(tmp_path):
    refused(tmp_path, str(tmp_path), "no weights", "model.safetensors")


def test_no_tensors(tmp_path, make_model):
    refused(make_model(tmp_path / "m", {}), "no tensors")


def test_missing_path(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such file or directory")


def test_name_on_the_hub():
    refused("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "hub", "hf download")


def test_side_files(tmp_path, make_model):
    directory = make_model(tmp_path / "m")
    wanted = {"config.json", "tokenizer.json", "LICENSE", "1_Pooling/config.json"}
    other = {"README.md", "optimizer.pt", ".hidden", ".cache/x", "checkpoint-10/config.json", "onnx/model.onnx"}
    for name in wanted | other:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    assert set(open_checkpoint(directory).side_files) == wanted


def test_ties(tmp_path, llama, make_model, llama_config):
    tied, untied = llama_config | {"tie_word_embeddings": True}, llama_config
    assert open_checkpoint(make_model(tmp_path / "a", config=untied)).ties == {}
    expected = {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_checkpoint(make_model(tmp_path / "b", config=tied)).ties == expected
    once = {name: tensor for name, tensor in llama().items() if name != "lm_head.weight"}
    model = open_checkpoint(make_model(tmp_path / "c", once, config=tied))
    assert model.ties == expected
    assert "lm_head.weight" not in model.tensors
