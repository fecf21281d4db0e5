"""Tensors are read by name from any format, and written into any: whole or not at all, with their bits."""

import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats.containers import FORMATS


def tensors():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((3, 4)).astype(ml_dtypes.bfloat16),
        "a.weight": np.asfortranarray(rng.standard_normal((5, 2))),
        "total": np.array(7),
        "none": np.zeros((0, 3), np.float32),
    }


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_directory_and_a_file_of_every_format(tmp_path, name):
    given = {key: array for key, array in tensors().items() if array.size or not name.startswith("orbax")}
    files = [tmp_path / f"model{suffix}" for suffix in FORMATS[name].suffixes[:1]]
    for target in (tmp_path / "model", *files):
        assert cfmerge.save(given, target, name) == target
        found = cfmerge.open(target)
        same(found, given)
        assert len(found) == len(given)
        assert found.tensors["b.weight"].shape == (3, 4)
        assert "b.weight" in found
        assert "c.weight" not in found


def test_arrays_are_read_only_views(tmp_path, make_model, llama):
    model = cfmerge.open(make_model(tmp_path / "model", llama(0)))
    assert model.config["model_type"] == "llama"
    with pytest.raises(ValueError, match="read-only"):
        model["lm_head.weight"][0] = 0
    with pytest.raises(KeyError):
        model["lm_head"]
    assert repr(model) == f"<11 tensors of {tmp_path / 'model'}>"


def test_torch_and_trees(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2).bfloat16()
    found = cfmerge.open(cfmerge.save(module, tmp_path / "module"))
    assert list(found) == ["bias", "weight"] or list(found) == ["weight", "bias"]
    assert found["weight"].tobytes() == module.weight.detach().view(torch.int16).numpy().tobytes()
    tree = {"params": [{"kernel": np.ones((2, 2))}, {"kernel": np.zeros((2, 2))}]}
    found = cfmerge.open(cfmerge.save(tree, tmp_path / "tree.safetensors"))
    assert sorted(found) == ["params/0/kernel", "params/1/kernel"]


def test_shards(tmp_path):
    cfmerge.save(tensors(), tmp_path / "model", shard_size="60")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    same(cfmerge.open(tmp_path / "model"), tensors())


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(CfmergeError, match="unknown format 'zip'; there is: safetensors"):
        cfmerge.save(tensors(), tmp_path / "out", "zip")
    with pytest.raises(CfmergeError, match="save: 'step' is no array"):
        cfmerge.save({**tensors(), "step": "3"}, tmp_path / "out")
    cfmerge.save(tensors(), tmp_path / "out")
    with pytest.raises(CfmergeError, match="out"):
        cfmerge.save({"other": np.ones(1)}, tmp_path / "out")
    same(cfmerge.open(tmp_path / "out"), tensors())
    cfmerge.save({"other": np.ones(1)}, tmp_path / "out", overwrite=True)
    assert list(cfmerge.open(tmp_path / "out")) == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
