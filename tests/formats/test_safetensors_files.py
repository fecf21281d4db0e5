"""The safetensors reader trusts nothing; reader and writer agree with the safetensors library."""

import json
import struct
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from cfmerge.errors import CfmergeError
from cfmerge.formats.safetensors import DTYPES, SafetensorsFile
from cfmerge.formats.shards import ShardWriter, save, shard

F32 = np.dtype(np.float32)


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with the given header, as bytes or as JSON, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty file": (b"", ["truncated", "0 bytes"]),
    "less than a length": (b"\1\2\3", ["truncated", "3 bytes"]),
    "header longer than the file": (struct.pack("<Q", 500) + b"{}", ["500 bytes", "10 bytes"]),
    "huge header length": (struct.pack("<Q", 2**63) + b"{}" * 9, [str(2**63), "fit"]),
    "zip": (b"PK\x03\x04" + b"\0" * 40, ["44 bytes", "fit"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_not_a_safetensors_file(tmp_path, case):
    content, words = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CfmergeError) as caught:
        SafetensorsFile(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


CORRUPT = {
    "no JSON": (b"{not json", b"", ["header is corrupt"]),
    "no text": (b"\xff\xfe\xfd{", b"", ["header is corrupt"]),
    "a list": ([1, 2], b"", ["header is corrupt"]),
    "nested without end": (b"[" * 100_000, b"", ["header is corrupt"]),
    "entry is a number": ({"w": 3}, b"", ["header is corrupt"]),
    "no offsets": ({"w": {"dtype": "F32", "shape": [1]}}, b"", ["header is corrupt"]),
    "unknown dtype": ({"w": entry([1], 0, 4, "Q4_K")}, b"\0" * 4, ["'w'", "'Q4_K'", "F32", "BF16"]),
    "dtype is a list": ({"w": entry([1], 0, 4, ["F32"])}, b"\0" * 4, ["'w'"]),
    "truncated body": ({"w": entry([4], 0, 16)}, b"\0" * 12, ["16 bytes", "12", "truncated"]),
    "longer body": ({"w": entry([4], 0, 16)}, b"\0" * 17, ["16 bytes", "17"]),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, ["'b'", "4 to 12"]),
    "gap": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"\0" * 20, ["'b'", "12 to 20"]),
    "does not begin at 0": ({"a": entry([2], 4, 12)}, b"\0" * 12, ["'a'", "4 to 12"]),
    "size is not the shape's": ({"a": entry([3], 0, 8)}, b"\0" * 8, ["'a'", "12 bytes", "0 to 8"]),
    "negative shape": ({"a": entry([-2, -1], 0, 8)}, b"\0" * 8, ["'a'", "-2"]),
    "shape of booleans": ({"a": entry([True], 0, 4)}, b"\0" * 4, ["'a'"]),
    "shape of text": ({"a": entry("12", 0, 8)}, b"\0" * 8, ["'a'"]),
    "fractional offsets": ({"a": entry([1], 0.0, 4.0)}, b"\0" * 4, ["'a'"]),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"\0" * 4, ["'a'"]),
    "size overflows 64 bits": ({"a": entry([2**32, 2**32], 0, 0)}, b"", ["'a'", str(2**66)]),
    "axis overflows 64 bits": ({"a": entry([2**70], 0, 0)}, b"", ["'a'"]),
    "metadata is a number": ({"__metadata__": 5, "a": entry([1], 0, 4)}, b"\0" * 4, ["header is corrupt"]),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_header(tmp_path, case):
    header, data, words = CORRUPT[case]
    path = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CfmergeError) as caught:
        SafetensorsFile(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_every_single_bit_of_a_header_may_flip(tmp_path):
    """A changed header is refused or gives tensors within the file; nothing else is raised."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"ab": np.arange(6, dtype=np.float32), "c": np.ones((1, 2), np.int8)}, path)
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for position in range(8 * end):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            file = SafetensorsFile(path)
        except CfmergeError:
            refused += 1
        else:
            for name, info in file.tensors.items():
                assert file.read(name).shape == info.shape
    assert refused > 4 * end


EXAMPLES = {
    "f32": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "f64": np.linspace(-1, 1, 4),
    "f16": np.array([1.5, -65504, np.inf], np.float16),
    "bf16": np.array([[1.0, -3e38, 1e-40]], ml_dtypes.bfloat16),
    "i64": np.array([-(2**62), 2**62]),
    "i32": np.array([[-1], [2]], np.int32),
    "i16": np.array([300, -300], np.int16),
    "i8": np.array([-128, 127], np.int8),
    "u8": np.array([0, 255], np.uint8),
    "u64": np.array([2**64 - 1], np.uint64),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
    'Gewichte.größe/重み 🎲 "x"\\': np.ones(2, np.float32),
}


def test_reads_what_the_numpy_library_writes(tmp_path):
    safetensors.numpy.save_file(EXAMPLES, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(EXAMPLES)
    for name, expected in EXAMPLES.items():
        found = file.read(name)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()


def test_tensors_are_views_that_cannot_be_written(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(4, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        SafetensorsFile(tmp_path / "m.safetensors").read("w")[0] = 2


def test_torch_and_cfmerge_read_each_other(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensors = {
        name: torch.tensor([[1.5, -2.25], [3, 0]]).to(dtype)
        for name, dtype in {
            "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64,
            "i64": torch.int64, "u8": torch.uint8, "bool": torch.bool, "f8": torch.float8_e4m3fn,
        }.items()
    }  # fmt: skip
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(2, 0)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    ours = {name: file.read(name) for name in file.tensors}
    save(tmp_path, ours, {"format": "pt"}, "ours")
    again = load_file(tmp_path / "ours.safetensors")
    assert set(again) == set(tensors)
    for name, expected in tensors.items():
        assert again[name].dtype == expected.dtype
        assert again[name].shape == expected.shape
        assert torch.equal(again[name].float(), expected.float())


dtypes = st.sampled_from(sorted(set(DTYPES) - {"C64", "F8_E4M3", "F8_E5M2"}))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=60, deadline=None)
@given(
    headers=st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=6),
    limit=st.integers(1, 300),
    order=st.randoms(use_true_random=False),
)
def test_what_is_written_the_library_reads(headers, limit, order):
    """Any names, dtypes and shapes, written in any order and in pieces, into shards of any size."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, (dtype, shape) in headers.items():
        kind = DTYPES[dtype]
        count = int(np.prod(shape)) * kind.itemsize
        content = random.integers(0, 2 if dtype == "BOOL" else 256, count, np.uint8)
        tensors[name] = content.view(kind).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        writer = ShardWriter(directory, described, limit, {"format": "pt"})
        for name in order.sample(list(tensors), len(tensors)):
            flat = tensors[name].reshape(-1)
            cut = flat.size // 2
            writer.write(name, flat[cut:], cut)
            writer.write(name, flat[:cut], 0)
        writer.close()

        found = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safetensors.safe_open(path, "numpy") as file:
                assert file.metadata() == {"format": "pt"}
                part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            size = sum(tensor.nbytes for tensor in part.values())
            assert size <= limit or sum(tensor.nbytes > 0 for tensor in part.values()) == 1
            mine = SafetensorsFile(path)
            assert all(mine.read(name).tobytes() == tensor.tobytes() for name, tensor in part.items())
            found |= part
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].tobytes() == tensor.tobytes()
        index = directory / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
            assert set(content["weight_map"]) == set(tensors)
        else:
            assert [path.name for path in directory.iterdir()] == ["model.safetensors"]


