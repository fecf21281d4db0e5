"""The examples run, and what they claim is what they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cfmerge.align import Moments

ROOT = Path(__file__).resolve().parents[1]
QUICKLY = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")  # see conftest.py


def run(name: str, *arguments: object, quickly: bool = False) -> str:
    """What the example prints; its programs are compiled as users' are, unless quickly."""
    environment = {key: value for key, value in os.environ.items() if quickly or key not in QUICKLY}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(printed: str) -> dict[str, list[float]]:
    """`{first words of the line: the numbers that follow}`."""
    found = re.findall(r"^ *([^\d\n]+?) {2,}([\d. ]+)$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


def test_flax_pipeline():
    """Each expert is good at its own task alone; ACE is closer to both than the average is."""
    errors = rows(run("flax_pipeline.py"))
    for task, own in enumerate(("expert A", "expert B")):
        other = ("expert B", "expert A")[task]
        assert errors[own][task] < 0.1 * errors["base"][task] < 0.1 * errors[other][task]
        assert errors["ACE"][task] < 0.8 * errors["average"][task]
        assert errors["average"][task] < 0.5 * errors["base"][task]


@pytest.mark.long
def test_flax_regmean():
    """RegMean is closer to both experts than the average is by far, RegMean++ closer still."""
    errors = rows(run("flax_regmean.py"))
    for task in range(2):
        assert errors["RegMean"][task] < 0.1 * errors["average"][task] < 0.1 * errors["base"][task]
        assert errors["RegMean++"][task] < errors["RegMean"][task]


@pytest.mark.long
def test_rebasin_flax():
    """Matching takes most of the barrier away, and three networks too have a mean that is nearly as good as each."""
    found = rows(run("rebasin_flax.py"))
    models = [found[name][0] for name in "abc"]
    assert min(models) > 0.85
    assert min(found["as it is"]) < min(models) - 0.15
    assert min(found["matched"]) > min(models) - 0.05
    assert found["average of a and b"][0] < min(models) - 0.15
    assert found["re-basin of a and b"][0] > min(models) - 0.05
    assert found["average of three"][0] < found["merge_many of three"][0] - 0.15


@pytest.mark.long
def test_c2m3_flax():
    """In one universe every neuron comes back, and the mean of three networks works."""
    found = {name: numbers[0] for name, numbers in rows(run("c2m3_flax.py")).items()}
    assert found["neurons back after a round, in pairs"] < 0.5
    assert found["neurons back after a round, universe"] == 1
    assert found["mean as they are"] < found["mean in the universe"] - 0.05
    assert found["mean in the universe"] > min(found[f"network {name}"] for name in "abc") - 0.03


@pytest.mark.long
def test_otfusion_flax():
    """A wide network that is transported onto a narrow one works in it, and so does the mean of both."""
    found = {name: numbers[0] for name, numbers in rows(run("otfusion_flax.py")).items()}
    narrow = found["narrow network"]
    assert found["mean with a part of the wide"] < narrow - 0.05
    assert found["wide transported onto narrow"] > narrow - 0.06
    assert found["fused"] > narrow - 0.03


def test_own_method():
    """The spectral average is nearer than the average, and the same in both forms and by all three ways."""
    distances = {name: numbers[0] for name, numbers in rows(run("own_method.py")).items()}
    ways = ("merge_tensor", "streamed", "merge_params", "merge, on disk")
    assert distances.keys() == {"average", *ways}
    for way in ways:
        assert distances[way] < 0.5 * distances["average"]
        assert distances[way] == pytest.approx(distances["merge_tensor"], abs=0.002)


def test_one_layer():
    """Covariances say where each expert's inputs lie, estimated and measured ones; and the ridge's gradient helps."""
    found = {name: numbers[0] for name, numbers in rows(run("one_layer.py")).items()}
    assert found["estimated"] < 0.5 * found["average"]
    assert found["measured"] < 0.5 * found["average"]
    assert found["tuned"] < 0.7 * found["large"]
    assert found["batch"] < 1e-3
    assert found["forgotten"] < 1e-2


def test_zipit_flax():
    """A zip keeps more than the average and the permuted average; in part it keeps nearly all, run from one trunk."""
    found = rows(run("zipit_flax.py", quickly=True))
    for task in range(2):
        average, permuted, whole, part, less, apart = (
            found[name][task] for name in (
                "average", "permuted, then averaged", "zipped all through", "zipped, two layers of three",
                "zipped, the first layer", "two networks",
            )
        )  # fmt: skip
        assert average + 0.1 < permuted < whole < part < less < apart < part + 0.05
    assert found["two layers, saved and loaded"] == found["zipped, two layers of three"]
    assert found["zipped, two layers of three"][2] < 0.75
    assert found["operations from one trunk of two layers, of those of two networks"][0] < 0.75


@pytest.mark.long
def test_sharded_trees():
    """The result lies as the base does, an eighth of it on each device, and is the merge on one device."""
    printed = run("sharded_trees.py", quickly=True)
    found = rows(printed)
    assert "lies as P('data', 'model')" in printed
    assert found["share of a device"][0] < 0.13
    assert found["eagerly, off by"][0] < 2e-5
    assert found["under jit, off by"][0] < 2e-5
    same, every = re.search(r"as the base's  (\d+)  of (\d+)", printed).groups()
    assert same == every


def test_composed_tasks():
    printed = run("composed_tasks.py", quickly=True)
    sizes = {line.split()[0]: float(line.split()[2]) for line in printed.splitlines() if " size " in line}
    assert sizes["average"] == 1.0
    assert 1.5 < sizes["emr"] < 2.5
    errors = [float(one.split()[1]) for line in printed.splitlines() if line.startswith(("average", "tsv_c"))
              for one in line.partition("errors ")[2].split(", ")]  # fmt: skip
    assert max(errors[3:]) < min(errors[:3])  # the tasks' own models are nearer than the average
    assert "fish.npz ['dense_0/bias'" in printed


def test_tangent_components():
    """Each component is good at its own task alone, all together at every task, and a forgotten one leaves nothing."""
    printed = run("tangent_components.py", quickly=True)
    found = rows(printed)
    for task, name in enumerate(("left", "high", "far")):
        assert found[f"{name} alone"][task] > 0.9
        assert max(found["base"][task], *np.delete(found[f"{name} alone"], task)) < 0.75
        assert found["composed"][task] > 0.85
    assert found["without high"][1] < 0.6
    assert "forgotten as never seen   True" in printed
    assert "far.safetensors, high.safetensors, left.safetensors, tangents.json" in printed


def check_huggingface(printed: str) -> None:
    assert "14 tensors  matrix: ace" in printed
    assert "5 tensors  vector: keep-base" in printed
    assert "2 tensors  embedding: average" in printed
    assert "missing: 0, unexpected: 0" in printed
    tokens = re.search(r"generates: \[([\d, ]+)\]", printed)
    assert tokens
    assert tokens[1].startswith("1, 7, 8, ")
    assert sum(int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", printed)) > 900_000


def test_huggingface_merge():
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    check_huggingface(run("huggingface_merge.py"))


def test_huggingface_merge_of_given_checkpoints(tmp_path):
    """As a user calls it, on checkpoints that the example's own function has made."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import huggingface_merge
    finally:
        sys.path.pop(0)
    checkpoints = huggingface_merge.make_checkpoints(tmp_path)
    check_huggingface(run("huggingface_merge.py", *checkpoints, "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "README.md").is_file()


def test_sentence_transformers_merge():
    """Each expert knows its own words alone; the merged model knows both."""
    pytest.importorskip("sentence_transformers")
    found = rows(run("sentence_transformers_merge.py"))
    for task, own in enumerate(("animals", "numbers")):
        assert found[own][task] > 0.9
        assert found[own][1 - task] < 0.5
        assert found["base"][task] < 0.5
        assert found["merged"][task] > 0.9


def test_torch_checkpoints():
    """Merged checkpoints of a training script are better than the best of them."""
    pytest.importorskip("torch")
    errors = {name: numbers[0] for name, numbers in rows(run("torch_checkpoints.py")).items()}
    assert errors["average"] < 0.9 * errors["best checkpoint"] <= 0.9 * errors["last checkpoint"]
    assert errors["karcher"] < 0.9 * errors["best checkpoint"]


@pytest.mark.long
def test_smile_nnx():
    """Signals choose the right expert where the average mixes all; one model is near each expert at its own task."""
    errors = rows(run("smile_nnx.py"))
    for task, own in enumerate(("expert A", "expert B", "expert C")):
        assert errors[own][task] < 0.05 * errors["base"][task]
        assert errors["SMILE"][task] < 0.6 * errors["average"][task] < 0.6 * errors["base"][task]
    assert 1 < errors["SMILE, times the base's parameters"][0] < 1 + 3


@pytest.mark.long
def test_smile_torch():
    """One expert with all of its rank is that model itself; three of a small rank are smaller than it."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    printed = run("smile_torch.py")
    found = rows(printed)
    assert found["one expert of all of its rank, off by"][0] < 1e-4 < 0.1 < found["the base, off by"][0]
    counts = re.findall(r"8 layers have experts: ([\d,]+) parameters, (\d\.\d\d) times", printed)
    assert len(counts) == 2
    assert all(1 < float(times) < 3 for _, times in counts)


@pytest.mark.long
def test_time_flax(tmp_path):
    """The running mean ends above the last model, and higher still with replay; a second run has nothing to do."""
    printed = run("time_flax.py", tmp_path)
    accumulation = {name.strip(): numbers for name, numbers in rows(printed).items()}
    last = {name: numbers[-1] for name, numbers in accumulation.items()}
    assert last["the base"] < last["sequential"] < last["best in time"] < last["best in time, replay"]
    again = rows(run("time_flax.py", tmp_path))
    assert {name.strip(): numbers for name, numbers in again.items()} == accumulation


@pytest.mark.long
def test_time_torch():
    """The accumulation grows with each task that comes, and the tasks that are never trained gain too."""
    printed = rows(run("time_torch.py", quickly=True))
    red, green, blue = (printed[name] for name in ("red", "green", "blue"))
    assert red[0] < green[0] < blue[0]
    assert red[1] < blue[1]


@pytest.mark.long
def test_zipit_torch(tmp_path):
    """Correlations tell the order of the neurons; one trunk and two heads compute what both models do."""
    pytest.importorskip("torch")
    found = {
        name: numbers[0] for name, numbers in rows(run("zipit_torch.py", tmp_path / "moments.safetensors")).items()
    }
    assert found["neurons of c that are found"] == found["neurons of h that are found"] == 1
    for model in ("first", "second"):
        assert found[f"{model}, zipped, off by"] < 1e-5 < 0.1 < found[f"{model}, averaged, off by"]
    assert found["numbers of the zip"] < 0.7 * found["numbers of both models"]
    assert Moments.load(tmp_path / "moments.safetensors").models == ("first", "second")
