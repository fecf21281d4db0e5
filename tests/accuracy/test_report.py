"""From a folder of numbers to tables and plots: what is computed, what is marked, and what may be missing."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cfmerge.errors import CfmergeError
from cfmerge_accuracy import plots, report, results

TASKS = ["digits", "letters", "animals"]
EXPERTS = {"digits": 0.9, "letters": 0.8, "animals": 0.5}
LEVELS = {"ace": 0.9, "regmean": 0.95, "task_arithmetic": 0.7, "average": 0.6, "iso_c": 0.9}


def entry(name: str, level: float, rng: np.random.Generator) -> dict:
    share = {task: level + rng.normal(0, 0.01) for task in TASKS}
    published = {task: EXPERTS[task] * share[task] for task in TASKS}
    return {
        "name": name, "method": name, "group": "family", "data": "grams" if name == "regmean" else "none",
        "published": published, "factor": 1.5, "scaled": {task: value * 1.02 for task, value in published.items()},
        "validation": {"0.5": level - 0.1, "1": level, "1.5": level + 0.02}, "seconds": 1.0,
        "excess": 1 - level, "failed": None, "notes": [],
    }  # fmt: skip


def row(zoo: str, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    methods = [entry(name, level, rng) for name, level in LEVELS.items()]
    base = dict.fromkeys(TASKS, 0.1)
    return {
        "zoo": zoo, "seed": seed, "quick": False, "tasks": TASKS, "facts": {"steps": 100, "chance": base},
        "environment": {"cfmerge": "1.2", "machine": "a machine", "command": "cfmerge bench accuracy --seeds 2"},
        "references": {"experts": EXPERTS, "base": base, "multitask": EXPERTS, "ensemble": base}, "methods": methods,
        "counts": [{"name": "ace", "count": n, "tasks": TASKS[:n], "normalised": 1.0 - n / 50} for n in (2, 3)],
        "covariances": [{"estimator": "D^T D", "cosine": 0.5, "angle": 30.0}],
        "peers": [
            {"name": "ace", "peer": "theirs 1", "difference": 1e-5 * (seed + 1), "accuracy_ours": 0.7,
             "accuracy_theirs": 0.7, "agrees": seed == 0, "note": f"of seed {seed}"},
        ],
        "peers_failed": [{"name": "wudi", "peer": "theirs 2", "failed": "stopped after 9 s"}],
    }  # fmt: skip


def save(folder: Path, *rows: dict) -> Path:
    (folder / "rows").mkdir(exist_ok=True)
    for each in rows:
        (folder / "rows" / f"{each['zoo']}-{each['seed']}.json").write_text(json.dumps(each))
    return folder


def cells(text: str, heading: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`, in the section under `heading`."""
    section = text.split(f"### {heading}\n")[1].split("\n### ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


PUBLISHED, SCALED = report.SETTINGS.values()


@pytest.fixture
def folder(tmp_path):
    linear = {
        "regimes": {"gd": {"oracle": {"mean": 0.3, "deviation": 0.01}, "mean": {"mean": 0.6, "deviation": 0.02}}},
        "covariances": {"gd": {"p = 1": {"cosine": 0.9}}},
    }
    save(tmp_path, row("vision", 0), row("vision", 1), row("text-full", 0), row("text-lora-8", 0) | {"methods": []})
    (tmp_path / "rows" / "linear.json").write_text(json.dumps(linear))
    return tmp_path


def test_everything_is_written(folder):
    written = {path.name for path in report.write(folder)}
    assert written >= {"results.json", "vision.md", "text.md", "linear.md", "vision-tasks.png", "text-full-scale.png"}
    assert "report.html" in written
    for path in folder.glob("*.png"):
        assert Image.open(path).width == 1200
        assert path.stat().st_size < 200_000
    text = (folder / "text.md").read_text()
    assert "## text-full" in text
    assert "## text-lora-8" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text + (folder / "vision.md").read_text()):
        assert (folder / name).exists()
    assert "`cfmerge bench accuracy --seeds 2` with cfmerge 1.2 on a machine" in text
    text = (folder / "linear.md").read_text()
    assert "| oracle | 0.30 ± 0.01 |" in text
    assert "| mean | **0.60** ± 0.02 |" in text


