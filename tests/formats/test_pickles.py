"""Pickles are read as records: nothing is imported, nothing runs, and hostile ones end in a clear error, soon."""

import collections
import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import pytest

from cfmerge.errors import CfmergeError
from cfmerge.formats import pickles
from cfmerge.formats.dangers import danger
from cfmerge.formats.pickles import Call, Global, Persistent, interpret
from cfmerge.formats.pytorch import TorchFile

TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\2tQ"
    b"K\0K\2\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
)
RUN = b"cos\nmkdir\n"
ARGS = b"(X\3\0\0\0rant"  # ("ran",)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def state(value: bytes) -> bytes:
    """A state dict of one tensor, and a value under a further key."""
    return b"\x80\x02}(" + text("w") + TENSOR + text("more") + value + b"u."


MKDIR = RUN + ARGS + b"R"
PAYLOADS = {
    "REDUCE": state(MKDIR),
    "REDUCE under the weights' own key": b"\x80\x02}(" + text("w") + MKDIR + b"u.",
    "REDUCE as the whole file": b"\x80\x02" + MKDIR + b".",
    "REDUCE in a wrapper": b"\x80\x02}("
    + text("state_dict")
    + b"}"
    + text("w")
    + TENSOR
    + b"s"
    + text("x")
    + MKDIR
    + b"u.",
    "REDUCE, thrown away": b"\x80\x02" + MKDIR + b"0}" + text("w") + TENSOR + b"s.",
    "REDUCE, thrown away with a mark": b"\x80\x02(" + MKDIR + b"1}" + text("w") + TENSOR + b"s.",
    "a key": state(b"}" + MKDIR + b"K\1s"),
    "a key in a tuple": state(b"}" + MKDIR + b"K\1\x86K\1s"),
    "an entry of a list": state(b"](" + MKDIR + b"K\1e"),
    "an argument": state(b"ccollections\nOrderedDict\n(" + MKDIR + b"tR"),
    "in a persistent id": state(b"(" + text("storage") + MKDIR + b"tQ"),
    "a storage's key": state(TENSOR.replace(b"X\1\0\0\x000", MKDIR)),
    "a tensor's hooks": state(TENSOR.replace(b"ccollections\nOrderedDict\n)R", MKDIR)),
    "a state": state(b"cfoo\nBar\n)\x81" + MKDIR + b"b"),
    "a state that a class is given": state(b"ctorch\nTensor\n}" + text("x") + b"K\1sb"),
    "INST": state(b"(" + text("ran") + b"ios\nmkdir\n"),
    "OBJ": state(b"(" + RUN + text("ran") + b"o"),
    "NEWOBJ": state(b"csubprocess\nPopen\n" + ARGS + b"\x81"),
    "NEWOBJ_EX": state(b"\x80\x04csubprocess\nPopen\n" + ARGS + b"}\x92"),
    "EXT1": state(b"\x82\1" + ARGS + b"R"),
    "EXT2": state(b"\x83\1\1" + ARGS + b"R"),
    "EXT4": state(b"\x84\1\1\1\0" + ARGS + b"R"),
    "STACK_GLOBAL": state(text("os") + text("mkdir") + b"\x93" + ARGS + b"R"),
    "STACK_GLOBAL of remembered names": state(
        text("os") + b"q\1" + text("mkdir") + b"q\x020" + b"0h\1h\2\x93" + ARGS + b"R"
    ),
    "STACK_GLOBAL of names of protocol 4": state(b"\x80\x04\x8c\2os\x94\x8c\5mkdir\x94\x93" + ARGS + b"R"),
    "a name through another module": state(text("torch") + text("os.mkdir") + b"\x93" + ARGS + b"R"),
    "a name through a class": state(text("torch") + text("Tensor.__init__.__globals__") + b"\x93"),
    "a module as a value": state(text("torch") + text("os") + b"\x93"),
    "an alias of a module": state(b"csix.moves.builtins\neval\n(" + text("1") + b"tR"),
    "what a call gives is called": state(b"cfoo\nmaker\n)R" + ARGS + b"R"),
    "only named": state(RUN),
    "protocol 0": b"(dp0\nS'more'\np1\ncos\nmkdir\np2\n(S'ran'\np3\ntp4\nRp5\ns.",
    "in a frame": state(b"\x80\x04\x95\x1a\0\0\0\0\0\0\0" + MKDIR),
    "in a set": state(b"\x8f(" + MKDIR + b"\x90"),
    "in a frozenset": state(b"(" + MKDIR + b"\x91"),
    "twice nested calls": state(b"cfunctools\npartial\n" + RUN + b"\x85R"),
}
CALLABLES = [
    "os.system",
    "posix.system",
    "nt.system",
    "posix.execv",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.__import__",
    "builtins.open",
    "__builtin__.execfile",
    "__builtin__.apply",
    "sys.exit",
    "sys.modules.get",
    "runpy.run_path",
    "socket.create_connection",
    "importlib.import_module",
    "shutil.rmtree",
    "ctypes.CDLL",
    "pickle.loads",
    "_pickle.loads",
    "dill.loads",
    "cloudpickle.loads",
    "marshal.loads",
    "types.FunctionType",
    "types.CodeType",
    "pty.spawn",
    "commands.getoutput",
    "webbrowser.open",
    "code.interact",
    "io.open",
    "_io.FileIO",
    "operator.attrgetter",
    "operator.methodcaller",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.utils.cpp_extension.load",
    "torch.ops.load_library",
    "torch.storage._load_from_bytes",
    "numpy.load",
    "numpy.f2py.compile",
    "pandas.read_pickle",
    "copyreg.add_extension",
    "codecs.open",
    "pathlib.Path.write_text",
    "urllib.request.urlopen",
    "requests.get",
    "multiprocessing.Process",
    "asyncio.run",
    "timeit.timeit",
    "pdb.run",
    "bdb.Bdb.run",
    "profile.run",
    "pip.main",
    "threading.Thread",
    "tempfile.mktemp",
]
HARMLESS = [
    "collections.OrderedDict",
    "builtins.set",
    "__builtin__.set",
    "torch._utils._rebuild_tensor_v2",
    "torch.float32",
    "torch.Size",
    "torch.device",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
    "copyreg._reconstructor",
    "enum.Enum",
    "functools.partial",
    "omegaconf.dictconfig.DictConfig",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "ultralytics.nn.tasks.DetectionModel",
    "models.yolo.Model",
    "torch.nn.modules.linear.Linear",
    "datetime.datetime",
    "uuid.UUID",
    "types.SimpleNamespace",
    "transformers.training_args.TrainingArguments",
    "mmdet.core.evaluation.Meter",
]


