"""Processes share a merge: the bytes of one process, each reads its part, and one that ends makes all stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cfmerge
from cfmerge.engine.processes import dealt

SHORT = ["average", "ties"]
METHODS = [
    "average", "ties", "ace", "tsv_m", "dare_ties", "breadcrumbs", "della", "karcher", "sce", "model_stock", "metagpt",
    "sweep",
]  # fmt: skip

# Merges one after the other: `methods` into `OUT-METHOD`. It prints what each process has read, in bytes.
WORKER = """
import json, os, signal, sys
from pathlib import Path
asked = json.loads(sys.argv[1])
import cfmerge
from cfmerge.engine import cutting, looks, orders
from cfmerge.formats import journal, meeting
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.products import carry_out
from cfmerge.products.processes import joined_by
cutting.ENTRIES, cutting.STACKED, journal.EVERY, meeting.GONE = 1024, 512, 0.0, 5.0
looks.SMALL, orders.BLOCKS, orders.BLOCK = 1024, 8, 64  # so that order statistics are bracketed by a sample
reads, read = [], SafetensorsFile.read
def noted(self, name, first=0, count=None):
    array = read(self, name, first, count)
    reads.append(array.nbytes)
    return array
SafetensorsFile.read = noted
number, count, port = asked["number"], asked["count"], asked["port"]
if count > 1:
    joined_by(f"127.0.0.1:{port}", str(count), number, asked["devices"])
class Killed(journal.FileJournal):
    left = asked["after"]
    def mark(self, ranges, told=None):
        super().mark(ranges, told)
        Killed.left -= 1
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
if number == asked["killed"]:
    carry_out.FileJournal = Killed
for method in asked["methods"]:
    reads.clear()
    how = {"output": asked["out"] + "-" + method, "devices": asked["devices"], **asked["options"]}
    if method == "sweep":
        result = cfmerge.sweep(asked["base"], asked["experts"], ["average", "ties", "ace"], **how)["ties"]
    else:
        result = cfmerge.merge(asked["base"], asked["experts"], method, **how)
    print(json.dumps([method, sum(reads), list(result.resumed)]), flush=True)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def shared(family, out: Path, methods, count: int, devices="cpu", killed=None, after=1, **options):
    """`(exit codes, {method: bytes read by each process}, stderr)` of a merge by so many processes."""
    port = free_port()
    asked = {
        "base": str(family.base), "experts": [str(one) for one in family.experts], "out": str(out), "count": count,
        "methods": list(methods), "devices": devices, "port": port, "killed": killed, "after": after,
        "options": options,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(asked | {"number": number})],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    told = [process.communicate(timeout=600) for process in started]
    read: dict[str, list[int]] = {}
    for out_text, _ in told:
        for method, size, *_ in map(json.loads, out_text.splitlines()):
            read.setdefault(method, []).append(size)
    return [process.returncode for process in started], read, [error for _, error in told]


