"""Orbax checkpoints: read as Orbax writes them in all its layouts, and written so that it restores them."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as v0
import pytest
from flips import flips, outcome
from orbax.checkpoint import v1 as ocp

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint, orbax_writer
from cfmerge.formats import orbax as reader
from cfmerge.formats.orbax import OrbaxCheckpoint
from cfmerge.formats.orbax_layout import is_orbax
from cfmerge.formats.orbax_writer import OrbaxWriter
from cfmerge.formats.ranges import Covered
from cfmerge.formats.shards import Unfit
from cfmerge.formats.side_files import side_files
from cfmerge.formats.trees import nested

BF16 = ml_dtypes.bfloat16
TREE = {
    "params": {
        "layer_0": {
            "kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.linspace(-1, 1, 4).astype(BF16)
        },
        "list": [np.ones(2, np.float16), np.full((1, 3), 7, np.int32)],
        "a.b/c": np.array(2.5, np.float32),
    },
    "batch_stats": {"mean": np.ones(3, np.float32)},
    "opt_state": [{"mu": np.zeros((3, 4), np.float32)}, None],
    "step": 5,
}  # fmt: skip
PARAMETERS = {
    "batch_stats/mean": TREE["batch_stats"]["mean"],
    "params/a.b/c": TREE["params"]["a.b/c"],
    "params/layer_0/bias": TREE["params"]["layer_0"]["bias"],
    "params/layer_0/kernel": TREE["params"]["layer_0"]["kernel"],
    "params/list/0": TREE["params"]["list"][0],
    "params/list/1": TREE["params"]["list"][1],
}


def standard(path: Path) -> Path:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, TREE)
    return path


def handled(path: Path, **options) -> Path:
    v0.Checkpointer(v0.PyTreeCheckpointHandler(**options)).save(path, TREE)
    return path


def managed(path: Path, steps=(2, 10), **items) -> Path:
    with v0.CheckpointManager(path) as manager:
        for step in steps:
            saved = {name: v0.args.StandardSave(item) for name, item in items.items()}
            manager.save(step, args=v0.args.Composite(**saved) if items else v0.args.StandardSave(TREE))
        manager.wait_until_finished()
    return path


def trained(path: Path) -> Path:
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpointer.save(7, TREE)
    return path


def saved(path: Path) -> Path:
    ocp.save(path, TREE)
    return path


def in_parts(path: Path) -> Path:
    ocp.partial.save(path, {"params": TREE["params"]})
    ocp.partial.save(path, {name: TREE[name] for name in ("batch_stats", "opt_state", "step")})
    ocp.partial.finalize(path)
    return path


LAYOUTS = {
    "v1": saved,
    "v1, the item": lambda path: saved(path) / "state",
    "v1 in parts": in_parts,
    "v1 with steps": trained,
    "v0": standard,
    "v0 of trees": lambda path: handled(path),
    "v0 with zarr 3": lambda path: handled(path, use_ocdbt=True, use_zarr3=True),
    "v0, a folder an array": lambda path: handled(path, use_ocdbt=False),
    "v0, a folder an array, zarr 3": lambda path: handled(path, use_ocdbt=False, use_zarr3=True),
    "v0 with steps": managed,
    "v0 with a step": lambda path: managed(path) / "2",
    "v0 with an item": lambda path: managed(path, state=TREE),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_of_orbax_are_read(tmp_path, layout):
    path = LAYOUTS[layout](tmp_path / "model")
    checkpoint = OrbaxCheckpoint(path)
    assert is_orbax(path)
    assert sorted(checkpoint.tensors) == sorted(PARAMETERS)
    for name, tensor in PARAMETERS.items():
        found, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
        assert found.tobytes() == tensor.tobytes()
        assert not found.flags.writeable
        assert checkpoint.read(name, 1, tensor.size - 1).tobytes() == tensor.reshape(-1)[1:].tobytes()
    notes = " ".join(checkpoint.notes)
    assert "step: scalar, not an array; not read" in notes
    assert "opt_state (1 array): no parameters of the model; not read" in notes
    assert ("step 10 is read, the newest of 2" in notes) == (layout in {"v0 with steps", "v0 with an item"})
    assert checkpoint.files
    assert all(file.is_file() for file in checkpoint.files)


def test_a_subtree_has_the_names_that_it_has_in_itself(tmp_path):
    path = saved(tmp_path / "model")
    assert sorted(OrbaxCheckpoint(path, "params/layer_0").tensors) == ["bias", "kernel"]
    assert list(OrbaxCheckpoint(path, "opt_state").tensors) == ["0/mu"]
    with pytest.raises(CfmergeError, match=r"no arrays below 'param'; did you mean 'params'"):
        OrbaxCheckpoint(path, "param")


def test_metadata_of_the_user_s_own_is_text(tmp_path):
    ocp.save(tmp_path / "model", {"w": np.ones(2)}, custom_metadata={"made": "here", "loss": 2.5})
    assert OrbaxCheckpoint(tmp_path / "model").metadata == {"made": "here"}


def counted(checkpoint: OrbaxCheckpoint, monkeypatch) -> list:
    """What is decoded, from now on."""
    decoded, inner = [], checkpoint._decoded
    monkeypatch.setattr(checkpoint, "_decoded", lambda *args: decoded.append(args) or inner(*args))
    return decoded


def test_chunks_are_decoded_once_for_all_pieces(tmp_path, monkeypatch):
    array = np.arange(20 * 6, dtype=np.float32).reshape(20, 6)
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 4 * 6 * 5
    with context:
        ocp.save(tmp_path / "chunks", {"w": array})
    ocp.save(tmp_path / "whole", {"w": array})
    for name, rows in (("chunks", 5), ("whole", 20)):
        checkpoint = OrbaxCheckpoint(tmp_path / name)
        assert checkpoint.grain("w") == 6 * rows
        decoded = counted(checkpoint, monkeypatch)
        pieces = [checkpoint.read("w", first, 8) for first in range(0, 120, 8)]
        assert np.array_equal(np.concatenate(pieces), array.reshape(-1))
        assert len(decoded) == 20 // rows
        assert not checkpoint._kept  # the last piece of a block lets it go
        for first, count in ((0, 120), (1, 119), (29, 62), (60, 30), (119, 1), (50, 0)):
            assert np.array_equal(checkpoint.read("w", first, count), array.reshape(-1)[first : first + count])
        assert len(checkpoint._kept) <= reader.KEPT


def test_several_items_are_asked_for(tmp_path):
    path = managed(tmp_path / "model", (3,), state=TREE, other={"w": np.ones(2)})
    with pytest.raises(CfmergeError, match=r"several items of arrays; name the one .*other or .*state"):
        OrbaxCheckpoint(path)
    assert list(OrbaxCheckpoint(path / "3" / "other").tensors) == ["w"]


@pytest.mark.parametrize(("model", "other"), [("model_params", "optimizer_state"), ("params", "state"), ("a", "opt")])
def test_the_item_of_the_model_is_known_beside_a_training_s(tmp_path, model, other):
    path = managed(tmp_path / "model", (3,), **{model: {"w": np.ones(2)}, other: {"mu": np.ones(2)}})
    found = OrbaxCheckpoint(path)
    assert list(found.tensors) == ["w"]
    assert f"{other}/: arrays that are not the model's, which is {model}/; not read" in found.notes


def test_unfinished_checkpoints_are_refused_or_passed_over(tmp_path):
    ocp.partial.save(tmp_path / "part", {"w": np.ones(2)})
    with pytest.raises(CfmergeError, match="has not finished this checkpoint"):
        OrbaxCheckpoint(tmp_path / "part.partial_save")
    path = managed(tmp_path / "model")
    shutil.copytree(path / "10", path / "11.orbax-checkpoint-tmp-17")
    checkpoint = OrbaxCheckpoint(path)
    assert "11.orbax-checkpoint-tmp-17: unfinished; not read" in checkpoint.notes
    assert "10" in checkpoint.files[0].parts
    with pytest.raises(CfmergeError, match="has not finished this checkpoint"):
        OrbaxCheckpoint(path / "11.orbax-checkpoint-tmp-17")
    (path / "10/default/manifest.ocdbt").unlink()
    with pytest.raises(CfmergeError, match=r"lacks manifest.ocdbt: Orbax has not finished"):
        OrbaxCheckpoint(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CfmergeError, match="holds no checkpoint of Orbax"):
        OrbaxCheckpoint(tmp_path / "empty")


def test_arrays_and_chunks_that_lack_are_named(tmp_path):
    path = handled(tmp_path / "model", use_ocdbt=False)
    (path / "params.layer_0.kernel/0.0").unlink()
    with pytest.raises(CfmergeError, match=r"model: tensor 'params/layer_0/kernel' cannot be read"):
        OrbaxCheckpoint(path).read("params/layer_0/kernel")
    shutil.rmtree(path / "params.layer_0.kernel")
    with pytest.raises(CfmergeError, match=r"model: tensor 'params/layer_0/kernel' cannot be opened"):
        OrbaxCheckpoint(path)


def changed(path: Path, change) -> Path:
    content = json.loads((path / "_METADATA").read_text())
    change(content)
    (path / "_METADATA").write_text(json.dumps(content))
    return path


def entry(*keys: object, kind: object = "np.ndarray") -> dict:
    return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": {"value_type": kind}}


ENTRIES = {
    "up": (entry("..", "other"), "cannot be opened"),  # it is called "...other"
    "up in a key": (entry("a/../../../other"), "outside its folder"),
    "absolute": (entry("/etc"), "outside its folder"),
    "zero": (entry("a\0"), "outside its folder"),
    "a number": (entry(3), "is no list of an Orbax checkpoint's arrays"),
    "no keys": (entry(), "is no list of an Orbax checkpoint's arrays"),
    "no kind": (entry("a", kind=None), "is no list of an Orbax checkpoint's arrays"),
    "twice": (entry("layer_0", "kernel"), "names two arrays 'layer_0/kernel'"),
    "a list": ([], "is no list of an Orbax checkpoint's arrays"),
    "not there": (entry("nowhere"), "tensor 'nowhere' cannot be opened"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_names_that_cannot_be_are_refused(tmp_path, case):
    added, words = ENTRIES[case]
    tree = {"layer_0/kernel": np.ones(2), "w": np.ones(2)}
    v0.Checkpointer(v0.PyTreeCheckpointHandler(use_ocdbt=False)).save(tmp_path / "model", nested(tree))
    path = changed(tmp_path / "model", lambda content: content["tree_metadata"].update(new=added))
    with pytest.raises(CfmergeError, match=words) as caught:
        OrbaxCheckpoint(path)
    assert str(path) in str(caught.value)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    path, other = handled(tmp_path / "model", use_ocdbt=False), handled(tmp_path / "other", use_ocdbt=False)
    shutil.rmtree(path / "params.layer_0.kernel")
    (path / "params.layer_0.kernel").symlink_to(other / "params.layer_0.kernel")
    with pytest.raises(CfmergeError, match="'params/layer_0/kernel' is a link to"):
        OrbaxCheckpoint(path)


def test_claims_that_the_files_cannot_hold_are_refused(tmp_path):
    path = handled(tmp_path / "model", use_ocdbt=False)
    file = path / "params.layer_0.kernel/.zarray"
    for chunks, shape in (([2**40, 4], [2**40, 4]), ([3, 4], [2**40, 4]), ([2**40, 2**20], [3, 4])):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chunks": chunks, "shape": shape}))
        with pytest.raises(CfmergeError, match="'params/layer_0/kernel'"):
            OrbaxCheckpoint(path)


CORRUPT = ["", "{", "[]", "3", '{"tree_metadata": 3}', "[" * 100_000, '{"tree_metadata": {"a": 1}}']


@pytest.mark.parametrize("number", range(len(CORRUPT)))
def test_a_corrupt_list_of_names_is_refused(tmp_path, number):
    path = standard(tmp_path / "model")
    (path / "_METADATA").write_text(CORRUPT[number])
    with pytest.raises(CfmergeError, match="_METADATA"):
        OrbaxCheckpoint(path)


TENSORS = PARAMETERS | {
    "params/f8": np.ones(3, ml_dtypes.float8_e4m3fn),
    "params/mask": np.array([True, False]),
    "params/z": np.array([1 + 2j], np.complex64),
    "params/model.layers.0.weight": np.arange(600, dtype=np.float64).reshape(20, 30),
}
HEADERS = {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def fill(writer: OrbaxWriter, names=tuple(TENSORS)) -> None:
    for name in reversed(names):
        tensor, half = TENSORS[name].reshape(-1), TENSORS[name].size // 2
        writer.write(name, tensor[half:], half)
        writer.write(name, tensor[:half])


def assert_equal(found, expected) -> None:
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), found, expected
    )
    assert jax.tree.all(same)


@pytest.mark.parametrize("version", ["v1", "v0"])
def test_orbax_restores_what_is_written(tmp_path, monkeypatch, version):
    monkeypatch.setattr(orbax_writer, "AT_ONCE", 100)
    monkeypatch.setattr(orbax_writer, "CHUNK", 1000)
    staging, out = tmp_path / ".staging", tmp_path / "out"
    staging.mkdir()
    (staging / "config.json").write_text("{}")
    writer = OrbaxWriter(staging, HEADERS, metadata={"format": "here"}, version=version)
    fill(writer)
    writer.sync()
    assert not is_orbax(staging)  # until it is closed
    writer.close()
    staging.rename(out)
    tree = nested(TENSORS)
    assert_equal(ocp.load(out, jax.tree.map(np.empty_like, tree)), tree)
    root = out / "state" if version == "v1" else out
    with v0.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(root, jax.tree.map(np.empty_like, tree)), tree)
    as_arrays = jax.tree.map(lambda _: v0.RestoreArgs(restore_type=np.ndarray), tree)
    assert_equal(v0.PyTreeCheckpointer().restore(root, restore_args=as_arrays), tree)
    checkpoint = OrbaxCheckpoint(out)
    assert checkpoint.metadata == {"format": "here"}
    assert not checkpoint.notes
    for name, tensor in TENSORS.items():
        assert checkpoint.read(name).tobytes() == tensor.tobytes()
    left = {part.name for part in out.iterdir()}
    v0_s = {"_METADATA", "d", "manifest.ocdbt", "ocdbt.process_0"}
    assert left >= {"config.json", "_CHECKPOINT_METADATA"} | ({"state"} if version == "v1" else v0_s)
    assert not [name for name in left if "arrays" in name]


@pytest.mark.parametrize("version", ["v1", "v0"])
def test_keys_with_a_slash_and_lists_come_out_as_they_were(tmp_path, version):
    """Gemma's keys are flat, `transformer/layer_0`; a client restores into the tree that it has."""
    tree = {
        "transformer/layer_0": {"w": np.arange(4, dtype=np.float32)},
        "layers": [{"w": np.ones(2, np.float32)}, {"w": np.zeros(3, np.float32)}],
        "plain": {"0": np.ones(1, np.float32)},
    }
    base = OrbaxCheckpoint(ocp.save(tmp_path / "base", tree) or tmp_path / "base")
    part = OrbaxCheckpoint(tmp_path / "base", "layers")
    assert part.keys == {"0/w": (0, "w"), "1/w": (1, "w")}
    headers = {name: (info.shape, info.dtype) for name, info in base.tensors.items()}
    (tmp_path / "out").mkdir()
    writer = OrbaxWriter(tmp_path / "out", headers, version=version, keys=base.keys)
    for name in headers:
        writer.write(name, base.read(name))
    writer.close()
    assert_equal(ocp.load(tmp_path / "out"), tree)
    root = tmp_path / "out" / ("state" if version == "v1" else "")
    with v0.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(root, jax.tree.map(np.empty_like, tree)), tree)