def torch_zip(path, content: bytes):
    """A file as torch.save makes it, with that pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/data/0", struct.pack("<2f", 1, 2))
        archive.writestr("model/version", "3\n")
    return path


@pytest.mark.parametrize("case", PAYLOADS)
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = torch_zip(tmp_path / "model.bin", PAYLOADS[case])
    with pytest.raises(CfmergeError) as caught:
        TorchFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert "this file would" in message
    assert "nothing of it was run" in message
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


def test_the_payloads_are_real(tmp_path, monkeypatch):
    """The plainest of them does run when Python loads it."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(PAYLOADS["REDUCE as the whole file"])
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("name", CALLABLES)
def test_dangerous_names_are_refused_by_name(name):
    module, _, own = name.rpartition(".")
    with pytest.raises(CfmergeError, match=f"would run {name.replace('.', '[.]')}"):
        interpret(state(f"c{module}\n{own}\n".encode()), "file")


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_checkpoints_hold_are_not_refused(name):
    module, _, own = name.rpartition(".")
    assert not danger(module, own)


VALUES = [
    None, True, -5, 1 << 40, -(1 << 80), 2.5, "text", "ünï", b"bytes", [1, [2, [3]]], (1,), (1, 2), (1, 2, 3),
    (1, 2, 3, 4), {"a": {"b": (1, None)}, 3: 4, (1, "x"): []}, [], (), {}, ["x" * 300] * 3, bytearray(b"abc"),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_as_pickle_has_them(protocol):
    for value in VALUES:
        if (protocol < 3 and isinstance(value, bytes | bytearray)) or (isinstance(value, bytearray) and protocol < 5):
            continue
        found = interpret(pickle.dumps(value, protocol), "file").value
        assert found == value
        assert type(found) is type(value) or type(value) is bytearray


def test_a_member_of_an_enumeration_is_no_danger():
    """Python 3.11.0 to 3.11.3 pickled it so, in the index of distributed checkpoints too."""
    member = b"cbuiltins\ngetattr\n(cfoo\nColour\n" + text("RED") + b"tR"
    value = interpret(b"\x80\x02" + member + b".", "file").value
    assert value.args == (Global("foo", "Colour"), "RED")
    others = [b"(cfoo\nColour\n" + text("__init__") + b"tR", b"(" + text("a") + text("upper") + b"tR", b""]
    others += [b"(ctorch\nnn\n" + text("os") + b"tR", b"(cfoo\nColour\n" + text("a.b") + b"tR"]
    for other in others:
        with pytest.raises(CfmergeError, match="this file would run"):
            interpret(state(b"cbuiltins\ngetattr\n" + other), "file")
    with pytest.raises(CfmergeError, match=r"the result of builtins\.getattr"):
        interpret(state(member + b")R"), "file")


def test_a_call_is_a_record():
    value = interpret(pickle.dumps(collections.OrderedDict(a=1), 2), "file").value
    assert isinstance(value, Call)
    assert (value.func, value.items) == (Global("collections", "OrderedDict"), [("a", 1)])
    own = interpret(b"\x80\x02(K\1K\2tQ.", "file")
    assert isinstance(own.value, Persistent)
    assert own.value.id == (1, 2)
    assert own.persistents == (own.value,)


BROKEN = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "an unknown opcode": b"\x80\x02\xff.",
    "nothing on the stack": b"\x80\x02.",
    "two values": b"\x80\x02NN.",
    "a mark that is not there": b"\x80\x02t.",
    "a mark that is left": b"\x80\x02(N.",
    "a memo that is not there": b"\x80\x02h\5.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fab.",
    "a negative length": b"\x80\x02T\xff\xff\xff\xffab.",
    "a key without a value": b"\x80\x02}(NNNu.",
    "items of a list": b"\x80\x02](NNu.",
    "entries of a dict": b"\x80\x02}(NNe.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a text is called": b"\x80\x02X\1\0\0\0a)R.",
    "arguments that are no tuple": b"\x80\x02ccollections\nOrderedDict\nNR.",
    "a state of a list": b"\x80\x02]Nb.",
    "two states": b"\x80\x02cfoo\nBar\n)\x81}b}b.",
    "a name of numbers": b"\x80\x04K\1K\2\x93.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "many marks": b"\x80\x02" + b"(" * 200 + b"t" * 200 + b".",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "a text that is none": b"\x80\x02X\2\0\0\0\xff\xfe.",
    "a negative memo": b"p-1\n.",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pickle_is_an_error(case):
    with pytest.raises(CfmergeError, match=r"model\.bin: .*corrupt"):
        interpret(BROKEN[case], "model.bin")


def test_a_file_is_read_to_the_end_of_the_pickle_and_no_further():
    file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps({"a": 2}, 2))
    assert [interpret(file, "file").value for _ in range(2)] == [[1], {"a": 2}]


def laughs(levels: int) -> bytes:
    """Tuples of two of the level below: 2^levels entries if they were written out."""
    return b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", n) + b"h" + bytes([n]) + b"\x86" for n in range(levels))


BOMBS = {
    "tuples of tuples": laughs(200) + b".",
    "tuples of tuples as a key": b"\x80\x02}" + laughs(200)[2:] + b"Ns.",
    "lists in lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "tuples in tuples": b"\x80\x02N" + b"\x85" * 300_000 + b".",
    "tuples in tuples as a key": b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.",
    "calls in calls": b"\x80\x02N" + b"".join(b"\x85q\1" + b"0cfoo\nBar\nh\1R" for _ in range(20_000)) + b".",
    "a list in itself": b"\x80\x02]q\1h\1a.",
    "a long key again and again": b"\x80\x02}(" + b"N" * 50_000 + b"tq\1Ns" + b"h\1Ns" * 20_000 + b".",
    "a large number as a key": b"\x80\x02}\x8b"
    + struct.pack("<i", 500_000)
    + b"\1" * 500_000
    + b"q\1N"
    + b"sh\1N" * 5_000
    + b"s.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_read_or_refused_in_bounded_time_and_memory(tmp_path, case):
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(CfmergeError):
            TorchFile(torch_zip(tmp_path / "model.bin", BOMBS[case]))
        assert tracemalloc.get_traced_memory()[1] < 300 * len(BOMBS[case]) + 20_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 60  # they would take hours


def test_a_pickle_beyond_the_limits_is_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    with pytest.raises(CfmergeError, match="20 bytes, cfmerge reads at most 10"):
        interpret(b"\x80\x02" + b"N0" * 8 + b"N.", "file")
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    monkeypatch.setattr(pickles, "MAX_OPCODES", 10)
    with pytest.raises(CfmergeError, match="more than 10 opcodes"):
        interpret(b"\x80\x02" + b"N0" * 8 + b"N.", "file")