def check(family, tmp_path, contents, methods, count, devices):
    codes, alone, errors = shared(family, tmp_path / "one", methods, 1, devices)
    assert codes == [0], errors
    codes, read, errors = shared(family, tmp_path / "many", methods, count, devices)
    assert codes == [0] * count, errors
    for method in methods:
        assert contents(tmp_path / f"many-{method}") == contents(tmp_path / f"one-{method}"), method
        if count == 2:
            assert max(read[method]) <= 0.65 * sum(read[method]), method
            assert sum(read[method]) <= 1.25 * alone[method][0], method
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def larger(tmp_path, make_model, llama_config, family):
    """Six layers, so that there is something to share out."""
    shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32)}
    for layer in range(6):
        own = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (32,)
    config = llama_config | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 64,
    }  # fmt: skip
    paths = []
    for number in range(4):
        common, own = np.random.default_rng(0), np.random.default_rng(number)
        tensors = {
            name: (common.standard_normal(shape) + 0.02 * bool(number) * own.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        paths.append(make_model(tmp_path / "larger" / f"m{number}", tensors, config))
    family.base, family.experts = paths[0], paths[1:]
    return family


def test_two_processes_write_the_bytes_of_one(larger, tmp_path, contents):
    check(larger, tmp_path, contents, SHORT, 2, "cpu")


@pytest.mark.long
def test_two_processes_permute_an_expert_alike(larger, tmp_path, contents, make_model, llama_config):
    """The first finds the permutations, and the other has them from it."""
    source = cfmerge.open_checkpoint(larger.experts[0])
    tensors = {name: np.array(source.read(name)) for name in source.tensors}
    order = np.random.default_rng(0).permutation(64)
    for name, tensor in tensors.items():
        if "up_proj" in name:
            tensors[name] = np.ascontiguousarray(tensor[order])
        elif "down_proj" in name:
            tensors[name] = np.ascontiguousarray(tensor[:, order])
    larger.experts = [make_model(tmp_path / "permuted", tensors, source.config), *larger.experts[1:]]
    table = {"spaces": {name: ", ".join("-" for _ in tensor.shape) for name, tensor in tensors.items()}}
    for name in tensors:
        if "_proj" in name and "q_proj" not in name:
            table["spaces"][name] = "mlp{l}, in -" if "up_proj" in name else "-, in mlp{l}"
    lines = {name.replace(f".{n}.", ".{l}."): text for n in range(6) for name, text in table["spaces"].items()
             if f".{n}." in name or n == 0}  # fmt: skip
    (tmp_path / "spaces.yaml").write_text(json.dumps({"spaces": lines}))
    align = {"spaces": str(tmp_path / "spaces.yaml")}
    codes, _, errors = shared(larger, tmp_path / "many", SHORT, 2, align=align)
    assert codes == [0, 0], errors
    for method in SHORT:
        cfmerge.merge(larger.base, larger.experts, method, output=tmp_path / f"one-{method}", align=align)
        assert contents(tmp_path / f"many-{method}") == contents(tmp_path / f"one-{method}"), method
    plain = cfmerge.merge(larger.base, larger.experts, "average", output=tmp_path / "plain")
    assert contents(plain.output) != contents(tmp_path / "one-average")


@pytest.mark.long
@pytest.mark.parametrize("format", ["torch", "msgpack", "npz", "orbax", "orbax-v0", "distributed"])
def test_two_processes_write_every_format(larger, tmp_path, format):
    codes, _, errors = shared(larger, tmp_path / "many", ["ties"], 2, format=format)
    assert codes == [0, 0], errors
    cfmerge.merge(larger.base, larger.experts, "ties", output=tmp_path / "one")
    found, expected = (cfmerge.open_checkpoint(tmp_path / name) for name in ("many-ties", "one"))
    assert set(found.tensors) == set(expected.tensors)
    assert found.folders[0].format == format
    for name in expected.tensors:
        np.testing.assert_array_equal(found.read(name), expected.read(name))


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_with_two_devices_each_write_the_bytes_of_one(larger, tmp_path, contents, count):
    check(larger, tmp_path, contents, METHODS, count, 2)


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("method", ["ace", "ties"])
def test_a_killed_process_stops_the_other_and_the_next_run_goes_on(larger, tmp_path, contents, killed, method):
    _, alone, errors = shared(larger, tmp_path / "one", [method], 1)
    assert alone, errors
    codes, _, errors = shared(larger, tmp_path / "out", [method], 2, killed=killed, after=4)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    assert f"StoppedError: process {killed} of 2 is gone" in errors[1 - killed]
    assert "goes on" in errors[1 - killed]
    codes, read, errors = shared(larger, tmp_path / "out", [method], 1)
    assert codes == [0], errors
    assert read[method][0] < alone[method][0]
    assert contents(tmp_path / f"out-{method}") == contents(tmp_path / f"one-{method}")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.long
def test_an_input_error_that_one_process_meets_ends_all_and_leaves_nothing(larger, tmp_path, make_model):
    name = "model.layers.3.mlp.up_proj.weight"
    tensors = dict(_loaded(larger.experts[1]))
    tensors[name][3, 5] = np.nan
    config = json.loads((larger.experts[1] / "config.json").read_text())
    larger.experts[1] = make_model(tmp_path / "bad", tensors, config)
    codes, _, errors = shared(larger, tmp_path / "out", ["ace"], 2)
    assert codes == [1, 1]
    for error in errors:
        assert f"tensor '{name}' holds NaN or infinity" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "in", "larger"]
    codes, _, errors = shared(larger, tmp_path / "out", ["ace"], 2, on_nonfinite="skip-expert")
    assert codes == [0, 0], errors
    del larger.experts[1]
    assert shared(larger, tmp_path / "without", ["ace"], 1)[0] == [0]
    merged, expected = (_loaded(tmp_path / name) for name in ("out-ace", "without-ace"))
    assert merged.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(merged[tensor], values)


@pytest.mark.long
@pytest.mark.parametrize("how", ["named", "slurm"])
def test_the_command_line_joins_processes_and_the_first_one_tells(larger, tmp_path, how):
    """By its options, and as JAX finds them in the environment of a SLURM job."""
    port = free_port()
    words = ["merge", "--base", str(larger.base), *(f"-e{one}" for one in larger.experts), "-m", "average"]
    words += ["-o", str(tmp_path / "out")]

    def started(number: int) -> subprocess.Popen:
        own, environment = [*words, "--processes", "auto"], os.environ | {"COLUMNS": "80"}
        if how == "named":
            own[-1:] = ["2", "--coordinator", f"127.0.0.1:{port}", "--process", str(number)]
        else:
            environment |= {
                "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1",
                "JAX_COORDINATOR_PORT": str(port),
            }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "cfmerge", *own],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    running = [started(number) for number in range(2)]
    (first, errors), (second, others) = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], (errors, others)
    assert "merged by average" in first
    assert second == ""
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.long
def test_a_merge_in_a_slurm_job_is_one_process_unless_asked(larger, tmp_path, monkeypatch):
    for key, value in {
        "JOB_ID": "7",
        "STEP_NODELIST": "localhost",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    words = ["merge", "--base", str(larger.base), *(f"-e{one}" for one in larger.experts), "-m", "average"]
    done = subprocess.run(
        [sys.executable, "-m", "cfmerge", *words, "-o", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "merged by average" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2"], "give all of --coordinator"),
        (["--processes", "two", "--coordinator", "a:1", "--process", "0"], "expected a number of processes"),
        (["--processes", "2", "--coordinator", "a:1", "--process", "2"], "expected a number of processes"),
        (["--processes", "2", "--coordinator", "a", "--process", "0"], "expected HOST:PORT"),
        (["--processes", "auto", "--process", "0"], "leave both out"),
    ],
)
def test_options_that_do_not_fit_each_other_are_told(words, message):
    from cfmerge.products.processes import joined_by

    given = dict(zip(words[::2], words[1::2], strict=True))
    process = given.get("--process")
    with pytest.raises(cfmerge.CfmergeError, match=message):
        joined_by(given.get("--coordinator"), given["--processes"], None if process is None else int(process), None)


def test_things_are_dealt_out_evenly_and_all_of_them():
    costs = np.random.default_rng(0).lognormal(size=100).tolist()
    for count in (1, 2, 4, 7):
        owners = dealt(costs, count)
        loads = np.bincount(owners, costs, count)
        assert loads.max() - loads.min() <= max(costs)
    assert dealt([], 3) == []


def _loaded(directory: Path) -> dict:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")
