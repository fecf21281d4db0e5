"""Every format through the same doors: written by a sink, read by `open_checkpoint`, merged, gone on with."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from laid import laid, ones

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import Folder, Totals, open_checkpoint, open_sink
from cfmerge.formats.containers import FORMATS

RNG = np.random.default_rng(0)
TENSORS = {
    "layers/0/kernel": RNG.standard_normal((6, 4)).astype(np.float32),
    "layers/0/bias": RNG.standard_normal(4).astype(ml_dtypes.bfloat16),
    "layers/1/kernel": RNG.standard_normal((3, 4, 2)).astype(np.float16),
    "count": np.array([3, 4], np.int64),
}


def written(target, format, tensors=TENSORS, folder=None, **how):
    headers = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    sink = open_sink(
        target, [folder or Folder()], shard_bytes=1 << 30, side_files={}, edits={}, format=format, **how
    )  # fmt: skip
    with sink:
        sink.declare(headers)
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1)
            sink.write(name, flat[2:], 2)
            sink.write(name, flat[:2], 0)
        sink.finish(Totals())
        sink.commit()
    return target


def assert_same(found, tensors=TENSORS):
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = found.read(name)
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, tensor)
        np.testing.assert_array_equal(found.read(name, 1, 1), tensor.reshape(-1)[1:2])


@pytest.mark.parametrize("format", FORMATS)
def test_a_directory_in_every_format(tmp_path, format):
    found = open_checkpoint(written(tmp_path / "out", format))
    assert_same(found)
    assert found.folders[0].format == format
    assert all(file.is_file() for file in found.files)


@pytest.mark.parametrize(
    ("format", "suffix"), [(name, suffix) for name, one in FORMATS.items() for suffix in one.suffixes]
)
def test_one_file_of_every_suffix(tmp_path, format, suffix):
    assert_same(open_checkpoint(written(tmp_path / f"m{suffix}", None)))
    with pytest.raises(CfmergeError, match="is the ending of a file of format"):
        written(tmp_path / f"n{suffix}", "npz" if format != "npz" else "torch")


@pytest.mark.parametrize("format", FORMATS)
def test_a_tensor_with_two_names(tmp_path, format):
    """Where a format can share it, it is stored once; else under both names."""
    tensors = {"a": np.arange(4.0), "b": np.ones(3)}
    found = open_checkpoint(written(tmp_path / "out", format, tensors, Folder(ties={"z": "a"})))
    if FORMATS[format].shares:
        assert found.ties["z"] == "a"
        assert set(found.tensors) == {"a", "b"}
    else:
        np.testing.assert_array_equal(found.read("z"), tensors["a"])


@pytest.mark.parametrize("format", FORMATS)
def test_a_merge_of_models_in_every_format_is_that_of_safetensors(tmp_path, format):
    models = {name: {k: (v + seed).astype(v.dtype) if v.dtype.kind != "i" else v for k, v in TENSORS.items()}
              for seed, name in enumerate("bcd")}  # fmt: skip
    for kind in dict.fromkeys(["safetensors", format]):
        for name, tensors in models.items():
            written(tmp_path / kind / name, kind, tensors)
        experts = [tmp_path / kind / "c", tmp_path / kind / "d"]
        cfmerge.merge(tmp_path / kind / "b", experts, "task_arithmetic", output=tmp_path / kind / "out")
    plain, own = (open_checkpoint(tmp_path / kind / "out") for kind in ("safetensors", format))
    assert_same(own, {name: plain.read(name) for name in plain.tensors})
    assert own.folders[0].format == format


def test_models_in_several_formats_and_an_output_in_another(tmp_path):
    a, b, c = (ones("layer.weight", value=value, shape=(4, 4)) for value in (0, 1, 3))
    written(tmp_path / "a", "torch", a)
    written(tmp_path / "b", "npz", b)
    laid(tmp_path / "c", {"model.safetensors": c, "config.json": {}})
    result = cfmerge.merge(tmp_path / "a", [tmp_path / "b", tmp_path / "c"], "average", output=tmp_path / "m.pt")
    loaded = torch.load(result.output, weights_only=True, mmap=True)
    assert loaded["layer.weight"].tolist() == [[2.0] * 4] * 4
    out = cfmerge.merge(
        tmp_path / "c", [tmp_path / "b"], "average", output=tmp_path / "out", format="torch", allow=["one-expert"]
    ).output
    assert {file.name for file in out.iterdir()} == {"pytorch_model.bin", "config.json", "README.md"}


def test_shards_of_pytorch(tmp_path):
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    where = {"a.weight": "pytorch_model-00001-of-00002.bin", "b.weight": "pytorch_model-00002-of-00002.bin"}
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    laid(
        tmp_path, {"pytorch_model.bin.index.json": {"weight_map": where}, "config.json": {}, "training_args.bin": b"x"}
    )
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == set(where)
    assert found.folders[0].index == "pytorch_model.bin.index.json"
    cfmerge.merge(tmp_path, [tmp_path], "average", output=tmp_path.parent / "out", shard_size="20B",
                  allow=["one-expert", "base-as-expert"])  # fmt: skip
    index = json.loads((tmp_path.parent / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == where


def test_safetensors_beside_pickles_are_read(tmp_path):
    torch.save({"old": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(laid(tmp_path, {"model.safetensors": ones("new")})).tensors) == {"new"}


def test_a_part_of_a_file_is_named(tmp_path):
    file = tmp_path / "run.ckpt"
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}, file)
    with pytest.raises(CfmergeError, match=r"run\.ckpt::ema"):
        open_checkpoint(file)
    assert open_checkpoint(f"{file}::ema").read("w").tolist() == [1.0, 1.0]


def test_meta_s_pieces_are_refused(tmp_path):
    for number in range(2):
        torch.save({"w": torch.zeros(2)}, tmp_path / f"consolidated.{number:02d}.pth")
    with pytest.raises(CfmergeError, match="cut for several devices"):
        open_checkpoint(tmp_path)


def test_a_wrapped_base_gives_a_wrapped_output(tmp_path):
    """Its tensors stand under the same entry; what stood beside them is not carried, and a note says so."""
    for seed, name in enumerate("bcd"):
        state = {"layer.weight": torch.full((2, 2), float(seed))}
        torch.save({"state_dict": state, "epoch": seed}, tmp_path / f"{name}.ckpt")
    result = cfmerge.merge(
        tmp_path / "b.ckpt", [tmp_path / "c.ckpt", tmp_path / "d.ckpt"], "average", output=tmp_path / "out.ckpt"
    )
    loaded = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert set(loaded) == {"state_dict"}
    assert loaded["state_dict"]["layer.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert any("not read: epoch" in note for note in result.notes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tie_that_the_metadata_of_safetensors_tells_is_kept_in_every_format(tmp_path, format):
    tensors = {"table.weight": np.arange(8, dtype=np.float32).reshape(4, 2)}
    base = written(tmp_path / "base", "safetensors", tensors, Folder(ties={"head.weight": "table.weight"}))
    cfmerge.convert(base, tmp_path / "out", format=format)
    found = open_checkpoint(tmp_path / "out")
    assert {*found.tensors, *found.ties} == {"table.weight", "head.weight"}
    np.testing.assert_array_equal(found.read(found.ties.get("head.weight", "head.weight")), tensors["table.weight"])
