"""PyTorch's distributed checkpoints: torch's own writers and readers are the oracle."""

import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from laid import headers_of, in_pieces
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.boxes import Box, boxes_of, tile
from cfmerge.formats.distributed import DistributedCheckpoint
from cfmerge.formats.distributed_files import distributed
from cfmerge.formats.shards import ShardWriter
from cfmerge.formats.torch_archives import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4), "b": torch.randn(3).bfloat16(), "s": torch.tensor(3.5), "e": torch.zeros(0, 2),
        "f8": torch.randn(4).to(torch.float8_e4m3fn), "u16": torch.arange(3).to(torch.uint16),
    }  # fmt: skip


def saved(directory: Path, state: dict, **how) -> Path:
    dcp.save(state, storage_writer=FileSystemWriter(directory, **how), no_dist=True)
    return directory


def everything(model: DistributedCheckpoint) -> dict:
    return {name: (info.shape, info.dtype.name, model.read(name).tobytes()) for name, info in model.tensors.items()}


def changed_index(directory: Path, change) -> Path:
    """The checkpoint after `change(metadata)`, torch's own object."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, 4))
    return directory


def split(directory: Path, name: str) -> Path:
    """A checkpoint whose 6x4 tensor lies in three chunks: two rows, and two halves of the other four."""
    tensor = weights()["a.weight"]
    boxes = [((0, 0), (2, 4)), ((2, 0), (4, 2)), ((2, 2), (4, 2))]
    parts = {str(number): tensor[a : a + n, b : b + m].contiguous() for number, ((a, b), (n, m)) in enumerate(boxes)}
    saved(directory, {**parts, name: torch.zeros(6, 4)})

    def change(metadata):
        described = metadata.state_dict_metadata[name]
        described.chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(size)) for start, size in boxes]
        del metadata.storage_data[MetadataIndex(name, (0, 0))]
        for number, (start, _) in enumerate(boxes):
            del metadata.state_dict_metadata[str(number)]
            record = metadata.storage_data.pop(MetadataIndex(str(number), (0, 0)))
            metadata.storage_data[MetadataIndex(name, start, number)] = record

    return changed_index(directory, change)


def test_what_torch_saves_is_read_and_the_rest_is_left_out_with_a_note(tmp_path):
    state = {
        "model": {**weights(), "x._extra_state": {"scale": 2}},
        "optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(6, 4)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3}, "step": 7, "rng_state": torch.zeros(8, dtype=torch.uint8),
    }  # fmt: skip
    model = DistributedCheckpoint(saved(tmp_path / "step-7", state))
    assert set(model.tensors) == {f"model.{name}" for name in weights()}
    for name, tensor in weights().items():
        found = model.read(f"model.{name}")
        assert found.shape == tuple(tensor.shape)
        assert found.dtype == DTYPES[str(tensor.dtype).removeprefix("torch.")]
        assert found.tobytes() == numbers(tensor)
        for first in range(found.size + 1):
            part = model.read(f"model.{name}", first, found.size - first)
            assert part.tobytes() == found.reshape(-1)[first:].tobytes()
    assert [file.name for file in model.files] == ["__0_0.distcp"]
    (left_out,) = (note for note in model.notes if "left out" in note)
    assert all(word in left_out for word in ("optimizer.* (", "lr_scheduler.* (1)", "step", "rng_state"))
    assert any("objects that are no tensors" in note and "_extra_state" in note for note in model.notes)
    (name,) = model.opaque
    assert torch.load(io.BytesIO(model.content(name)), weights_only=True) == 2
    assert model.paths["model.a.weight"] == ("model", "a.weight")


def test_a_beginning_of_names_can_be_selected(tmp_path):
    directory = saved(tmp_path / "c", {"model": weights(), "optimizer": {"m": torch.ones(2)}})
    model = DistributedCheckpoint(directory, "optimizer.")
    assert list(model.tensors) == ["optimizer.m"]
    assert any("do not begin with 'optimizer.'" in note and "model.* (6)" in note for note in model.notes)
    with pytest.raises(CfmergeError, match=r"begins with 'ema'; there is: model\.\* \(6\)"):
        DistributedCheckpoint(directory, "ema")


def test_a_range_reads_the_chunks_that_it_touches(tmp_path):
    model = DistributedCheckpoint(split(tmp_path / "c", "w"))
    expected = weights()["a.weight"].numpy()
    assert (model.read("w") == expected).all()
    for first in range(25):
        for count in range(25 - first):
            assert (model.read("w", first, count) == expected.reshape(-1)[first : first + count]).all()
    model = DistributedCheckpoint(tmp_path / "c")
    looked_at = []
    chunk = model._chunk
    model._chunk = lambda name, own, *rest: looked_at.append(own.box.start) or chunk(name, own, *rest)
    model.read("w", 8, 2)
    assert looked_at == [(2, 0)]
    model.read("w", 9, 2)
    assert looked_at == [(2, 0), (2, 0), (2, 2)]


def test_files_in_safetensors_form_are_read(tmp_path):
    own = {"serialization_format": SerializationFormat.SAFETENSORS, "thread_count": 2}
    model = DistributedCheckpoint(saved(tmp_path / "c", {"model": weights()}, **own))
    assert len(model.files) == 2
    for name, tensor in weights().items():
        assert model.read(f"model.{name}").tobytes() == numbers(tensor)
    assert (model.read("model.a.weight", 3, 4) == weights()["a.weight"].reshape(-1)[3:7].numpy()).all()


def lost(metadata):
    del metadata.storage_data[MetadataIndex("w", (2, 2))]


def short(metadata):
    del metadata.state_dict_metadata["w"].chunks[1]


def twice(metadata):
    metadata.state_dict_metadata["w"].chunks[1].offsets = torch.Size((2, 1))


def outside(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size((6, 3))


def compressed(metadata):
    metadata.storage_data[MetadataIndex("w", (0, 0))].transform_descriptors = ["zstd"]


def escaping(metadata):
    metadata.storage_data[MetadataIndex("w", (0, 0))].relative_path = "../secret.distcp"


def absolute(metadata):
    metadata.storage_data[MetadataIndex("w", (0, 0))].relative_path = "/etc/passwd"


def elsewhere(metadata):
    metadata.storage_data[MetadataIndex("w", (0, 0))].relative_path = "__1_0.distcp"


def beyond(metadata):
    metadata.storage_data[MetadataIndex("w", (2, 2))].length += 100_000


def same_place(metadata):
    one, other = (metadata.storage_data[MetadataIndex("w", start)] for start in ((2, 0), (2, 2)))
    one.offset = other.offset


def larger(metadata):
    described = metadata.state_dict_metadata["w"]
    described.size = torch.Size((6 << 30, 4))
    described.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((6 << 30, 4)))]


def unknown_dtype(metadata):
    metadata.state_dict_metadata["w"].properties.dtype = torch.complex32


CHANGES = {
    lost: r"'w' chunk at \(2, 2\) is in no file",
    short: "tensor 'w' of shape .* chunks hold 16 entries",
    twice: "tensor 'w' .* missing or overlap",
    outside: "tensor 'w' .* missing or overlap",
    compressed: "'w' chunk .* compressed or changed by zstd",
    escaping: "'w' is to lie in '../secret.distcp', outside",
    absolute: "'w' is to lie in '/etc/passwd', outside",
    elsewhere: "__1_0.distcp: is not there, and 'w'",
    beyond: "__0_0.distcp: 'w' is to lie in",
    same_place: "__0_0.distcp: 'w' is to lie in .* overlap",
    larger: "__0_0.distcp: 'w' is to lie in .* too few",
    unknown_dtype: "'w' has dtype torch.complex32",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_index_that_does_not_fit_is_refused_by_name(tmp_path, change):
    directory = changed_index(split(tmp_path / "c", "w"), change)
    with pytest.raises(CfmergeError, match=CHANGES[change]):
        DistributedCheckpoint(directory)


def test_a_chunk_of_another_shape_than_the_index_says_is_refused(tmp_path):
    def change(metadata):
        described = metadata.state_dict_metadata["w"]
        described.size, described.chunks[0].sizes = torch.Size((4, 6)), torch.Size((4, 6))

    model = DistributedCheckpoint(changed_index(saved(tmp_path / "c", {"w": torch.ones(6, 4)}), change))
    with pytest.raises(CfmergeError, match=r"tensor 'w', chunk at \(0, 0\) has shape \(6, 4\)"):
        model.read("w")


def test_an_index_that_would_run_something_is_refused(tmp_path):
    directory = saved(tmp_path / "c", {"w": torch.ones(2)})

    class Evil:
        def __reduce__(self):
            return __import__("os").mkdir, (str(tmp_path / "ran"),)

    (directory / ".metadata").write_bytes(pickle.dumps(Evil(), 4))
    with pytest.raises(CfmergeError, match=r"\.metadata: this file would run \w+\.mkdir"):
        DistributedCheckpoint(directory)
    assert not (tmp_path / "ran").exists()


def megatron(root: Path) -> Path:
    """A checkpoint as Megatron's torch_dist backend leaves it."""
    state = {
        "decoder.layers.self_attention.linear_qkv.weight": torch.randn(2, 6, 4),
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(2, 8, 4),
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2": torch.zeros(0),
        "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.randn(2, 8, 4),
        "optimizer.state.exp_avg": torch.ones(3),
        "rng_state/shard_0_1": {"seed": 1},
    }
    directory = saved(root / "iter_0000100", state)
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch"}))
    torch.save({"args": None, "iteration": 100}, directory / "common.pt")
    return root


