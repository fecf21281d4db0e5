"""The benchmarks that a user can run: each ends, and writes what it says it writes. No time is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import composed_told
import composed_zoos
import measuring
import numpy as np
import pytest
import subspaces
import tangents
import trajectory_told
import zoo_models
from inference import systems
from make_llama import SIZES, shapes, write_models
from scaling import QUICK

BENCHMARKS = Path(measuring.__file__).parent


def script(name, *words, output):
    """Runs a script and gives what it has written: JSON, Markdown, and what it printed."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, words), "-o", str(output)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS / "accuracy")])}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / f"{name}.json").read_text()), (output / f"{name}.md").read_text(), done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), SIZES["tiny"], 2)


@pytest.mark.long
def test_accelerator_tells_peaks_rates_shares_memory_errors_and_merges(models, tmp_path):
    words = ("--quick", "--shapes", "96x64", "--models", models, "--methods", "ace", "--experts", 2)
    words += ("--operations", "Gram by one product", "Gram", "average")
    told, text, _ = script("accelerator", *words, output=tmp_path)
    assert {(row["dtype"], row["precision"]) for row in told["peaks"]} >= {
        ("bfloat16", "default"), ("float32", "default"), ("float32", "highest"), ("float64", "highest"),
    }  # fmt: skip
    assert all(row["peak"] > 0 for row in told["peaks"])
    assert told["bandwidth"]["memory"] > 0
    rows = {(row["operation"], row["dtype"], row["precision"]): row for row in told["operations"]}
    gram = rows["Gram", "float32", "highest"]
    assert gram["shape"] == "96 x 64"
    assert gram["operations"] == 96 * 64 * 65
    assert gram["bytes"] == 4 * (96 * 64 + 64 * 64)
    assert gram["of the roof"] >= gram["of the peak"] > 0
    assert gram["memory, MiB"] * 2**20 >= gram["bytes"]
    assert gram["error"] < 1e-5
    assert rows["Gram by one product", "float32", "highest"]["error"] < 1e-5
    assert rows["average", "bfloat16", "highest"]["of the roof"] > 0
    assert not any("failed" in row for row in told["operations"])
    (merge,) = told["merges"]
    assert merge["method"] == "ace"
    assert merge["wall, again, s"] > 0
    assert merge["of the peak"] > 0
    assert "| Gram | 96 x 64 | float32 | highest |" in text
    assert "python benchmarks/accelerator.py --quick" in text


def test_scaling_tells_every_point_and_what_it_left_out(models, tmp_path):
    words = ("--quick", "--cold", "--over", "experts", "devices", "processes", "--models", models)
    told, text, printed = script("scaling", *words, output=tmp_path)
    rows = {(row["over"], row["value"]): row for row in told["rows"]}
    assert list(rows) == [(axis, value) for axis in ("experts", "devices", "processes") for value in QUICK[axis]]
    for place in (("experts", 2), ("devices", 1), ("devices", 2), ("processes", 1)):
        assert rows[place]["wall, s"] > 0
        assert rows[place]["memory, GiB"] > 0.01
    assert rows["experts", 3]["left out"] == f"{models} has fewer than 3 experts"
    two = rows["processes", 2]
    assert ("wall, s" in two) != (two.get("left out") == "this cfmerge has no --processes")
    assert told["exponents"][0]["over"] == "devices"
    assert "| average | experts | 2 |" in text
    assert "3 left out" in printed


def stand_in(file, text):
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_peers_runs_both_sides_in_turn_and_tells_ratios_and_failures(models, tmp_path):
    asked = tmp_path / "asked"
    mergekit = stand_in(tmp_path / "mergekit-yaml", f'test ! -e "$2" && mkdir "$2" && cp "$1" {asked}')
    failing = stand_in(tmp_path / "python", "echo no model of that name >&2; exit 3")
    words = (models, "--quick", "--cold", "--experts", 2, "--peers", "mergekit", "fusion_bench", "ace")
    words += ("--mergekit", mergekit, "--fusion-bench", failing, "--environments", failing)
    told, text, _ = script("peers", *words, output=tmp_path / "out")
    beside = {case["peer"]: case for case in told["cases"]}
    (one,) = beside["mergekit"]["rounds"]
    assert beside["mergekit"]["theirs"] == "linear"
    for side in ("ours", "theirs"):
        assert one[side]["wall"] > 0
        assert set(one[side]) == {"wall", "user", "cpu", "memory"}
    config = json.loads(asked.read_text())
    assert config["merge_method"] == "linear"
    assert [model["model"] for model in config["models"]] == [str(models / f"expert_{n}") for n in range(2)]
    assert "no model of that name" in beside["fusion_bench"]["failed"]
    assert "ace" in told["left_out"]
    assert "| `average` | mergekit linear |" in text
    assert "Left out: ace" in text


