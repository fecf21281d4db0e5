"""Files beside the weights are carried at any depth, but for the weights once more; nothing is left out in silence."""

import pytest
from laid import laid, ones

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.side_files import check_whole, side_files

CARRIED = [
    "config.json", "spiece.model", "tokenizer.model", "a/b/c/deep.txt", "mel_filters.npz", "speakers/one.pt",
    "sparse_linear.pt", "colbert_linear.pt", "processor.bin", "faiss.index.json", "code/modeling.py", "LICENSE",
    "1_Pooling/README.md", "model_args.json",
]  # fmt: skip
COPIES = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.pt", "model.fp16.ckpt", "m.Q4_K_M.gguf",
    "openvino_model.bin",
]  # fmt: skip
COPY_FOLDERS = ["onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "original/params.json"]
TRAINING = ["optimizer.pt", "optimizer_0/x.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin",
            "checkpoint-7/config.json", "runs/events.out"]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    text = dict.fromkeys([*CARRIED, *COPIES, *COPY_FOLDERS, *TRAINING, ".git/config", "README.md"], "{}")
    text["pytorch_model.bin.index.json"] = '{"weight_map": {}}'
    return open_checkpoint(laid(tmp_path / "m", {"model.safetensors": ones("a"), **text}))


def test_what_is_carried(model):
    assert set(model.side_files) == set(CARRIED)


def test_what_is_not_carried_is_told(model):
    told = "\n".join(model.left_out)
    assert f"{len(COPIES) + len({name.split('/')[0] for name in COPY_FOLDERS}) - 6} more: not in the output" in told
    assert "checkpoint-7/" in told
    assert "copied from" in told
    assert "mel_filters.npz" in told
    assert "not merged" in told


def test_side_files_of_another_directory_are_no_weights(tmp_path):
    names = ["config.json", "vocab.txt", "pytorch_model.bin", "model.safetensors.index.json", "x/model.safetensors"]
    path = laid(tmp_path / "m", dict.fromkeys(names, '{"weight_map": {}}'))
    assert set(side_files(path)) == {"config.json", "vocab.txt"}


def test_a_link_to_nothing_is_told(tmp_path):
    path = laid(tmp_path / "m", {"model.safetensors": ones("a")})
    (path / "tokenizer.json").symlink_to("blobs/none")
    model = open_checkpoint(path)
    assert "tokenizer.json" not in model.side_files
    assert any("tokenizer.json" in note and "not there" in note for note in model.left_out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_link_to_nothing_that_matters_is_an_error(tmp_path, name):
    path = laid(tmp_path / "m", {"other.safetensors": ones("a")})
    (path / name).symlink_to("blobs/none")
    with pytest.raises(CfmergeError, match=r"is a link to blobs/none, which is not there"):
        open_checkpoint(path)


def test_a_pointer_of_git_lfs_is_no_side_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    model = open_checkpoint(laid(tmp_path / "m", {"model.safetensors": ones("a"), "tokenizer.json": pointer}))
    with pytest.raises(CfmergeError, match=r"tokenizer.json: is a Git LFS pointer.*git lfs pull"):
        check_whole(model.side_files)
