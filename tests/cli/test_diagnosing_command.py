"""`cfmerge diagnose`, in one process: what people and scripts see."""

import json
import shlex

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cfmerge.cli import app, diagnosing, messages
from cfmerge.cli.diagnosing import groups
from cfmerge.diagnosis import Measured
from cfmerge.errors import CfmergeError


def run(*arguments):
    done = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_tables_findings_and_a_command_that_can_be_pasted(tmp_path, make_model, llama, monkeypatch):
    tensors = [{name: one for name, one in llama(number).items() if "mlp" not in name} for number in range(4)]
    base, *experts = [make_model(tmp_path / "in" / f"m{number}", own) for number, own in enumerate(tensors)]

    def narrow():
        return Console(width=80, force_terminal=True, no_color=True, emoji=False, highlight=False)

    for module in (diagnosing, messages):
        monkeypatch.setattr(module, "out", narrow)
    printed = run(base, *experts, experts[0])
    lines = [line.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "") for line in printed.splitlines()]
    assert all(len(line) <= 80 for line in lines if not line.startswith(("cfmerge merge", "base ")))
    text = "\n".join(lines)
    assert "…" not in text
    for word in ("expert", "length", "matrix", "signs", "growth", "grave: experts 'm1' and 'in-m1' are the same"):
        assert word in text
    command = shlex.split(lines[-1])
    assert command[:2] == ["cfmerge", "merge"]
    assert command.count("-e") == 3
    assert command[-4] == "-m"


def test_json_with_the_command(family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": str(family.base), "experts": list(map(str, family.experts))}))
    told = json.loads(run(recipe, "--json", "--largest", "0"))
    assert told["experts"] == ["m1", "m2", "m3"]
    assert told["recommendation"]["method"] == "auto"
    assert told["command"] == f"cfmerge merge {recipe} -m auto -o OUT"
    assert json.loads(run("--base", family.base, *(word for e in family.experts for word in ("-e", e)),
                          "--json", "--largest", "0"))["tensors"] == told["tensors"]  # fmt: skip


def test_options_that_the_command_needs_too_are_named(family):
    experts = [word for path in family.experts for word in ("-e", path)]
    told = run("--base", family.base, *experts, "--on-nonfinite", "skip-expert", "--largest", "0")
    assert told.rstrip().endswith("and the options as here: --on-nonfinite")


def test_models_are_named_once(family):
    with pytest.raises(CfmergeError, match="named twice"):
        run(family.base, family.experts[0], "--base", family.base)


def measured(kind, layer):
    one = np.zeros(1)
    return Measured(kind, (2,), layer, 1.0, one, one, one[None], one[None])


def test_many_layers_are_told_as_a_few_groups():
    tensors = {f"{kind}.{n}": measured(kind, n) for n in range(10) for kind in ("matrix", "vector")}
    told = [(kind, layers, len(group)) for kind, layers, group in groups(tensors | {"x": measured("embedding", None)})]
    assert told[:4] == [("matrix", "0-2", 3), ("matrix", "3-5", 3), ("matrix", "6-7", 2), ("matrix", "8-9", 2)]
    assert told[-1] == ("embedding", "-", 1)