def test_inference_tells_time_and_memory_of_every_system(tmp_path):
    words = ("--components", 2, "--rounds", 1, "--repeats", 1, "--batch", 3, "--dim", 16, "--depth", 0)
    told, text, _ = script("inference", *words, output=tmp_path)
    rows = {row["system"]: row for row in told["rows"]}
    assert rows.keys() == systems().keys()
    one = rows["one model"]
    assert (one["forward passes"], rows["ensemble"]["ensemble / system"]) == (1, 1)
    held = {name: round(row["held, MiB"] / one["held, MiB"]) for name, row in rows.items()}
    assert (held["ensemble"], held["TMC, by request"], held["TMC, summed"]) == (2, 3, 2)
    assert "| 2 | TMC, by request |" in text


def test_a_study_that_was_stopped_goes_on_and_its_rows_are_a_table(tmp_path, monkeypatch, capsys):
    def study(zoo, stream):
        told = {"seed": zoo, "stream": stream, "accuracy": 0.5 + 0.1 * zoo}
        extra = {"forgetting": 0.25, "bitwise": True} if stream == "task" else {}
        return [{**told, "method": "base"}, {**told, "method": "TMC, mean", **extra}]

    asked = []
    monkeypatch.setattr(tangents, "study", lambda zoo, stream: asked.append((zoo, stream)) or study(zoo, stream))
    monkeypatch.setattr(tangents, "zoo", lambda seed, steps: seed)
    rows = tmp_path / "rows.jsonl"
    for words in (["--seeds", "0", "--streams", "task"], ["--seeds", "0", "1", "--streams", "task", "class: digits"]):
        monkeypatch.setattr(sys, "argv", ["tangents.py", str(rows), *words])
        tangents.main()
    assert asked == [(0, "task"), (0, "class: digits"), (1, "task"), (1, "class: digits")]
    printed = capsys.readouterr().out
    assert "| TMC, mean | 55 | 55 |" in printed
    assert "| TMC, mean | forgetting | 25 |" in printed
    assert "seeds [0, 1]; removed is bit for bit never seen: True" in printed


def test_outputs_in_chunks_are_those_of_all_images_at_once():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2)
    found = tangents.in_chunks(lambda chunk: chunk.sum(axis=(1, 2)), images, size=3)
    np.testing.assert_array_equal(found, images.sum(axis=(1, 2)))


@pytest.fixture
def in_this_process(tmp_path_factory, monkeypatch):
    """Runs the main of a script of zoos, with a cache of its own; gives the rows and the page that it has written."""
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))

    def run(module, output, *words):
        monkeypatch.setattr(module, "keep_compiled", lambda: None)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "-o", str(output), *words])
        module.main()
        name = module.__name__.removesuffix("_zoos")
        return zoo_models.kept(output / f"{name}.jsonl"), (output / f"{name}.md").read_text()

    return run


@pytest.mark.long
def test_composed_zoos_tells_size_and_accuracy_and_goes_on_where_it_was_stopped(tmp_path, in_this_process, monkeypatch):
    rows, page = in_this_process(composed_zoos, tmp_path, "--quick")
    by = {(row["kind"], row["system"]): row for row in rows}
    assert [*by] == composed_zoos.of_zoo("bars")
    size = {system: row["size"] for (_, system), row in by.items()}
    assert (size["base"], size["average"], size["experts"]) == (1, 1, 3)
    assert size["smile(rank=None, gate=4)"] > size["experts"] > size["tall, chosen"] > 2
    assert pytest.approx(size["tall, chosen"], abs=0.01) == 2 + 3 / 32
    experts, base = (by["reference", name]["accuracies"] for name in ("experts", "base"))
    dense = by["told", "smile(rank=None, gate=4)"]["accuracies"]
    assert all(experts[task] >= dense[task] - 0.05 for task in experts)
    assert np.mean([*dense.values()]) >= np.mean([*base.values()])
    sent = by["smile", "smile(rank=2, gate=4)"][composed_told.SENT]
    assert len(sent) == 6  # the patches' embedding is no linear layer
    assert all(0 < share < 1 for share in sent.values())
    assert "| tall, chosen | 2.09 |" in page
    assert (tmp_path / "composed-bars.png").read_bytes().startswith(b"\x89PNG")

    file = tmp_path / "composed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["system"] != "average"))
    (tmp_path / "composed.md").write_text(page.replace(zoo_models.START, f"Words.\n\n{zoo_models.START}"))
    asked, study = [], composed_zoos.study
    monkeypatch.setattr(composed_zoos, "study", lambda *given: asked.append(given[1].text) or study(*given))
    again, page = in_this_process(composed_zoos, tmp_path, "--quick")
    assert asked == ["average"]
    assert again[-1] == by["merge", "average"]
    assert "Words." in page
    assert page.count("| average | 1 |") == 1


def test_subspaces_tells_accuracy_energy_and_overlap(tmp_path, in_this_process):
    (row,), page = in_this_process(subspaces, tmp_path, "--quick")
    accuracies = row["accuracies"]
    assert [*accuracies] == [*subspaces.PROJECTIONS, "base"]
    for layer in row["layers"].values():
        assert layer["energy"]["I"] + layer["energy"]["but I"] == pytest.approx(1)
        assert layer["energy"]["II"] <= layer["energy"]["II + III"] <= layer["energy"]["but I"]
        assert 0 < layer["k"] < layer["rank"] <= min(layer["shape"])
        if min(layer["shape"]) == max(layer["shape"]):
            assert layer["overlap"][str(max(layer["shape"]))] == pytest.approx(1)
    assert "| II + III |" in page
    assert (tmp_path / "subspaces.png").read_bytes().startswith(b"\x89PNG")


