"""The blocks of the tutorials and how-tos run, in order, on tiny models of the names that they use.

`sh` blocks are lines of `cfmerge`; `python` blocks of a page share their names; `yaml` blocks that begin with a
comment `# NAME` are that file. `bash` blocks need more than a test has, and are only read. What costs is compiling:
methods that take long are made, but merges go by sums; `pytest -m long` runs all as it stands.
"""

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cfmerge
from cfmerge.cli import app

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [f"{folder}/{page.stem}" for folder in ("tutorials", "howto") for page in sorted((DOCS / folder).glob("*.md"))]
TRAINING = ["tutorials/flax"]  # run by -m long, and as examples/flax_pipeline.py
DEAR = ["tutorials/adapters", "howto/adapters", "howto/parts"]  # whose merges are planned; run by -m long
HUB = {"Qwen/Qwen2.5-0.5B": 0, "Qwen/Qwen2.5-0.5B-Instruct": 1, "Qwen/Qwen2.5-Coder-0.5B-Instruct": 2}
Q = "model.layers.{}.self_attn.q_proj"


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / f"{page}.md").read_text())


def adapter(path: Path, seed: int) -> None:
    """A LoRA of rank 2 for the queries, as PEFT writes it."""
    from safetensors.numpy import save_file

    draw = np.random.default_rng(seed)
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    path.mkdir()
    save_file(
        {
            f"base_model.model.{Q.format(layer)}.{side}.weight": draw.normal(0, 0.1, shape).astype(np.float32)
            for layer in range(2)
            for side, shape in shapes.items()
        },
        path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def world(tmp_path, monkeypatch, make_model, llama):
    """`base`, `math`, `code`, two adapters, a run of checkpoints, and a hub's cache, in the current directory."""
    for number, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, llama(number))
    for seed, name in enumerate(("lora-math", "lora-code")):
        adapter(tmp_path / name, seed)
    for name, number in HUB.items():
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        make_model(folder / "snapshots" / ("1" * 40), llama(number))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1" * 40)
    constants = pytest.importorskip("huggingface_hub.constants")  # it reads the environment once, for whoever is first
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> None:
    done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


def cheaply(text: str) -> str:
    """The text with sums in place of methods that take long to compile; their expressions are read."""
    scales = itertools.count(11)
    dear = re.match(r"cfmerge (diagnose|report) ", text)
    if dear:
        return f"{dear[0]} --help"

    def other(match: re.Match[str]) -> str:
        label, method = re.fullmatch(r"(\w+=)?(.*)", match[3]).groups("")
        cfmerge.methods.make(method)
        cheap = re.fullmatch(r"average|linear|task_arithmetic.*", method)
        return match[0] if cheap else f"{match[1]}'{label}task_arithmetic(scale=0.{next(scales)})'"

    return re.sub(r"""(-m |^method: )(["']?)((?:(?!\2)[^\n])+?|[^"'\s]+)\2(?=\s|$)""", other, text, flags=re.MULTILINE)


def run_all(page: str, world: Path, change) -> None:
    names: dict[str, object] = {"__name__": page}
    for kind, text in blocks(page):
        first = text.partition("\n")[0]
        if kind == "yaml" and first.startswith("# "):
            (world / first[2:]).write_text(change(text))
        elif kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                assert line.startswith("cfmerge "), f"a block of sh is cfmerge alone; others are bash: {line}"
                run(change(line))
        elif kind == "python":
            exec(compile(text, f"{page}.md", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in [*TRAINING, *DEAR]])
def test_the_blocks_run(page, world):
    run_all(page, world, cheaply)


@pytest.mark.parametrize("page", DEAR)
def test_merges_can_be_planned(page, world):
    for kind, text in blocks(page):
        first = text.partition("\n")[0]
        if kind == "yaml" and first.startswith("# "):
            (world / first[2:]).write_text(text)
        for line in text.replace("\\\n", " ").splitlines() if kind == "sh" else ():
            planned = re.sub(r" -o \S+", "", line.replace("cfmerge merge", "cfmerge plan"))
            run(planned if "--no-calibration" in planned else f"{planned} --no-calibration")


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run_as_they_stand(page, world):
    run_all(page, world, str)


@pytest.mark.parametrize("page", TRAINING)
def test_blocks_that_train_can_be_read(page):
    for kind, text in blocks(page):
        if kind == "python":
            compile(text, page, "exec")
