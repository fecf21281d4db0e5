"""PyTorch files: what torch.save writes is read without torch, what is written torch.load reads."""

import functools
import io
import random
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laid import headers_of, in_pieces
from torch import nn

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import zips
from cfmerge.formats.pytorch import TorchFile, lay
from cfmerge.formats.shards import ShardWriter
from cfmerge.formats.torch_archives import DTYPES, Storage
from cfmerge.formats.torch_tensors import flat_range

KINDS = {"zip": True, "old": False}


def numbers(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def saved(path: Path, value, kind: str = "zip") -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=KINDS[kind])
    return path


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    a = torch.randn(6, 4)
    return {
        "a.weight": a, "tied": a, "transposed": a.t(), "cut": a[1:5:2, 1:3], "row": a[2], "column": a[:, 1],
        "expanded": torch.tensor(2.5).expand(3, 4), "empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5),
        "parameter": nn.Parameter(torch.randn(3)), "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "f8 turned": torch.randn(4, 2).to(torch.float8_e5m2).t(), "bf16": torch.randn(2, 3).bfloat16(),
        "u16": torch.arange(3).to(torch.uint16), "u64": torch.arange(3).to(torch.uint64),
        "bool": torch.tensor([True, False]), "i64": torch.arange(4), "i8": torch.arange(-2, 2).to(torch.int8),
        "c64": torch.randn(2, dtype=torch.complex64), "c128": torch.randn(2, dtype=torch.complex128),
        "f64": torch.randn(2).double(), "f16": torch.randn(3).half(),
    }  # fmt: skip


def everything(file: TorchFile) -> dict:
    """All that a file gives, as plain values."""
    tensors = {name: (info.shape, info.dtype.name, file.read(name).tobytes()) for name, info in file.tensors.items()}
    return {"tensors": tensors, "ties": dict(file.ties)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, kind):
    tensors = some_tensors()
    file = TorchFile(saved(tmp_path / "model.bin", tensors, kind))
    assert list(file.tensors) == [name for name in tensors if name != "tied"]
    assert file.ties == {"tied": "a.weight"}
    for name, info in file.tensors.items():
        found = file.read(name)
        assert found.shape == info.shape == tuple(tensors[name].shape)
        assert DTYPES[str(tensors[name].dtype).removeprefix("torch.")] == info.dtype == found.dtype
        assert found.tobytes() == numbers(tensors[name])
        assert not found.flags.writeable or not found.size
        for first in range(info.size + 1):
            for count in range(info.size - first + 1):
                part = file.read(name, first, count)
                assert part.tobytes() == found.reshape(-1)[first : first + count].tobytes()
        for wrong in ((0, info.size + 1), (-1, 1), (info.size + 1, 0)):
            with pytest.raises(IndexError):
                file.read(name, *wrong)
    assert any("views into the same bytes are read as copies: a.weight and 4 more" in note for note in file.notes)
    assert any("no checksums" in note for note in file.notes) is (kind == "old")


def test_a_read_of_a_whole_tensor_is_a_view_of_the_file(tmp_path):
    file = TorchFile(saved(tmp_path / "model.bin", {"w": torch.randn(8, 8), "t": torch.randn(8, 8).t()}))
    for name in file.tensors:
        base = file.read(name)
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert not base.flags.owndata


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.again = self.linear
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left_out", torch.ones(2), persistent=False)
        self.register_parameter("none", None)
        self.dropped = nn.Dropout()


def test_a_whole_pickled_module_has_the_names_of_its_state_dict(tmp_path):
    module = nn.Sequential(Inner(), nn.ModuleList([nn.Linear(2, 2)]))
    state = module.state_dict()
    for value in (module, nn.DataParallel(module), {"model": module, "ema": None, "epoch": 3}):
        file = TorchFile(saved(tmp_path / "model.pt", value))
        assert {*file.tensors, *file.ties} == set(state)
        assert file.ties == {f"0.again.{name}": f"0.linear.{name}" for name in ("weight", "bias")}
        for name in file.tensors:
            assert file.read(name).tobytes() == numbers(state[name])
        assert any("names objects of other code" in note and "Inner" in note for note in file.notes)