def test_shards_hold_at_most_their_size_and_keep_the_order():
    tensors = {name: ((size,), F32) for name, size in {"a": 2, "b": 2, "c": 9, "d": 1, "e": 3}.items()}
    assert shard(tensors, 16) == [["a", "b"], ["c"], ["d", "e"]]
    assert shard(tensors, 1 << 40) == [list(tensors)]


def test_a_tensor_that_was_not_written_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path, {"a": ((2,), F32), "b": ((4,), F32)}, 1000, {})
    writer.write("a", np.ones(2, np.float32))
    writer.write("b", np.ones(3, np.float32))
    with pytest.raises(CfmergeError, match="not wholly written: b"):
        writer.close()


def test_values_of_another_dtype_are_not_written(tmp_path):
    writer = ShardWriter(tmp_path, {"a": ((2,), F32)}, 1000, {})
    with pytest.raises(TypeError, match="float64"):
        writer.write("a", np.ones(2))
    writer.abort()


def test_metadata_and_aligned_data(tmp_path):
    save(tmp_path, {"w": np.ones(3, np.float32)}, {"format": "pt", "x": "ä"}, "model")
    content = (tmp_path / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "x": "ä"}


@pytest.mark.parametrize(("first", "count"), [(0, None), (0, 300_000), (3, 262_144), (700_001, 299_999)])
def test_large_reads_ask_for_exactly_the_pages_that_they_give(tmp_path, monkeypatch, first, count):
    from cfmerge.formats import mapped

    tensor = np.arange(1_000_000, dtype=np.float32)
    safetensors.numpy.save_file({"a": np.ones(5, np.float32), "b": tensor}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    file.read("a")
    asked = []

    class Watched:
        def madvise(self, how, start, size):
            asked.append((start, start + size))
            whole.madvise(how, start, size)

    whole = file._map
    monkeypatch.setattr(
        "cfmerge.formats.safetensors.read_ahead", lambda _, *where: mapped.read_ahead(Watched(), *where)
    )
    found = file.read("b", first, count)
    assert (found == tensor[first : None if count is None else first + count]).all()
    ((start, end),) = asked
    begin = file._data_start + file._offsets["b"] + 4 * first
    assert start % mapped.mmap.PAGESIZE == 0
    assert 0 <= begin - start < mapped.mmap.PAGESIZE
    assert end == begin + found.nbytes
    file.read("b", 5, 10)
    assert len(asked) == 1