def test_megatrons_layout_is_read(tmp_path):
    root = megatron(tmp_path / "run")
    for path in (root, root / "iter_0000100"):
        model = DistributedCheckpoint(path)
        assert len([name for name in model.tensors if name.startswith("decoder.")]) == len(model.tensors) == 3
        assert sorted(model.side_files) == ["common.pt", "metadata.json"]
        assert any("fused projections of Megatron's" in note for note in model.notes)
        assert sorted(open_checkpoint(path).side_files) == ["common.pt", "metadata.json"]
        assert any("chained_0.* (1)" in note and "rng_state/* (1)" in note for note in model.notes)
    (root / "latest_checkpointed_iteration.txt").write_text("../../x")
    with pytest.raises(CfmergeError, match="names no iteration"):
        DistributedCheckpoint(root)
    (root / "latest_checkpointed_iteration.txt").write_text("200")
    with pytest.raises(CfmergeError, match=r"iter_0000200: has no \.metadata"):
        DistributedCheckpoint(root)
    (root / "iter_0000100" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CfmergeError, match="backend 'zarr'"):
        DistributedCheckpoint(root / "iter_0000100")


def written(directory: Path, tensors: dict[str, np.ndarray], max_bytes: int, **how) -> Path:
    directory.mkdir()
    writer = ShardWriter(directory, headers_of(tensors), max_bytes, {}, files=distributed(**how))
    in_pieces(writer, tensors)
    return directory