W, V = torch.ones(2), torch.zeros(3)
WRAPPED = {
    "plain": ({"w": W}, "", ["w"], []),
    "ordered": (nn.ParameterDict({"w": W}).state_dict(), "", ["w"], []),
    "state_dict": ({"state_dict": {"w": W}, "epoch": 3, "loss": V}, "", ["w"], ["'state_dict'", "epoch and 1 more"]),
    "two levels": ({"model": {"state_dict": {"w": W}}, "optimizer": {"s": {0: V}}}, "", ["w"], ["optimizer"]),
    "an unknown key": ({"generator": {"w": W}, "step": 1}, "", ["w"], ["under 'generator'"]),
    "a known key beside others": ({"params": {"w": W}, "discriminator": {"d": V}}, "", ["w"], ["discriminator"]),
    "asked for": ({"model": {"w": W}, "ema": {"w": V}}, "ema", ["w"], []),
    "asked for by levels": ({"a": {"b": {"w": W}, "c": {"v": V}}}, "a::b", ["w"], []),
    "parallel": ({"module.w": W, "module.v": V}, "", ["w", "v"], ["began with 'module.'"]),
    "compiled": ({"_orig_mod.w": W}, "", ["w"], ["began with '_orig_mod.'"]),
    "compiled and parallel": ({"_orig_mod.module.w": W}, "", ["w"], ["'_orig_mod.'", "'module.'"]),
    "a module among others": ({"module.w": W, "v": V}, "", ["module.w", "v"], []),
    "with objects": ({"w": W, "x._extra_state": None, "n": 3}, "", ["w"], ["not read: 'x._extra_state'"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WRAPPED)
def test_the_weights_are_found_in_what_wraps_them(tmp_path, kind, case):
    value, key, names, words = WRAPPED[case]
    file = TorchFile(saved(tmp_path / "model.pt", value, kind), key)
    assert list(file.tensors) == names
    for word in words:
        assert any(word in note for note in file.notes), file.notes


def test_several_dictionaries_are_asked_for(tmp_path):
    path = saved(tmp_path / "model.pt", {"model": {"w": W}, "ema": {"w": V}, "step": 1})
    with pytest.raises(CfmergeError, match="several dictionaries") as caught:
        TorchFile(path)
    assert f"{path}::model\n  {path}::ema" in str(caught.value)
    inner = saved(tmp_path / "inner.pt", {"model": {"net": {"w": W}, "ema": {"w": V}}, "step": 1})
    with pytest.raises(CfmergeError, match=f"{inner}::model::net\n  {inner}::model::ema"):
        TorchFile(inner)
    with pytest.raises(CfmergeError, match="no entry 'emma'; did you mean 'ema'"):
        TorchFile(path, "emma")


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


REFUSED = {
    "quantised": (lambda: {"w": quantised()}, ["quantised|QInt8Storage"]),
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, ["'w' is sparse", "to_dense"]),
    "meta": (lambda: {"w": torch.empty(3, device="meta")}, ["'w' is on the meta device"]),
    "conjugate": (lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, ["'w' is conjugate", "resolve_conj"]),
    "half complex": (lambda: {"w": torch.zeros(2, dtype=torch.complex32)}, ["'w' has dtype torch.complex32"]),
    "repeated": (lambda: {"w": torch.zeros(1).expand(1 << 20, 1 << 12)}, ["'w'", "repeats the 4 bytes", "clone"]),
    "one tensor": (lambda: torch.ones(3), ["no tensors with names", "state_dict"]),
    "a list": (lambda: [torch.ones(3)], ["no tensors with names", "a list"]),
    "no tensors": (lambda: {"a": 1}, ["no tensors with names", "a dict with a"]),
    "numbers as names": (lambda: {0: torch.ones(3)}, ["no tensors with names"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, case):
    make, words = REFUSED[case]
    path = saved(tmp_path / "model.pt", make())
    with pytest.raises(CfmergeError) as caught:
        TorchFile(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert any(one in str(caught.value) for one in word.split("|"))


def test_tensors_that_are_not_read_do_not_matter_elsewhere(tmp_path):
    value = {"model": {"w": W}, "other": torch.eye(3).to_sparse(), "big": torch.zeros(1).expand(1 << 20, 1 << 20)}
    assert list(TorchFile(saved(tmp_path / "model.pt", value)).tensors) == ["w"]


def test_many_repeated_tensors_do_not_fool_the_plan(tmp_path):
    value = {str(number): torch.zeros(1).expand(1 << 14, 1 << 13) for number in range(8)}  # 512 MiB each
    value = {name: tensor[number:] for number, (name, tensor) in enumerate(value.items())}
    with pytest.raises(CfmergeError, match="repeat the same bytes"):
        TorchFile(saved(tmp_path / "model.pt", value))


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(CfmergeError, match="TorchScript"):
        TorchFile(tmp_path / "model.pt")


def test_other_archives_are_refused(tmp_path):
    content = {"truncated": b"PK\3\4", "empty": b"", "no archive": b"\x80\x02}q\0."}
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    content["npz"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    content["tar file"] = buffer.getvalue()
    content["Git LFS pointer"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    words = {"npz": "0 members", "no archive": "not a file that torch.save wrote", "empty": "0 bytes"}
    for name, own in content.items():
        (tmp_path / name).write_bytes(own)
        with pytest.raises(CfmergeError, match=words.get(name, name)) as caught:
            TorchFile(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(CfmergeError, match="No such file"):
        TorchFile(tmp_path / "absent")


def rewritten(path: Path, how=zipfile.ZIP_STORED, **changed: bytes | None) -> Path:
    """The same archive, other members: `data_0=...`; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            own = changed.get(name.split("/", 1)[1].replace("/", "_").replace(".", "_"), content)
            if own is not None:
                archive.writestr(name, own)
    return path


MEMBERS = {
    "compressed": ({"how": zipfile.ZIP_DEFLATED}, "compressed"),
    "big-endian": ({"byteorder": b"big"}, "big-endian"),
    "a storage too short": ({"data_0": b"1234567"}, "has 7 bytes, expected 8"),
    "a storage too long": ({"data_0": b"123456789"}, "has 9 bytes, expected 8"),
    "no storage": ({"data_0": None}, "is missing, expected 8"),
    "no pickle": ({"data_pkl": None}, "0 members"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_must_be_as_torch_writes_them(tmp_path, case):
    how, words = MEMBERS[case]
    path = rewritten(saved(tmp_path / "model.pt", {"w": torch.ones(2)}), **how)
    with pytest.raises(CfmergeError, match=words):
        TorchFile(path)


def test_an_archive_written_by_another_tool_is_read(tmp_path):
    path = rewritten(saved(tmp_path / "model.pt", {"w": torch.ones(2)}))
    assert TorchFile(path).read("w").tolist() == [1, 1]


def test_members_that_overlap_are_refused(tmp_path):
    path = saved(tmp_path / "model.pt", {"w": torch.ones(2), "v": torch.ones(2)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"model/data/{n}") for n in "01")
    entry = content.rindex(b"model/data/1") - 46 + 42  # where the directory has the second member's place
    assert struct.unpack_from("<I", content, entry) == (second.header_offset,)
    path.write_bytes(content[:entry] + struct.pack("<I", first.header_offset) + content[entry + 4 :])
    with pytest.raises(CfmergeError, match="do not fit"):
        TorchFile(path)


def test_a_storages_checksum_is_looked_at_once_before_its_bytes_are_given_out(tmp_path, monkeypatch):
    path = saved(tmp_path / "model.pt", {"w": torch.ones(64), "v": torch.ones(64)})
    looks = []
    crc32 = zlib.crc32
    monkeypatch.setattr(
        "cfmerge.formats.torch_archives.zlib.crc32", lambda data: looks.append(len(data)) or crc32(data)
    )
    file = TorchFile(path)
    assert 256 not in looks
    threads = [threading.Thread(target=file.read, args=("w", n, 1)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looks.count(256) == 1
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 1) * 64) + 200] ^= 1
    path.write_bytes(content)
    file = TorchFile(path)
    with pytest.raises(CfmergeError, match=r"tensor 'w': the file is corrupt .*data/0"):
        file.read("w", 0, 1)
    assert file.read("v").sum() == 64


def test_a_file_without_checksums_is_read_with_a_note(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = TorchFile(saved(tmp_path / "model.pt", {"w": torch.ones(2)}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert file.read("w").tolist() == [1, 1]
    assert any("no checksums" in note for note in file.notes)


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    path = saved(tmp_path / "model.pt", {"w": torch.ones(4, 2)})
    with zipfile.ZipFile(path) as archive:
        pickle = archive.read("model/data.pkl")
    shape = pickle.index(b"K\4K\2\x86")
    for change in (b"K\5K\2\x86", b"K\4K\3\x86", b"NK\2\x86\x000"[:5], b"K\4K\2\x85"):
        path = rewritten(path, data_pkl=pickle[:shape] + change + pickle[shape + 5 :])
        with pytest.raises(CfmergeError, match=r"needs 40 bytes|needs 36 bytes|corrupt"):
            TorchFile(path)


def flips(kind: str, count: int, seed: int, folder: Path) -> list[str]:
    """What became of a file with one flipped bit, so many times: "error", "same" or "other"."""
    tensors = {name: tensor for name, tensor in some_tensors().items() if name[0] in "atbf"}
    good = saved(folder / "good.pt", tensors, kind).read_bytes()
    expected, draw = everything(TorchFile(folder / "good.pt")), random.Random(seed)
    ended = []
    for number in range(count):
        bad = bytearray(good)
        bit = draw.randrange(8 * len(good))
        bad[bit // 8] ^= 1 << bit % 8
        path = folder / f"{number}.pt"
        path.write_bytes(bad)
        try:
            ended.append("same" if everything(TorchFile(path)) == expected else "other")
        except CfmergeError as error:
            named = str(path) in str(error)
            ended.append("error" if named else "unnamed")
        path.unlink()
    return ended


@pytest.mark.parametrize(("kind", "allowed"), [("zip", {"error", "same"}), ("old", {"error", "same", "other"})])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path, kind, allowed):
    ended = flips(kind, 100, 1, tmp_path)
    assert set(ended) <= allowed
    assert ended.count("error") > 20


@pytest.mark.long
@pytest.mark.parametrize(("kind", "allowed"), [("zip", {"error", "same"}), ("old", {"error", "same", "other"})])
def test_two_thousand_flipped_bits(tmp_path, kind, allowed):
    assert set(flips(kind, 2000, 2, tmp_path)) <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_an_error(tmp_path, kind):
    good = saved(tmp_path / "good.pt", {"w": torch.ones(3, 2), "v": torch.ones(5)}, kind).read_bytes()
    for length in range(0, len(good), 13):
        (tmp_path / "cut.pt").write_bytes(good[:length])
        with pytest.raises(CfmergeError, match=r"cut\.pt"):
            TorchFile(tmp_path / "cut.pt")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_range_of_any_view_is_that_of_its_flat_copy(shape, draw):
    array = np.arange(np.prod(shape)).reshape(shape).transpose(draw.sample(range(len(shape)), len(shape)))
    first = draw.randint(0, array.size)
    count = draw.randint(0, array.size - first)
    assert flat_range(array, first, count).tolist() == array.reshape(-1)[first : first + count].tolist()


def written(path: Path, tensors: dict[str, np.ndarray], metadata=None, **how) -> Path:
    own, headers = functools.partial(lay, **how), headers_of(tensors)
    in_pieces(
        ShardWriter(path.parent, headers, 1 << 60, metadata or {}, path.stem, suffix=path.suffix, lay=own), tensors
    )
    return path


def of_every_dtype() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    tensors = {
        name: draw.integers(0, 2 if name == "bool" else 60, 24 * dtype.itemsize, np.uint8).view(dtype).reshape(2, 3, 4)
        for name, dtype in DTYPES.items()
    }
    return tensors | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3.5, np.float32)}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("key", ["", "a::b"])
def test_what_is_written_torch_loads(tmp_path, mapped, key):
    tensors = of_every_dtype()
    path = written(tmp_path / "model.bin", tensors, {"format": "pt"}, ties={"alias": "float32"}, key=key)
    found = torch.load(path, weights_only=True, mmap=mapped)
    for step in key.split("::") if key else ():
        found = found[step]
    assert list(found) == [*tensors, "alias"]
    for name, tensor in tensors.items():
        assert tuple(found[name].shape) == tensor.shape
        assert DTYPES[str(found[name].dtype).removeprefix("torch.")] == tensor.dtype
        assert numbers(found[name]) == tensor.tobytes()
    assert found["alias"].data_ptr() == found["float32"].data_ptr()
    assert zipfile.ZipFile(path).testzip() is None


def test_what_is_written_is_read_again_with_its_metadata(tmp_path):
    tensors = of_every_dtype()
    path = written(tmp_path / "model.bin", tensors, {"format": "pt", "recipe": "x: ü"}, ties={"alias": "float32"})
    file = TorchFile(path)
    assert file.metadata == {"recipe": "x: ü"}
    assert file.ties == {"alias": "float32"}
    assert file.notes == ()
    for name, tensor in tensors.items():
        assert file.read(name).tobytes() == tensor.tobytes()
        assert not tensor.size or file.read(name).ctypes.data % 64 == 0


names = st.text(st.characters(codec="utf-8"), max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=6))
def test_any_names_and_shapes_come_back(tmp_path_factory, headers):
    tensors = {
        name: np.ones(int(np.prod(shape)) * DTYPES[dtype].itemsize, np.uint8).view(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in headers.items()
    }
    path = written(tmp_path_factory.mktemp("any") / "model.pt", tensors)
    found = torch.load(path, weights_only=True)
    assert list(found) == list(tensors)
    assert all(numbers(found[name]) == tensor.tobytes() for name, tensor in tensors.items())


def test_large_archives_have_large_fields(monkeypatch, tmp_path):
    """As if 4 GiB were 500 bytes, and 65535 members were 4."""
    monkeypatch.setattr(zips, "FULL_COUNT", 4)
    path = written(tmp_path / "many.pt", {str(number): np.full(3, number, np.float32) for number in range(9)})
    assert b"PK\6\6" in path.read_bytes()
    assert torch.load(path, weights_only=True)["8"].tolist() == [8, 8, 8]
    assert TorchFile(path).read("8").tolist() == [8, 8, 8]


def test_a_file_beyond_4_gib_is_laid_out_and_read(tmp_path):
    """Sparse on the disk: its zeros take no room. Its checksums are not computed, so they are taken for none."""
    headers = {"big": ((1 << 20, 1 << 11), np.dtype(np.float32)), "behind": ((3,), np.dtype(np.float32))}
    laid = lay(headers, {})
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(laid.size)
        for offset, content in laid.fixed:
            file.seek(offset)
            file.write(content)
        file.seek(laid.places["behind"])
        file.write(np.arange(3, dtype=np.float32).tobytes())
    assert laid.size > 1 << 33
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["big"].shape == (1 << 20, 1 << 11)
    assert found["behind"].tolist() == [0, 1, 2]
    file = TorchFile(path)
    for name, view in file._views.items():
        assert view.storage.start == laid.places[name]
    with pytest.raises(CfmergeError, match="CRC-32"):
        file.read("behind")


def test_a_dtype_that_torch_lacks_is_not_written():
    with pytest.raises(CfmergeError, match="float32"):
        lay({"w": ((2,), np.dtype("m8[s]"))}, {})


def test_a_storage_is_small():
    """12,000 of them are opened in a second."""
    assert not hasattr(Storage("0", None, 0, 0), "__dict__")


def test_the_weights_stay_under_the_key_that_they_have(tmp_path):
    """A training script loads `torch.load(FILE)["model"]`, of the merged file too."""
    state = {"w.weight": torch.ones(2, 2)}
    file = TorchFile(saved(tmp_path / "run.pt", {"epoch": 3, "model": {"state_dict": state}, "ema": {}}))
    assert file.key == "model::state_dict"
    assert TorchFile(saved(tmp_path / "plain.pt", state)).key == ""
    assert TorchFile(saved(tmp_path / "both.pt", {"model": state, "ema": state}), "ema").key == "ema"


def test_a_directory_over_one_file_has_that_file_s_name_and_format(tmp_path):
    base, *experts = (
        saved(tmp_path / f"{name}.pt", {"model": {"w.weight": torch.full((2, 2), float(name))}, "epoch": 1})
        for name in "012"
    )
    result = cfmerge.merge(base, experts, "average", output=tmp_path / "out")
    assert sorted(path.name for path in result.output.iterdir()) == ["0.pt", "README.md"]
    found = torch.load(tmp_path / "out" / "0.pt", weights_only=True)
    assert found.keys() == {"model"}
    assert torch.equal(found["model"]["w.weight"], torch.full((2, 2), 1.5))
