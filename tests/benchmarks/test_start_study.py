"""The study of starts on a made-up zoo, whose accuracy is how near a vector is to a task's own."""

import json
import sys
import types

import numpy as np
import pytest
import start_study

from cfmerge_accuracy.decoder import suite
from cfmerge_accuracy.zoo import Zoo

AIMS = {"one": np.array([1.0, 0.0]), "two": np.array([0.9, 0.1]), "three": np.array([0.0, 1.0])}
DOMAINS = ("one", "three")


def logits(params, task, split):
    """Ten rows; the first so many are right, the more the nearer."""
    near = 10 * float(np.exp(-np.sum((params["w"] - AIMS[task]) ** 2)))
    right = np.arange(10) < near
    return np.stack([right, ~right], axis=1) * 4.0


@pytest.fixture
def made(monkeypatch):
    zoo = Zoo(
        name="decoder-full", seed=0, tasks=tuple(AIMS), base={"w": np.zeros(2, np.float32)}, multitask=None,
        experts={task: {"w": aim.astype(np.float32)} for task, aim in AIMS.items()},
        labels=lambda task, split: np.zeros(10, int), logits=logits, grams=lambda task: {}, perplexity=True,
    )  # fmt: skip
    domains = {task: types.SimpleNamespace(train=task) for task in AIMS}
    made = types.SimpleNamespace(zoo=lambda: zoo, plan=suite.QUICK, domains=domains)
    monkeypatch.setattr(start_study.suite, "build", lambda *_: made)
    monkeypatch.setattr(start_study, "MERGES", ("average",))
    monkeypatch.setattr(start_study, "STARTS", ("base", "best single", "average"))

    def fit(net, recipe, params, seed, task):
        return {"w": params["w"] + (AIMS[task] - params["w"]) * recipe.steps / 100}, None

    monkeypatch.setattr(start_study.train, "fit", fit)
    return made


def test_the_best_single_expert_is_the_nearest_other_one(made):
    assert start_study.best_single(made.zoo(), "one") == "two"


def test_a_merge_has_not_seen_the_expert_that_is_held_out(made):
    found = start_study.started(made.zoo(), "one", "average")
    np.testing.assert_allclose(found["w"], (AIMS["two"] + AIMS["three"]) / 2, atol=1e-6)


def test_a_run_goes_on_where_its_rows_end_and_writes_the_page(made, tmp_path, monkeypatch):
    file = tmp_path / "starts.jsonl"
    start_study.run(file, [0], DOMAINS, 1, suite.QUICK, "")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(list(start_study.cells(DOMAINS, [0]))) == 2 * 3 * 5
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    start_study.run(file, [0], DOMAINS, 1, suite.QUICK, "")
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]
    (tmp_path / "starts.md").write_text("# Mine\n")
    monkeypatch.setattr(sys, "argv", ["start_study.py", "-o", str(tmp_path), "--minutes", "0"])
    start_study.main()
    page = (tmp_path / "starts.md").read_text()
    assert page.startswith("# Mine")
    assert "| best single |" in page
    assert "seeds [0], domains one, three" in page


def test_every_start_is_measured_once_before_training(made):
    found = [cell for cell in start_study.cells(DOMAINS, [0, 1]) if not cell.steps]
    assert len(found) == 2 * 2 * 3
    assert all(cell.decay == 0 for cell in found)
