"""npz files: read as NumPy reads them and written so that it reads them; nothing in them is unpickled."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
from flips import flips, outcome
from laid import headers_of, in_pieces

from cfmerge.errors import CfmergeError
from cfmerge.formats.npz import NpzFile, lay
from cfmerge.formats.shards import ShardWriter

BF16 = ml_dtypes.bfloat16
TENSORS = {
    "params/Transformer/encoderblock_0/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "params/bias": np.linspace(-1, 1, 5).astype(BF16),
    "params/größe": np.array([[1.5, -2]], np.float16),
    "params/count": np.array(7, np.int64),
    "params/empty": np.zeros((0, 3), np.float32),
    "params/mask": np.array([True, False]),
    "params/z": np.array([1 + 2j], np.complex64),
}


def written(path, tensors=TENSORS):
    """A file of cfmerge's writer, its tensors in pieces."""
    writer = ShardWriter(path, headers_of(tensors), 1 << 60, {}, "model", suffix=".npz", lay=lay)
    in_pieces(writer, tensors)
    return path / "model.npz"


def test_reads_what_numpy_writes(tmp_path):
    np.savez(tmp_path / "model.npz", **TENSORS)
    file = NpzFile(tmp_path / "model.npz")
    for name, tensor in TENSORS.items():
        found = file.read(name)
        info = file.tensors[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
        assert found.tobytes() == tensor.tobytes()
        assert not found.flags.writeable
        if tensor.size:
            assert file.read(name, 1, tensor.size - 1).tobytes() == tensor.reshape(-1)[1:].tobytes()


def test_numpy_and_cfmerge_read_what_cfmerge_writes(tmp_path):
    path = written(tmp_path)
    with np.load(path) as expected, zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert list(expected) == list(TENSORS)
        for name, tensor in TENSORS.items():
            found = expected[name].view(BF16) if tensor.dtype == BF16 else expected[name]
            assert found.dtype == tensor.dtype
            assert np.array_equal(found, tensor)
    file = NpzFile(path)
    for name, tensor in TENSORS.items():
        found = file.read(name)
        assert found.tobytes() == tensor.tobytes()
        assert not found.size or found.ctypes.data % 64 == 0


def test_each_member_is_as_numpy_writes_it(tmp_path):
    path = written(tmp_path)
    np.savez(tmp_path / "numpy.npz", **TENSORS)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "numpy.npz") as theirs:
        for name in theirs.namelist():
            assert ours.read(name) == theirs.read(name)


def test_arrays_by_columns_are_read_by_rows(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    np.savez(tmp_path / "model.npz", w=np.asfortranarray(array), v=np.asfortranarray(array[0, 0]))
    file = NpzFile(tmp_path / "model.npz")
    assert file.read("w").flags.c_contiguous
    assert np.array_equal(file.read("w"), array)
    assert np.array_equal(file.read("w", 7, 12), array.reshape(-1)[7:19])
    assert (file.grain("w"), file.grain("v")) == (6, 1)


def test_bytes_in_the_other_order_are_turned(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    np.savez(tmp_path / "model.npz", w=array, i=array.astype(">i8"))
    file = NpzFile(tmp_path / "model.npz")
    assert file.tensors["w"].dtype == file.read("w").dtype == np.dtype("<f4")
    assert file.tensors["i"].dtype.isnative
    assert np.array_equal(file.read("w"), array)
    assert np.array_equal(file.read("i", 2, 3), [2, 3, 4])


def test_a_training_state_is_read_without_its_optimizer(tmp_path):
    tensors = {"params/w": np.ones(2), "opt/0/mu": np.ones(2), "opt/0/nu": np.ones(2)}
    np.savez(tmp_path / "model.npz", **tensors)
    file = NpzFile(tmp_path / "model.npz")
    assert list(file.tensors) == ["params/w"]
    (note,) = file.notes
    assert "opt (2 arrays): no parameters of the model; not read" in note
    assert list(NpzFile(tmp_path / "model.npz", "opt/0").tensors) == ["mu", "nu"]
    with pytest.raises(CfmergeError, match=r"no arrays below 'parms'; did you mean 'params'"):
        NpzFile(tmp_path / "model.npz", "parms")


def test_what_is_no_array_of_numbers_is_refused(tmp_path):
    path = tmp_path / "model.npz"

    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    structured = np.zeros(2, [("a", "f4")])
    for array, words in (
        (np.array([Runs()], dtype=object), "'w': it holds Python objects, which are pickled"),
        (np.ones(3, ml_dtypes.float8_e4m3fn), "'w': its dtype is not in the file"),
        (structured, "'w': it has dtype"),
        (np.array(["text"]), "'w': it has dtype '<U4'"),
    ):
        np.savez(path, w=array)
        with pytest.raises(CfmergeError, match=words) as caught:
            NpzFile(path)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "ran").exists()
    np.savez_compressed(path, w=np.ones(3))
    with pytest.raises(CfmergeError, match=r"'w.npy' is compressed \(deflate\).*numpy.savez\(OUT"):
        NpzFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(CfmergeError, match=r"data.pkl: no array \(.npy\)"):
        NpzFile(path)
    with pytest.raises(CfmergeError, match="'w' is float8_e4m3fn, which an npz file does not name"):
        lay({"w": ((3,), np.dtype(ml_dtypes.float8_e4m3fn))}, {})


HEADERS = {
    "a shape of more": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
    "a negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3), }",
    "a shape of booleans": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3), }",
    "code": "__import__('os').system('touch ran')",
    "no dict": "[1, 2]",
    "another key": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}",
    "deep": "(" * 5000,
    "no order": "{'descr': '<f4', 'fortran_order': 1, 'shape': (3,), }",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_cannot_be_are_refused(tmp_path, case):
    text = HEADERS[case].encode()
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(12))
    with pytest.raises(CfmergeError, match=r"model.npz: tensor 'w': .*fetch the file again"):
        NpzFile(tmp_path / "model.npz")


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("writer", ["numpy", "cfmerge"])
def test_flipped_bits_are_found_or_change_nothing(tmp_path, count, writer):
    path = written(tmp_path)
    if writer == "numpy":
        np.savez(path, **TENSORS)
    found = [outcome(lambda: NpzFile(path), TENSORS) for _ in flips([path], count)]
    assert set(found) <= {"refused", "same"}
    assert found.count("refused") > count // 4
