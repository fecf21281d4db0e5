"""Notes of the methods: each under its own message, with the tensors that it is about."""

import dataclasses
import shlex

import numpy as np
import pytest
import toys

import cfmerge
from cfmerge import methods


def noisy() -> methods.Method:
    """The mean, with two notes that begin with a value."""
    mean = methods.average()

    def solve(statistic):
        return mean.solve(statistic)[0], {"size": statistic.weight, "rank": statistic.weight + 1}

    notes = {
        "size": (lambda value: value > 0, "{value:.0f} is its size"),
        "rank": (lambda value: value > 0, "{value:.0f} is its rank"),
    }
    return dataclasses.replace(mean, name="noisy", solve=solve, notes=notes, statistic=None)


@pytest.fixture(autouse=True)
def own():
    with toys.registered(noisy):
        yield


def test_notes_that_begin_with_a_value_stay_apart(family, tmp_path):
    result = cfmerge.merge(family.base, family.experts, "noisy", output=tmp_path / "out")
    told = [note for note in result.notes if "its" in note]
    assert [note.partition(": ")[2] for note in told] == ["3 is its size", "4 is its rank"]
    assert all(" and 10 more: " in note for note in told)


# --- most layers have outgrown their experts ----------------------------------------------------------------------


def adapted(llama, number: int, shared: bool) -> dict[str, np.ndarray]:
    """The base with an adapter of rank 1 merged into every matrix; its `A` is the same for all experts or its own."""
    tensors = llama()

    def normal(seed, shape):
        return np.random.default_rng(seed).standard_normal(shape)

    matrices = [name for name, weight in tensors.items() if weight.ndim == 2 and "layers" in name]
    for place, name in enumerate(matrices):
        rows, columns = tensors[name].shape
        start = normal([place, 0 if shared else number], (1, columns))
        a = start + 0.2 * normal([place, number, 1], (1, columns))
        b = 0.5 * normal([place, number, 2], (rows, 1))
        tensors[name] = (tensors[name] + b @ a).astype(np.float32)
    return tensors


def test_where_most_layers_outgrow_their_experts_one_warning_says_so_with_a_command(llama, make_model, tmp_path):
    base = make_model(tmp_path / "base")
    experts = [make_model(tmp_path / f"e{n}", adapted(llama, n, shared=True)) for n in range(1, 4)]
    result = cfmerge.merge(base, experts, output=tmp_path / "out")
    (warning,) = result.warnings
    assert result.summary()["warnings"] == [warning]
    out = tmp_path / "out"
    command = f"cfmerge merge {out}/README.md -m 'average >> subspace_boosting' -o {out}-safer"
    assert warning.endswith(command)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("**Warning.**") < card.index("## What was done")
    from typer.testing import CliRunner

    from cfmerge.cli import app

    assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0  # the command holds
    (warning,) = cfmerge.merge(base, experts, output=tmp_path / "one file.safetensors").warnings
    command = shlex.split(warning.splitlines()[-1])
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert (tmp_path / "one file-safer.safetensors").is_file()
    own = [make_model(tmp_path / f"o{n}", adapted(llama, n, shared=False)) for n in range(1, 4)]
    assert cfmerge.merge(base, own, "average", output=tmp_path / "calm").warnings == ()
