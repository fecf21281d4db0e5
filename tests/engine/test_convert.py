"""`convert`: every format into every other, bit for bit; files as the source has them; nothing of JAX."""

import itertools
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from laid import laid

import cfmerge
from cfmerge.formats import open_checkpoint
from cfmerge.formats.containers import FORMATS
from cfmerge.products import convert as product

DTYPES = ("float32", "float16", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn", "float64")
NO_FP8, NO_EMPTY = ["npz"], ["orbax", "orbax-v0"]  # formats that cannot hold them, and say so
PAIRS = [
    pytest.param(*pair, marks=() if "safetensors" in pair else pytest.mark.long)
    for pair in itertools.product(FORMATS, FORMATS)
]


def tensors(*formats):
    """Tensors of many dtypes that formats can hold: NaNs with payloads, a number, an empty one; dots in names."""
    bits = np.random.default_rng(0)
    made = {f"block.{n}.weight": bits.integers(0, 256, (4, 8 * np.dtype(d).itemsize), np.uint8) for n, d in
            enumerate(DTYPES)}  # fmt: skip
    made = {name: bits.view(np.dtype(dtype)) for (name, bits), dtype in zip(made.items(), DTYPES, strict=True)}
    made["block.5.weight"] = made["block.4.weight"] > 99
    made |= {"scale": np.array(2.5, np.float32), "none": np.zeros((0, 3), np.float32)}
    lacking = {"block.6.weight"} if set(NO_FP8).intersection(formats) else set()
    lacking |= {"none"} if set(NO_EMPTY).intersection(formats) else set()
    return {name: tensor for name, tensor in made.items() if name not in lacking}


def model(folder, weights=None, **files):
    """A directory with safetensors, a config, a tokenizer in a folder, a card."""
    weights = {"model.safetensors": tensors() if weights is None else weights}
    return laid(folder, {"config.json": {"model_type": "x"}, "README.md": "# mine", "a/b.txt": "b", **weights, **files})


def same(path, expected):
    """Whether a model holds the tensors, bit for bit."""
    source = open_checkpoint(path)
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        info, found = source.tensors[name], source.read(name)
        assert (info.shape, info.dtype) == (tensor.shape, tensor.dtype), name
        assert found.tobytes() == np.ascontiguousarray(tensor).tobytes(), name
    return source


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_format_becomes_every_other_and_comes_back(tmp_path, first, second):
    held = tensors(first, second)
    cfmerge.convert(model(tmp_path / "in", held), tmp_path / "1", format=first)
    cfmerge.convert(tmp_path / "1", tmp_path / "2", format=second)
    same(tmp_path / "2", held)
    cfmerge.convert(tmp_path / "2", tmp_path / "3", format="safetensors")
    same(tmp_path / "3", held)


@pytest.mark.parametrize(
    ("format", "name"), [*((f, "block.6.weight") for f in NO_FP8), *((f, "none") for f in NO_EMPTY)]
)
def test_what_a_format_cannot_hold_is_told(tmp_path, format, name):
    with pytest.raises(cfmerge.CfmergeError, match=name):
        cfmerge.convert(model(tmp_path / "in"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_beside_the_weights_are_carried(tmp_path, format):
    held = tensors(format)
    done = cfmerge.convert(model(tmp_path / "in", held), tmp_path / "out", format=format)
    assert (tmp_path / "out/README.md").read_text() == "# mine"
    assert (tmp_path / "out/a/b.txt").read_text() == "b"
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x"}
    assert done.bytes == sum(tensor.nbytes for tensor in held.values())


@pytest.mark.parametrize("format", ["orbax", "orbax-v0", "distributed"])
def test_the_files_beside_a_checkpoint_that_is_a_directory_are_carried_too(tmp_path, format):
    source = model(tmp_path / "source", tensors(format))
    there = cfmerge.convert(source, tmp_path / "there", format=format).output
    (there / "__pycache__").mkdir()
    cfmerge.convert(there, tmp_path / "back", format="safetensors")
    names = {"config.json", "README.md", "a/b.txt", "model.safetensors"}
    assert {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*.*")} == names
    assert sorted(open_checkpoint(there).side_files) == ["a/b.txt", "config.json"]


@pytest.mark.parametrize("format", [name for name, one in FORMATS.items() if one.suffixes])
def test_one_file_by_its_name(tmp_path, format):
    target = tmp_path / f"out{FORMATS[format].suffixes[0]}"
    done = cfmerge.convert(model(tmp_path / "in", tensors(format)), target)
    same(target, tensors(format))
    assert any("config.json" in note for note in done.notes)


@pytest.mark.parametrize("format", FORMATS)
def test_one_file_is_a_source_too(tmp_path, format):
    model(tmp_path / "in", tensors(format))
    cfmerge.convert(tmp_path / "in/model.safetensors", tmp_path / "out", format=format)
    same(tmp_path / "out", tensors(format))


def test_shards_are_as_large_as_wanted_and_are_joined_again(tmp_path):
    cfmerge.convert(model(tmp_path / "in"), tmp_path / "out", shard_size="300B")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert len(json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]) == 10
    same(tmp_path / "out", tensors())
    cfmerge.convert(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").is_file()
    same(tmp_path / "again", tensors())


def test_a_second_conversion_gives_the_same_bytes(tmp_path):
    cfmerge.convert(model(tmp_path / "in"), tmp_path / "1")
    cfmerge.convert(tmp_path / "1", tmp_path / "2")
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


def test_components_and_their_prefixes_are_kept(tmp_path):
    dense = {"linear.weight": np.ones((2, 2), np.float32)}
    start = model(tmp_path / "in", **{
        "modules.json": [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}], "2_Dense/model.safetensors": dense,
    })  # fmt: skip
    cfmerge.convert(start, tmp_path / "out")
    assert (tmp_path / "out/2_Dense/model.safetensors").is_file()
    same(tmp_path / "out", {**tensors(), "2_Dense/linear.weight": dense["linear.weight"]})


def test_tensors_are_read_and_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(product, "AT_ONCE", 64)
    monkeypatch.setattr(product, "WAITING", 128)
    sizes = []
    cfmerge.convert(model(tmp_path / "in"), tmp_path / "out", progress=lambda name, count: sizes.append(count))
    assert max(sizes) <= 64
    assert len(sizes) > 10
    same(tmp_path / "out", tensors())


def test_an_output_is_replaced_only_when_asked(tmp_path):
    start = model(tmp_path / "in")
    cfmerge.convert(start, tmp_path / "out")
    with pytest.raises(cfmerge.CfmergeError, match="exists already"):
        cfmerge.convert(start, tmp_path / "out")
    cfmerge.convert(start, tmp_path / "out", overwrite=True)
    with pytest.raises(cfmerge.CfmergeError, match="holds an input"):
        cfmerge.convert(start, start, overwrite=True)


def test_an_error_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    start = model(tmp_path / "in")

    def failing(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cfmerge.formats.shards.os.pwrite", failing)
    with pytest.raises(cfmerge.CfmergeError, match="the disk is full"):
        cfmerge.convert(start, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_error_of_the_writing_thread_is_raised(tmp_path, monkeypatch):
    def failing(*arguments):
        raise cfmerge.CfmergeError("no more")

    monkeypatch.setattr("cfmerge.formats.DirectorySink.write", failing)
    with pytest.raises(cfmerge.CfmergeError, match="no more"):
        cfmerge.convert(model(tmp_path / "in"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_tie_in_the_metadata_is_kept(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "in").mkdir()
    save_file({"table": np.ones((3, 2), np.float32)}, tmp_path / "in/model.safetensors", {"head": "table", "x": "y"})
    cfmerge.convert(tmp_path / "in", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").ties == {"head": "table"}
    assert open_checkpoint(tmp_path / "out").metadata["x"] == "y"


def test_a_dtype_that_a_format_cannot_hold_is_named(tmp_path):
    source = open_checkpoint(model(tmp_path / "in"))
    source.tensors = {"odd": source.tensors["scale"].__class__((2,), np.dtype(ml_dtypes.int4), tmp_path)}
    with pytest.raises(cfmerge.CfmergeError, match=r"'odd' is int4, which safetensors cannot hold"):
        cfmerge.convert(source, tmp_path / "out")


def test_the_command_converts_and_imports_no_jax(tmp_path):
    model(tmp_path / "in")
    script = (
        "import sys; from cfmerge.cli import app; sys.argv[0] = 'cfmerge'\n"
        "app(standalone_mode=False)\n"
        "assert not {'jax', 'flax', 'torch', 'orbax', 'tensorstore'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", "in", "out", "--shard-size", "300B", "--json"],
        cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["event"], told["tensors"]) == ("done", 10)
    same(tmp_path / "out", tensors())


def test_unknown_names_are_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(cfmerge.CfmergeError, match="unknown family of names 'berd'; did you mean 'bert'"):
        cfmerge.convert(model(tmp_path / "in"), tmp_path / "out", names="berd")


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(cfmerge.CfmergeError, match="unknown format 'safetensor'; did you mean 'safetensors'"):
        cfmerge.convert(model(tmp_path / "in"), tmp_path / "out", format="safetensor")
    assert not (tmp_path / "out").exists()


def test_a_config_beside_a_file_is_no_part_of_it(tmp_path):
    model(tmp_path / "in")
    with pytest.raises(cfmerge.CfmergeError, match="--config"):
        cfmerge.convert(tmp_path / "in/model.safetensors", tmp_path / "out", names="llama3")