@pytest.mark.parametrize("max_bytes", [1 << 40, 40])
def test_what_is_written_torch_loads(tmp_path, max_bytes):
    source = DistributedCheckpoint(saved(tmp_path / "source", {"model": {**weights(), "x": {"q": 1}}}))
    draw = np.random.default_rng(0)
    tensors = {name: source.read(name) for name in source.tensors} | {
        name: draw.integers(0, 2 if name == "bool" else 60, 24 * dtype.itemsize, np.uint8).view(dtype).reshape(2, 3, 4)
        for name, dtype in DTYPES.items()
    }
    opaque = {name: source.content(name) for name in source.opaque}
    directory = written(tmp_path / "out", tensors, max_bytes, opaque=opaque, paths=source.paths)
    model = DistributedCheckpoint(directory)
    assert (len(model.files) > 10) is (max_bytes == 40)
    assert {name: model.read(name).tobytes() for name in tensors} == {n: t.tobytes() for n, t in tensors.items()}
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in weights().items()} | {"x": {"q": 0}}}
    target |= {name: torch.zeros(2, 3, 4, dtype=getattr(torch, name)) for name in DTYPES}
    dcp.load(target, checkpoint_id=directory, no_dist=True)
    assert target["model"]["x"] == {"q": 1}
    assert all(numbers(target["model"][name]) == numbers(tensor) for name, tensor in weights().items())
    assert all(numbers(target[name]) == tensors[name].tobytes() for name in DTYPES)
    dcp_to_torch_save(directory, tmp_path / "one.pt")
    assert set(torch.load(tmp_path / "one.pt", weights_only=True)["model"]) == {*weights(), "x"}


def flips(count: int, seed: int, folder: Path) -> list[str]:
    """What became of a checkpoint with one flipped bit, in a file of chunks or in the index."""
    good = split(folder / "good", "w")
    expected, draw = everything(DistributedCheckpoint(good)), random.Random(seed)
    contents = {name: (good / name).read_bytes() for name in (".metadata", "__0_0.distcp")}
    used = DistributedCheckpoint(good)._entries["w"].chunks
    ended = []
    for number in range(count):
        name = draw.choice(list(contents))
        bad = bytearray(contents[name])
        bit = draw.randrange(8 * len(bad))
        bad[bit // 8] ^= 1 << bit % 8
        directory = folder / str(number)
        shutil.copytree(good, directory)
        (directory / name).write_bytes(bad)
        try:
            found = everything(DistributedCheckpoint(directory))
            ended.append(f"{name} {'same' if found == expected else 'other'}")
        except CfmergeError as error:
            named = str(directory) in str(error)
            ended.append(f"{name} error" if named else "unnamed")
        shutil.rmtree(directory)
    assert len(used) == 3
    return ended


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path):
    """The index has no checksum: there a name or a shape may come out as another."""
    ended = flips(100, 1, tmp_path)
    assert "__0_0.distcp other" not in ended
    assert ended.count(".metadata error") > 10
    assert ended.count("__0_0.distcp error") > 10


