"""Files that are named by mistake: each says what it is, and the way out."""

import pytest
from laid import laid, ones

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n"
WRONG = {
    "config.json": (b"{}", ["holds no tensors", "name the model's directory"]),
    "model.safetensors.index.json": (b'{"weight_map": {}}', ["index of shards", "name the directory"]),
    "model.safetensors": (b"", ["is empty", "fetch it again"]),
    "pointer.safetensors": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "pytorch_model.bin": (b"PK\3\4" + b"0" * 60, ["truncated or corrupt", "fetch the file again"]),
    "old.pt": (b"\x80\x02\x8a\x0a" + b"0" * 60, ["Python pickle", "torch.save did not write"]),
    "old.ckpt": (b"0" * 600, ["not a file that torch.save wrote"]),
    "model.gguf": (b"GGUF" + b"\0" * 60, ["GGUF", "gguf_file"]),
    "tf_model.h5": (b"\x89HDF\r\n" + b"0" * 60, ["HDF5", "from_tf"]),
    "page.bin": (b"<!DOCTYPE html>" + b" " * 600, ["not a file that torch.save wrote"]),
    "cut.safetensors": (b"\x80" + b"\0" * 7 + b'{"a": ', ["not a safetensors file, or truncated"]),
    "arrays.npz": (b"PK\3\4" + b"0" * 60, ["corrupt", "fetch"]),
    "model.tar.gz": (b"\x1f\x8b" + b"0" * 60, ["archive", "unpack"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_by_mistake(tmp_path, name):
    content, words = WRONG[name]
    with pytest.raises(CfmergeError) as caught:
        open_checkpoint(laid(tmp_path, {name: content}) / name)
    for word in [str(tmp_path / name), *words]:
        assert word in str(caught.value)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    """640 bytes: the first two bytes of the file are those of a pickle."""
    path = laid(tmp_path, {"m.safetensors": ones("a")}) / "m.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(640)
    path.write_bytes((640).to_bytes(8, "little") + header + content[8 + length :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert set(open_checkpoint(path).tensors) == {"a"}


def test_safetensors_under_another_name(tmp_path):
    path = laid(tmp_path, {"m.safetensors": ones("a")}) / "m.safetensors"
    assert set(open_checkpoint(path.rename(tmp_path / "m.bin")).tensors) == {"a"}


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "m").symlink_to("none")
    with pytest.raises(CfmergeError, match="is a link to none, which is not there"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "flax_model.msgpack"])
def test_weights_that_are_a_link_to_nothing(tmp_path, name):
    (tmp_path / name).symlink_to("none")
    with pytest.raises(CfmergeError, match="is a link to none, which is not there"):
        open_checkpoint(tmp_path)
    assert set(open_checkpoint(laid(tmp_path, {"model.safetensors": ones("a")})).tensors) == {"a"}


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CfmergeError, match="no weights here"):
        open_checkpoint(tmp_path)


def test_an_expert_that_is_a_link_in_a_circle(tmp_path):
    laid(tmp_path, {"m.safetensors": ones("a")})
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    with pytest.raises(CfmergeError, match=r"is a link to loop\.pt, which is not there"):
        cfmerge.plan(tmp_path / "m.safetensors", [tmp_path / "loop.pt", tmp_path / "m.safetensors"], "average")


@pytest.mark.parametrize(("name", "way_out"), [("model.gguf", "gguf_file"), ("tf_model.h5", "from_tf")])
def test_a_directory_of_another_format_only(tmp_path, name, way_out):
    with pytest.raises(CfmergeError) as caught:
        open_checkpoint(laid(tmp_path, {name: WRONG[name][0], "config.json": {}}))
    for word in (str(tmp_path), name, way_out):
        assert word in str(caught.value)
