"""Sinks: a directory that lies as the base does, or one file; whole or not at all."""

import errno
import json
import os

import numpy as np
import pytest
from laid import laid, ones
from safetensors import safe_open
from safetensors.numpy import load_file

from cfmerge.errors import CfmergeError
from cfmerge.formats import DirectorySink, FileSink, Folder, Totals, open_checkpoint, open_sink

TENSORS = ones("a", "b", "2_Dense/c", shape=(4, 4))
FOLDERS = (
    Folder(stem="weights", index="weights.safetensors.index.json", metadata={"x": "1"}), Folder("2_Dense/", "2_Dense")
)  # fmt: skip


def written(sink, tensors, totals=Totals()):  # noqa: B008
    with sink:
        sink.declare({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            sink.write(name, tensor.reshape(-1)[8:], 8)
            sink.write(name, tensor.reshape(-1)[:8])
        sink.finish(totals)
        sink.commit()
    return sink


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_with_everything(tmp_path):
    source = laid(tmp_path / "in", {"config.json": {"a": 1}, "x/y.txt": "y"})
    side = {"config.json": source / "config.json", "x/y.txt": source / "x/y.txt"}
    sink = DirectorySink(
        tmp_path / "out", FOLDERS, shard_bytes=64, side_files=side, edits={"config.json": {"dtype": "float16"}}
    )  # fmt: skip
    written(sink, TENSORS, Totals("# card", [("e", ones("head"))]))
    shards = {f"weights-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert files(tmp_path / "out") == {
        "README.md", "config.json", "x/y.txt", "2_Dense/model.safetensors", "heads/e.safetensors",
        "weights.safetensors.index.json", *shards,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"a": 1, "dtype": "float16"}
    assert set(load_file(tmp_path / "out/2_Dense/model.safetensors")) == {"c"}
    with safe_open(tmp_path / "out/weights-00001-of-00002.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "x": "1"}
    assert set(open_checkpoint(tmp_path / "out").tensors) == {"a", "b", "2_Dense/c"}


def test_a_file_of_a_stem_that_no_client_shards_stays_whole(tmp_path):
    sink = DirectorySink(tmp_path / "out", [Folder(stem="vit", sharded=False)], shard_bytes=64)
    written(sink, ones("a", "b", shape=(4, 4)))
    assert files(tmp_path / "out") == {"vit.safetensors"}
    assert "one file" in sink.notes[0]


def test_one_file(tmp_path):
    sink = open_sink(tmp_path / "new/m.safetensors", shard_bytes=64, side_files={"c": tmp_path}, edits={}, recipe="r")
    assert isinstance(sink, FileSink)
    written(sink, ones("a", "b", shape=(4, 4)))
    assert files(tmp_path) == {"new/m.safetensors"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.safetensors"]
    with safe_open(tmp_path / "new/m.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "cfmerge.recipe": "r"}
    assert "not beside it" in sink.notes[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_file_over_what_is_there(tmp_path, overwrite):
    target = laid(tmp_path, {"m.safetensors": b"old"}) / "m.safetensors"
    sink = FileSink(target, overwrite=overwrite)
    if overwrite:
        written(sink, ones("a", shape=(4, 4)))
        assert set(load_file(target)) == {"a"}
    else:
        with pytest.raises(CfmergeError, match="exists already"):
            written(sink, ones("a", shape=(4, 4)))
        assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("content", [{}, {"x": "precious"}])
def test_one_file_over_a_directory(tmp_path, content):
    (tmp_path / "m.safetensors").mkdir()
    laid(tmp_path / "m.safetensors", content)
    with pytest.raises(CfmergeError, match="is not a file"):
        written(FileSink(tmp_path / "m.safetensors", overwrite=True), ones("a", shape=(4, 4)))
    assert (tmp_path / "m.safetensors").is_dir()


@pytest.mark.parametrize("name", ["m.gguf", "m.h5", "m.zip", "m.json", "M.ONNX"])
def test_the_name_of_another_file(tmp_path, name):
    with pytest.raises(CfmergeError, match=r"safetensors"):
        open_sink(tmp_path / name, shard_bytes=64, side_files={}, edits={})


@pytest.mark.parametrize("name", ["model-v1.5", "out", "llama.3"])
def test_the_name_of_a_directory(tmp_path, name):
    assert type(open_sink(tmp_path / name, shard_bytes=64, side_files={}, edits={})) is DirectorySink


def test_what_one_file_cannot_hold(tmp_path):
    with pytest.raises(CfmergeError, match="2_Dense; name a directory"):
        open_sink(tmp_path / "m.safetensors", FOLDERS, shard_bytes=64, side_files={}, edits={})
    with pytest.raises(CfmergeError, match="heads"):
        open_sink(tmp_path / "m.safetensors", shard_bytes=64, side_files={}, edits={}, heads=True)


@pytest.mark.parametrize("kind", [DirectorySink, FileSink])
@pytest.mark.parametrize("call", ["declare", "write", "finish", "commit"])
def test_a_full_disk_in_every_call(tmp_path, monkeypatch, kind, call):
    """A clear error, and nothing is left."""
    before = laid(tmp_path, {"in/x": "x"}) and files(tmp_path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"declare": "posix_fallocate", "write": "pwrite", "finish": "fsync", "commit": "fsync"}[call]
    sink = kind(tmp_path / "out.x" if kind is DirectorySink else tmp_path / "out.safetensors")
    steps = {
        "declare": lambda: sink.declare({"a": ((2, 2), np.dtype(np.float32))}),
        "write": lambda: sink.write("a", np.ones((2, 2), np.float32)),
        "finish": lambda: sink.finish(Totals()), "commit": sink.commit,
    }  # fmt: skip

    def all_steps():
        with sink:
            for name, step in steps.items():
                if name == call:
                    monkeypatch.setattr(os, where, full)
                step()

    with pytest.raises(CfmergeError, match="the disk is full; nothing was written"):
        all_steps()
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tensor_that_was_not_written(tmp_path):
    sink = DirectorySink(tmp_path / "out")
    with sink:
        sink.declare({"a": ((2, 2), np.dtype(np.float32))})
        with pytest.raises(CfmergeError, match="not wholly written: a"):
            sink.finish(Totals())
    assert list(tmp_path.iterdir()) == []


def test_abort_twice_and_after_commit(tmp_path):
    sink = written(DirectorySink(tmp_path / "out"), ones("a", shape=(4, 4)))
    sink.abort()
    sink.abort()
    assert files(tmp_path) == {"out/model.safetensors"}