def test_the_same_rows_make_the_same_files(tmp_path):
    report.write(save(tmp_path, row("vision", 0)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    report.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_two_settings_stay_apart(folder):
    report.write(folder, pictures=False)
    text = (folder / "vision.md").read_text()
    published, scaled = cells(text, PUBLISHED, "ace"), cells(text, SCALED, "ace")
    assert published[:3] == scaled[:3] == ["ace", "family", "none"]
    assert scaled[3] == "1.5 / 1.5"
    found = json.loads((folder / "results.json").read_text())["zoos"]["vision"]
    ours = next(line for line in found["published"] if line["name"] == "ace")
    ratios = [
        each["published"][task] / EXPERTS[task]
        for made in found["rows"]
        for each in made["methods"][:1]
        for task in TASKS
    ]
    assert ours["normalised"]["mean"] == pytest.approx(100 * np.mean(ratios), rel=1e-4)
    assert published[4].startswith(f"{ours['normalised']['mean']:.1f} [")
    assert next(line["name"] for line in found["published"]) == "regmean"
    assert found["published"][0]["factors"] == []


def test_differences_are_to_the_best_without_data_and_marked(folder):
    report.write(folder, pictures=False)
    section = (folder / "vision.md").read_text().split("Paired differences")[1].split("</details>")[0]
    top = re.search(r"minus (\S+) \| minus task_arithmetic", section)[1]
    assert top in ("ace", "iso_c")  # regmean has data
    lines = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("| ")}
    other = {"ace": "iso_c", "iso_c": "ace"}[top]
    assert "n.s." in lines[other].split("|")[2]
    assert "n.s." not in lines["average"]
    assert lines["average"].split("|")[2].strip().startswith("-")


def test_methods_that_failed_and_warned_are_listed(tmp_path):
    first, second = row("vision", 0), row("vision", 1)
    second["methods"][0] |= {"published": None, "scaled": None, "excess": None, "failed": "not | positive\ndefinite"}
    first["methods"][1]["notes"] = [f"tensor {index}" for index in range(9)]
    for each in (first, second):
        each["methods"].append({"name": "slerp", "method": "slerp", "failed": "takes two", "published": None})
    report.write(save(tmp_path, first, second))
    text = (tmp_path / "vision.md").read_text()
    assert "ace (1 of 2 seeds)" in text
    assert "**ace** failed on seed 1: not | positive definite" in text
    assert "**slerp** failed: takes two" in text
    assert "regmean: tensor 2" in text
    assert "regmean: tensor 3" not in text
    assert "6 more warnings" in text


def test_little_is_enough(tmp_path):
    """One seed, one method, one task, and none of what may be missing."""
    bare = {
        "zoo": "vision", "seed": 3, "tasks": ["digits"], "references": {"experts": {"digits": 0.9}},
        "methods": [{"name": "ace", "published": {"digits": 0.8}, "scaled": None, "failed": None}],
    }  # fmt: skip
    report.write(save(tmp_path, bare))
    text = (tmp_path / "vision.md").read_text()
    assert cells(text, PUBLISHED, "ace")[4] == "88.9"
    assert SCALED not in text
    assert "one seed cannot say" in text
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    bare["methods"] = []
    report.write(save(tmp_path, bare))


def test_results_that_cannot_be_put_together(tmp_path):
    with pytest.raises(CfmergeError, match="no results in"):
        report.write(tmp_path)
    save(tmp_path, row("vision", 0), row("vision", 1) | {"quick": True})
    with pytest.raises(CfmergeError, match="quick and full runs"):
        report.write(tmp_path)
    (tmp_path / "rows" / "vision-1.json").write_text('{"zoo": "vis')
    with pytest.raises(CfmergeError, match=r"vision-1\.json is not complete"):
        results.read(tmp_path)
    (tmp_path / "rows" / "vision-1.json").write_text('{"zoo": "vision", "seed": 1}')
    with pytest.raises(CfmergeError, match=r"vision-1\.json lacks 'tasks'"):
        results.read(tmp_path)


def test_the_terminal_shows_the_best(folder):
    console = Console(file=io.StringIO(), width=120)
    report.summary(folder, console)
    shown = console.file.getvalue()
    assert shown.index("regmean") < shown.index("ace") < shown.index("average")
    assert "(base)" in shown
    assert re.search(r"ace +│ none +│ +\d+\.\d \[", shown)


def test_labels_are_moved_apart_and_not_further():
    places = plots._apart([1.0, 1.0, 1.0, 9.0], 0.5)
    np.testing.assert_allclose(places, [0.5, 1.0, 1.5, 9.0])
    assert plots._apart([3.0, 1.0], 0.5) == [3.0, 1.0]
    rng = np.random.default_rng(0)
    values = list(rng.normal(size=20))
    found = np.array(plots._apart(values, 0.3))
    assert np.all(np.diff(found[np.argsort(values)]) > 0.3 - 1e-9)


def test_peers_that_disagree_or_failed_are_told(folder):
    report.write(folder)
    text = (folder / "vision.md").read_text()
    section = text.split("The same methods in other packages")[1]
    assert "**no** | of seed 0; of seed 1" in section
    assert "- wudi by theirs 2: stopped after 9 s" in section


def test_the_overview_counts_zoos_that_have_all_methods(folder):
    report.write(folder)
    text = (folder / "overview.md").read_text()
    assert "mean of text-full, vision |" in text  # text-lora-8 has no methods here
    line = next(line for line in text.splitlines() if line.startswith("| ace |"))
    mean, *each = [float(cell) for cell in line.strip("|").split("|")[1:] if cell.strip()]
    assert mean == pytest.approx(np.mean(each), abs=0.1)


def test_the_page_has_all_zoos(folder):
    """Tables, intervals and curves of every zoo; rows without an interval have a dot alone."""
    from cfmerge.report.page.blocks import Fold, Interval, Items, Prose, Table
    from cfmerge.report.page.rendering import html
    from cfmerge_accuracy import page

    zoos, linear = results.read(folder)
    text = html(page.page(zoos, linear, "Made by `cfmerge bench accuracy`."))
    for name in ("Overview", "vision", "text-full", "text-lora-8", "Linear testbed"):
        assert f">{name}</h2>" in text
    assert text.count("By scale of the merged delta</h3>") == 2
    assert "`cfmerge bench" not in text
    section = page.page([zoos[-1]], None, "").sections[1]
    table = section.sections[0].blocks[0]
    best, shown = zoos[-1].lines("published")[0], table.rows[0]
    assert shown[0] == best.name
    assert isinstance(shown[1], Interval)
    assert shown[1].low <= shown[1].at <= shown[1].high
    written = "Text.\n\n| a | b |\n| --- | --: |\n| x \\| y | 1 |\n\n- one\n- two\n\n"
    written += "<details><summary>T</summary>\n\nInner\n</details>\n"
    assert page.blocks_of(written) == [
        Prose("Text."), Table("", ["a", "b"], [["x | y", "1"]]), Items(["one", "two"]), Fold("T", [Prose("Inner")]),
    ]  # fmt: skip