def test_projections_are_those_on_the_singular_vectors_of_the_base():
    generator = np.random.default_rng(0)
    weight, delta = generator.standard_normal((2, 4, 6))
    own = subspaces.columns(weight)
    u, s, vt = np.linalg.svd(weight)
    assert own.k == next(k for k in range(1, 5) if s[:k].sum() >= s.sum() / 2)
    core = u.T @ delta @ vt.T
    for how, outputs, inputs in (("I", slice(own.k), slice(own.k)), ("II", slice(own.k, 4), slice(own.k, 4)),
                                 ("II + III", slice(own.k, 4), slice(own.k, 6))):  # fmt: skip
        kept = np.zeros_like(core)
        kept[outputs, inputs] = core[outputs, inputs]
        np.testing.assert_allclose(subspaces.projected(own, delta, how), u @ kept @ vt, atol=1e-12)
        assert subspaces.chance(own, how) == np.count_nonzero(kept) / kept.size
    found = subspaces.overlap(vt.T[:, :3], vt.T[:, [1, 0, 3]])
    np.testing.assert_allclose(found, [0, 1, 2 / 3], atol=1e-12)


def test_models_have_the_parameters_that_their_names_say():
    count = {name: sum(math.prod(shape) for shape in shapes(size).values()) for name, size in SIZES.items()}
    assert count["374M"] == pytest.approx(374e6, rel=0.02)
    assert count["15M"] == pytest.approx(15e6, rel=0.05)
    assert count["1.1B"] == pytest.approx(1.1e9, rel=0.02)


def test_a_process_is_measured_with_its_memory():
    held = "import time; held = bytearray(b'x' * (1 << 27)); time.sleep(0.2)"
    figures = measuring.run([sys.executable, "-c", held])
    assert figures.memory is None or figures.memory > 0.12
    assert figures.cpu >= figures.user > 0


def test_where_one_process_fails_the_others_are_ended_and_its_words_are_told(tmp_path):
    number = tmp_path / "number"
    waits = (
        "import os, pathlib, sys, time; found = pathlib.Path(sys.argv[1] + '.partial'); "
        "found.write_text(str(os.getpid())); found.rename(sys.argv[1]); time.sleep(600)"
    )
    fails = "import pathlib, sys\nwhile not pathlib.Path(sys.argv[1]).exists(): pass\nsys.exit('lost')"
    commands = [[sys.executable, "-c", words, str(number)] for words in (waits, fails)]
    with pytest.raises(measuring.ProcessError, match=r"ended with 1\nlost"):
        measuring.run_together(commands)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_table_has_all_columns_and_numbers_to_the_right():
    rows = [{"a": "x"}, {"a": "y", "b": 1234.5, "c": None}]
    assert measuring.table(rows) == "| a | b | c |\n| --- | --: | --: |\n| x |  |  |\n| y | 1,234 |  |\n"


def test_a_study_of_merged_runs_is_told_from_its_rows(tmp_path):
    """Tables behind the mark, what is written by hand in front of it, and a picture."""
    judged = {"test_accuracy": 0.9, "validation_accuracy": 0.9, "validation_loss": 0.2}
    rows = []
    for seed in (0, 1):
        common = {"seed": seed, "rate": 0.01, **judged}
        rows.append({**common, "kind": "last", "test_loss": 0.5})
        rows.append({**common, "kind": "decayed", "window": 4000, "shape": "cosine", "test_loss": 0.4})
        for shape in ("linear", "inverse-sqrt"):
            rows.append({**common, "kind": "decayed", "window": 200, "shape": shape, "test_loss": 0.3 + seed / 10})
            for count in (2, 6):
                own = {"kind": "merged", "window": 200, "count": count, "shape": shape}
                rows.append({**common, **own, "test_loss": 0.2 + 0.1 * (count == 2) + seed / 10})
        method = {"kind": "merged", "window": 200, "count": 6, "shape": "", "method": "ties"}
        rows.append({**common, **method, "test_loss": 0.6})
    (tmp_path / "trajectory.md").write_text("# By hand\n\n<!-- tables -->\n\nold")
    trajectory_told.write(tmp_path, rows)
    text = (tmp_path / "trajectory.md").read_text()
    assert text.startswith("# By hand\n\n<!-- tables -->\n\n## Rate 0.01, seeds 0, 1")
    assert "old" not in text
    assert "| linear | 200 | -0.1000 | -0.1000, -0.1000 |" in text
    assert "| 200 | 0.350 | 0.250 |" in text
    assert "by 0.100 with the number where the window is held" in text
    assert (tmp_path / "trajectory.png").read_bytes().startswith(b"\x89PNG")
