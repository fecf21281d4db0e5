"""msgpack files: read as Flax reads them, and written byte for byte as it writes them."""

import flax.linen as nn
import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flips import flips, outcome
from laid import headers_of, in_pieces

from cfmerge.errors import CfmergeError
from cfmerge.formats import msgpack as ours
from cfmerge.formats.base import Folder
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.msgpack import MsgpackFile, lay
from cfmerge.formats.shards import ShardWriter
from cfmerge.formats.trees import nested

BF16 = ml_dtypes.bfloat16
TENSORS = {
    "params/dense/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "params/dense/bias": np.linspace(-1, 1, 5).astype(BF16),
    "params/größe": np.array([[1.5, -2]], np.float16),
    "params/count": np.array(7, np.int64),
    "params/empty": np.zeros((0, 3), np.float32),
    "params/mask": np.array([True, False]),
    "params/long" + "g" * 300: np.arange(70_000, dtype=np.uint8),
    "params/f8": np.ones(3, ml_dtypes.float8_e4m3fn),
    "batch_stats/mean": np.array([1, 2], np.float64),
}


def written(path, tensors=TENSORS):
    """A file of cfmerge's writer, its tensors in pieces."""
    writer = ShardWriter(path, headers_of(tensors), 1 << 60, {}, "model", suffix=".msgpack", lay=lay)
    in_pieces(writer, tensors)
    return path / "model.msgpack"


def by_flax(path, tree):
    path.write_bytes(flax.serialization.to_bytes(tree))
    return path


def assert_same(path, tensors):
    file = MsgpackFile(path)
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        found, info = file.read(name), file.tensors[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
        assert found.tobytes() == tensor.tobytes()
        assert not found.flags.writeable
        if tensor.size:
            assert file.read(name, 1, tensor.size - 1).tobytes() == tensor.reshape(-1)[1:].tobytes()


def test_reads_what_flax_writes(tmp_path):
    assert_same(by_flax(tmp_path / "model.msgpack", nested(TENSORS)), TENSORS)


def test_writes_what_flax_writes_byte_for_byte(tmp_path):
    assert written(tmp_path).read_bytes() == flax.serialization.to_bytes(nested(TENSORS))


def test_a_module_s_parameters_come_back(tmp_path):
    module = nn.Dense(3)
    parameters = module.init(jax.random.key(0), np.ones((1, 2)))
    path = by_flax(tmp_path / "model.msgpack", parameters)
    file = MsgpackFile(path)
    (tmp_path / "again").mkdir()
    again = written(tmp_path / "again", {name: file.read(name) for name in file.tensors})
    restored = flax.serialization.from_bytes(parameters, again.read_bytes())
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, parameters))


@pytest.mark.parametrize("most", [1, 20, 64])
def test_arrays_in_chunks_are_read_and_written_as_flax_has_them(tmp_path, monkeypatch, most):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", most)
    monkeypatch.setattr(ours, "CHUNK", most)
    tensors = {"a/w": TENSORS["params/dense/kernel"], "a/b": TENSORS["params/dense/bias"], "c": np.array(3, np.int32)}
    by_flax(tmp_path / "flax.msgpack", nested(tensors))
    assert_same(tmp_path / "flax.msgpack", tensors)
    assert written(tmp_path, tensors).read_bytes() == (tmp_path / "flax.msgpack").read_bytes()
    file = MsgpackFile(tmp_path / "flax.msgpack")
    assert np.array_equal(file.read("a/w", 3, 15), np.arange(3, 18))


def test_arrays_over_a_gibibyte_are_laid_in_chunks():
    layout = lay({"w": ((3 << 28,), np.dtype(np.float32)), "b": ((2,), np.dtype(np.float32))}, {})
    assert [first for first, _ in layout.places["w"]] == [0, 1 << 30, 2 << 30]
    assert isinstance(layout.places["b"], int)
    assert layout.size > 3 << 30


def test_plain_numbers_scalars_and_lists_are_arrays_and_none_is_told(tmp_path):
    tree = {"l": [np.ones(2, np.float32), np.zeros(1)], "n": 5, "x": -1.5, "s": np.float16(2), "none": None, "e": {}}
    tree |= {"neg": -70_000, "big": 2**63 + 1, "yes": True}
    file = MsgpackFile(by_flax(tmp_path / "model.msgpack", tree))
    found = {name: file.read(name)[()] for name in file.tensors if file.tensors[name].shape == ()}
    assert found == {"n": 5, "x": -1.5, "s": 2, "neg": -70_000, "big": 2**63 + 1, "yes": True}
    assert np.array_equal(file.read("l/0"), [1, 1])
    assert np.array_equal(file.read("n", 0, 1), [5])
    assert file.notes == ("none: None, not an array; not read",)


def test_a_training_state_is_read_without_its_optimizer(tmp_path):
    tree = {"step": 3, "params": {"w": np.ones(2)}, "opt_state": {"0": {"mu": {"w": np.ones(2)}, "count": 3}}}
    file = MsgpackFile(by_flax(tmp_path / "model.msgpack", tree))
    assert list(file.tensors) == ["params/w"]
    assert "step (1 array), opt_state (2 arrays): no parameters of the model; not read" in file.notes[0]
    assert list(MsgpackFile(tmp_path / "model.msgpack", "params").tensors) == ["w"]