@pytest.mark.long
def test_two_thousand_flipped_bits(tmp_path):
    assert "__0_0.distcp other" not in flips(2000, 2, tmp_path)


TWO = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, what, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + folder + "/meet_" + what, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = {"rows": torch.arange(35.).reshape(7, 5), "columns": torch.arange(12.).reshape(3, 4).bfloat16(),
         "all": torch.arange(6.), "one": torch.ones(1, 2)}
how = {"rows": Shard(0), "columns": Shard(1), "all": Replicate(), "one": Shard(0)}
if what == "save":
    dcp.save({n: distribute_tensor(t, mesh, [how[n]]) for n, t in whole.items()}, checkpoint_id=folder + "/saved")
else:
    other = {"rows": Shard(1), "columns": Shard(0), "all": Shard(0), "one": Replicate()}
    state = {n: distribute_tensor(torch.zeros_like(t), mesh, [other[n]]) for n, t in whole.items()}
    dcp.load(state, checkpoint_id=folder + "/written")
    for n, t in whole.items():
        assert torch.equal(state[n].full_tensor(), t), n
dist.destroy_process_group()
"""


def two_processes(what: str, folder: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), what, str(folder)]) for rank in range(2)]
    assert [one.wait(timeout=200) for one in both] == [0, 0]


@pytest.mark.long
def test_two_processes_save_sharded_tensors_and_load_what_is_written(tmp_path):
    two_processes("save", tmp_path)
    model = DistributedCheckpoint(tmp_path / "saved")
    expected = {"rows": np.arange(35).reshape(7, 5), "columns": np.arange(12).reshape(3, 4), "all": np.arange(6)}
    for name, array in expected.items():
        assert (model.read(name).astype(np.float32) == array).all()
        for first in range(array.size):
            assert (model.read(name, first, 1).astype(np.float32) == array.reshape(-1)[first]).all()
    assert len(model.files) == 2
    written(tmp_path / "written", {name: model.read(name) for name in model.tensors}, 30)
    two_processes("load", tmp_path)


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.randoms(use_true_random=False))
def test_boxes_of_a_range_hold_its_entries_in_order(shape, draw):
    array = np.arange(int(np.prod(shape))).reshape(shape)
    first = draw.randint(0, array.size)
    count = draw.randint(0, array.size - first)
    origin = (0,) * len(shape)
    found = [array[box.within(origin)].reshape(-1) for box in boxes_of(shape, first, count)]
    assert np.concatenate([[], *found]).tolist() == list(range(first, first + count))
    assert all(array[box.within(origin)].size == box.size for box in boxes_of(shape, first, count))


def cut(box: Box, draw: random.Random, depth: int) -> list[Box]:
    """A box in parts, cut in two again and again."""
    axes = [axis for axis, n in enumerate(box.shape) if n > 1]
    if not depth or not axes:
        return [box]
    axis = draw.choice(axes)
    at = draw.randint(box.start[axis] + 1, box.stop[axis] - 1)
    low = Box(box.start, tuple(at if i == axis else n for i, n in enumerate(box.stop)))
    high = Box(tuple(at if i == axis else n for i, n in enumerate(box.start)), box.stop)
    return cut(low, draw, depth - 1) + cut(high, draw, depth - 1)


@given(st.lists(st.integers(1, 6), max_size=4).map(tuple), st.randoms(use_true_random=False))
def test_boxes_tile_exactly_or_not_at_all(shape, draw):
    boxes = cut(Box((0,) * len(shape), shape), draw, 4)
    draw.shuffle(boxes)
    assert tile(boxes, shape)
    assert not tile(boxes[1:], shape)
    assert not tile([*boxes, boxes[0]], shape)
    if len(boxes) > 1:
        assert not tile([*boxes[1:], boxes[1]], shape)
        moved = Box(tuple(n + 1 for n in boxes[0].start), tuple(n + 1 for n in boxes[0].stop))
        assert not tile([moved, *boxes[1:]], shape)


def test_files_of_megatron_s_lie_beside_the_output_too(tmp_path):
    base, expert = (saved(tmp_path / name, {"w": torch.ones(2, 2) * value}) for name, value in (("b", 1), ("e", 2)))
    (base / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 10}, base / "common.pt")
    how = {"output": tmp_path / "out", "allow": ["one-expert"]}
    out = cfmerge.merge(base, [expert], "average", **how).output
    for name in ("metadata.json", "common.pt"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_directory_over_a_checkpoint_names_it(tmp_path):
    saved(tmp_path / "run" / "pytorch_model_fsdp_0", {"w": torch.ones(2, 2)})
    with pytest.raises(CfmergeError, match="in its folders pytorch_model_fsdp_0; name the one that is meant"):
        cfmerge.open_checkpoint(tmp_path / "run")