def test_a_list_that_lost_an_entry_is_none(tmp_path):
    tree = {"layers": [3, np.ones(2, np.float32)]}  # a number is no array, and is not read
    ocp.save(tmp_path / "base", tree)
    base = OrbaxCheckpoint(tmp_path / "base")
    (tmp_path / "out").mkdir()
    writer = OrbaxWriter(tmp_path / "out", {"layers/1": ((2,), np.dtype(np.float32))}, keys=base.keys)
    writer.write("layers/1", base.read("layers/1"))
    writer.close()
    assert_equal(ocp.load(tmp_path / "out"), {"layers": {"1": tree["layers"][1]}})


def test_side_files_beside_a_checkpoint_are_carried(tmp_path):
    """As cfmerge writes one over a model of Hugging Face's: config and tokenizer lie in the same directory."""
    path = handled(tmp_path / "step")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (path / name).write_text("{}")
    source = open_checkpoint(path)
    assert set(source.side_files) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert not open_checkpoint(managed(tmp_path / "run")).side_files
    assert set(side_files(path)) == set(source.side_files)  # where --side-files names it


def test_a_writer_goes_on_after_an_interruption(tmp_path, monkeypatch):
    names = list(TENSORS)
    first = OrbaxWriter(tmp_path, HEADERS)
    fill(first, names[:3])
    first.sync()
    first.abort()
    done = Covered((name, 0, TENSORS[name].size) for name in names[:3])
    second = OrbaxWriter(tmp_path, HEADERS, done=done)
    fill(second, names[3:5])
    third = OrbaxWriter(tmp_path, HEADERS, done=Covered())  # another process
    fill(third, names[5:])
    third.sync()
    third.abort()
    second.covers([(name, 0, TENSORS[name].size) for name in names[5:]])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.partial, "finalize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.close()
    assert not is_orbax(tmp_path)
    monkeypatch.undo()
    fourth = OrbaxWriter(tmp_path, HEADERS, done=Covered((name, 0, TENSORS[name].size) for name in names))
    fourth.close()
    assert_equal(ocp.load(tmp_path, jax.tree.map(np.empty_like, nested(TENSORS))), nested(TENSORS))
    with pytest.raises(Unfit):
        OrbaxWriter(tmp_path, HEADERS, done=Covered())