def array(shape, dtype, data) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


GOOD = array((1,), "float32", bytes(4))
WRONG = {
    "a text": ({"a": {"b": "text"}}, "'a/b': it is a text, not an array"),
    "bytes": ({"a": b"bytes"}, "'a': it is bytes, not an array"),
    "an unknown extension": ({"a": msgpack.ExtType(9, b"1")}, "'a': it is an extension 9"),
    "an empty extension": ({"a": msgpack.ExtType(1, b"")}, "'a'"),
    "a shape of more": ({"a": array((2**40,), "float32", bytes(4))}, "'a': float32 of shape .* needs 4398046511104"),
    "a negative shape": ({"a": array((-1, -1), "float32", bytes(4))}, "'a': it has the shape"),
    "a shape of halves": ({"a": array((0.5, 2), "float32", bytes(4))}, "'a': it has the shape"),
    "another dtype": ({"a": array((1,), "object", bytes(8))}, "'a': it has dtype 'object'"),
    "less bytes": ({"a": array((2,), "float32", bytes(4))}, "'a': float32 of shape"),
    "not three": ({"a": msgpack.ExtType(1, msgpack.packb((1, 2)))}, "'a': its header is no shape, dtype and bytes"),
    "a key that is a number": ({1: GOOD}, "a number stands where a text should"),
    "two of a name": ({"a": {"b": GOOD}, "a/b": GOOD}, "two tensors 'a/b'"),
    "a list": ([GOOD], "no msgpack file of Flax: it begins with a list"),
    "chunks that lack one": (
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": GOOD, "2": GOOD}}},
        "'a': an array in chunks lacks number '1'",
    ),
    "chunks of other shape": (
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": GOOD, "1": GOOD}}},
        "'a': chunks of 2 entries",
    ),
    "chunks of nothing": ({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}, "'a': chunks of 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_tree_of_arrays_is_refused(tmp_path, case):
    tree, words = WRONG[case]
    (tmp_path / "model.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(CfmergeError, match=words) as caught:
        MsgpackFile(tmp_path / "model.msgpack")
    assert str(tmp_path / "model.msgpack") in str(caught.value)


def nested_bytes(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\x80"


RAW = {
    "empty": (b"", "0 bytes"),
    "a key twice": (b"\x82\xa1a\x01\xa1a\x02", "'a' is there twice"),
    "bytes behind": (msgpack.packb({}) + b"\0", "1 bytes follow the end"),
    "four billion entries": (b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01", "claims 4294967295 map"),
    "a list of four billion": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "'a': it claims 4294967295 list"),
    "four billion bytes": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "'a': it claims 4294967295 extension"),
    "depth": (nested_bytes(100_000), "more than 100 maps"),
    "no text": (b"\x81\xa1\xff\x01", "invalid start byte"),
    "an unused byte": (b"\x81\xa1a\xc1", "'a': there is a byte c1"),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_cannot_be_are_refused(tmp_path, case):
    content, words = RAW[case]
    (tmp_path / "model.msgpack").write_bytes(content)
    with pytest.raises(CfmergeError, match=words):
        MsgpackFile(tmp_path / "model.msgpack")


def test_truncated_files_are_refused_at_every_length(tmp_path):
    tensors = {name: TENSORS[name] for name in list(TENSORS)[:4]}
    path = written(tmp_path, tensors)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CfmergeError):
            MsgpackFile(path)


def test_names_that_are_no_tree_and_dtypes_without_a_name_are_not_written():
    f32 = ((1,), np.dtype(np.float32))
    for names in (["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]):
        with pytest.raises(CfmergeError, match="an array and a folder at once"):
            lay(dict.fromkeys(names, f32), {})
    with pytest.raises(CfmergeError, match="tensor 'w' is int4, which a msgpack file does not hold"):
        lay({"w": ((1,), np.dtype(ml_dtypes.int4))}, {})


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_flipped_bits_give_an_error_or_arrays_within_the_file(tmp_path, count):
    """The format has no checksum: other numbers may come out, and other names, but nothing else happens."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.size < 100}
    path = written(tmp_path, tensors)
    found = [outcome(lambda: MsgpackFile(path), tensors) for _ in flips([path], count)]
    assert found.count("refused") > count // 4


def test_keys_with_a_slash_come_out_as_they_were(tmp_path):
    tree = {"a/b": {"c": np.ones(2, np.float32)}, "p": {"q/r": {"s": np.zeros(1, np.float32)}, "t": np.ones(1)}}
    path = tmp_path / "base.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    base = MsgpackFile(path)
    assert base.keys == {"a/b/c": ("a/b", "c"), "p/q/r/s": ("p", "q/r", "s")}
    assert MsgpackFile(path, "p").keys == {"q/r/s": ("q/r", "s")}
    headers = {name: (info.shape, info.dtype) for name, info in base.tensors.items()}
    folder = Folder(stem="out", suffix=".msgpack", format="msgpack", like=base)
    how = {"metadata": {}, "index": None, "done": None}
    writer = FORMATS["msgpack"].write(tmp_path, headers, 1 << 60, folder, **how)
    for name in headers:
        writer.write(name, base.read(name))
    writer.close()
    assert (tmp_path / "out.msgpack").read_bytes() == path.read_bytes()