def test_a_tensor_that_was_not_written_makes_no_checkpoint(tmp_path):
    writer = OrbaxWriter(tmp_path, HEADERS)
    fill(writer, list(TENSORS)[1:])
    with pytest.raises(CfmergeError, match="not wholly written: batch_stats/mean"):
        writer.close()
    assert not is_orbax(tmp_path)


def test_what_orbax_loses_is_found_before_the_tensors_are_gone(tmp_path, monkeypatch):
    """Orbax 0.12.8 finds no parts whose directory has a hidden name, and finalizes a checkpoint without them."""
    writer = OrbaxWriter(tmp_path, HEADERS)
    fill(writer)
    monkeypatch.setattr(
        orbax_writer, "_save_v1", lambda made, file, metadata: ocp.save(made, {"params": {"z": np.ones(1)}})
    )
    with pytest.raises(CfmergeError, match=r"Orbax wrote 10 tensors otherwise than asked"):
        writer.close()
    assert not is_orbax(tmp_path)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"a": ((0, 3), np.dtype(np.float32))}, "a: a tensor without entries, which Orbax does not save"),
        ({name: ((1,), np.dtype(np.float32)) for name in ("a/b", "a.b")}, "cannot tell these names apart"),
        ({name: ((1,), np.dtype(np.float32)) for name in ("a/b", "a")}, "an array and a folder at once"),
        ({"a//b": ((1,), np.dtype(np.float32))}, "cannot tell these names apart"),
        ({"a": ((1,), np.dtype(ml_dtypes.int4))}, r"'a' \(int4\): a dtype that is not written"),
    ],
)
def test_what_orbax_does_not_hold_is_refused_before_anything_is_written(tmp_path, headers, words):
    with pytest.raises(CfmergeError, match=words):
        OrbaxWriter(tmp_path, headers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("layout", ["v1", "v0", "v0, a folder an array"])
def test_flipped_bits_give_an_error_or_the_same_tensors(tmp_path, count, layout):
    """Small arrays lie in nodes of OCDBT, which have a CRC-32C. Chunks in files of their own have none."""
    path = LAYOUTS[layout](tmp_path / "model")
    files = OrbaxCheckpoint(path).files
    checked = [file for file in files if file.name != "_METADATA"]
    found = [outcome(lambda: OrbaxCheckpoint(path), PARAMETERS) for _ in flips(checked, count)]
    assert set(found) <= ({"refused", "same"} if "folder" not in layout else {"refused", "same", *OTHER})
    assert "refused" in found
    names = [file for file in files if file.name == "_METADATA"]  # JSON without a checksum
    found = [outcome(lambda: OrbaxCheckpoint(path), PARAMETERS) for _ in flips(names, count // 2)]
    assert set(found) <= {"refused", "same", "other tensors"}


OTHER = ("other numbers", "other tensors")
