"""The study of merging over time at toy size: its parts, a whole run, and a run that goes on where one was stopped."""

import jax
import numpy as np
import pytest
import time_cells
import time_drawn
import time_scores
import time_stream
import time_study
import time_told

from cfmerge import temporal
from cfmerge.demo.data import Split, Task
from cfmerge_accuracy.vision.model import Vit

ORDER, HELD = ("mnist", "upper"), ("clothes",)


def stripes(seed, count, classes):
    """Images whose bright row tells the class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count).astype(np.int32)
    labels[:classes] = np.arange(classes)
    images = generator.integers(0, 100, (count, 28, 28), dtype=np.uint8)
    images[np.arange(count), 7 * labels] = 255
    return Split(images, labels)


def toy(seed, size="medium"):
    tasks = {}
    for number, name in enumerate((*ORDER, *HELD)):
        splits = (stripes([seed, number, part], count, 3) for part, count in enumerate((60, 20, 30)))
        tasks[name] = Task(name, 3, *splits)
    return time_stream.build(seed, Vit(dim=8, depth=1, heads=2), tasks, stripes([seed, 9], 80, 4), ORDER, HELD, 20)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name, value in {"BATCH": 8, "REPLAY": 10, "BUDGETS": (4, 8), "SIZES": {"medium": None}}.items():
        monkeypatch.setattr(time_stream, name, value)
    monkeypatch.setattr(time_stream, "ORDERS", {0: ORDER, 1: ORDER})
    monkeypatch.setattr(time_cells, "WEIGHTS", (0.25, 0.5))
    monkeypatch.setattr(time_cells, "FACTORS", (0.5,))
    monkeypatch.setattr(time_cells, "TECHNIQUES", {key: time_cells.TECHNIQUES[key] for key in ("average", "magmax")})


@pytest.mark.parametrize("how", ["ema(weight=0.3)", "ema(weight=0.3, seed='first')", "ema(technique='magmax')", "all"])
def test_a_rule_carried_on_from_step_to_step_is_the_rule_on_all_experts(how):
    base, *experts = ({"w": np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)} for seed in range(4))
    carried = [*time_study.made(how, base, experts)]
    for count, found in enumerate(carried, 1):
        whole = temporal.combined(how, base, experts[:count])
        np.testing.assert_allclose(found["w"], whole["w"], rtol=1e-6, atol=1e-6)


def test_replay_is_half_of_what_is_drawn_and_comes_from_the_images_that_were_kept(monkeypatch):
    monkeypatch.setattr(time_stream, "BATCH", 64)
    of, drawn = toy(0), []
    fit = time_stream.fit
    monkeypatch.setattr(time_stream, "fit", lambda *given: drawn.append(given[2:4]) or fit(*given))
    time_stream.trained(of, of.base, "upper", 10, before=("mnist",))
    ((images, labels),) = drawn
    replayed = labels < 3  # mnist's classes are the first
    assert replayed.mean() == pytest.approx(time_stream.SHARE, abs=0.08)
    kept = {image.tobytes() for image in of.tasks["mnist"].train.images[: time_stream.REPLAY]}
    assert {image.tobytes() for image in images[replayed]} == kept


def test_the_rate_warms_up_and_falls_to_zero():
    rates = np.array([float(time_stream.at(np.float32(step), np.float32(100))) for step in range(101)])
    assert rates[0] == 0
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(1)
    assert rates[100] == pytest.approx(0, abs=1e-6)


def test_variance_is_shared_out_among_factors_and_what_they_do_together():
    init, technique = np.array([0.0, 3.0, 6.0]), np.array([-1.0, 1.0])
    cells = np.broadcast_to(init[None, :, None, None] + technique, (2, 3, 2, 2))
    found = time_scores.variance(cells)
    assert found["init"] == pytest.approx(100 * 6 / 7)
    assert found["technique"] == pytest.approx(100 * 1 / 7)
    assert sum(found.values()) == pytest.approx(100)
    assert len(found) == 2**4 - 1


@pytest.mark.long
def test_the_study_runs_goes_on_where_it_was_stopped_and_tells_every_table(tmp_path, monkeypatch):
    main, seeds, streams = ("medium", 4), (0, 1), {seed: toy(seed) for seed in (0, 1)}
    file = tmp_path / "time.jsonl"

    def study(minutes):
        runner = time_study.Runner(file, lambda seed, size: streams[seed], minutes)
        return time_study.study(runner, main, 2, seeds), runner

    assert study(0)[0] is None
    assert not file.exists()
    chosen, runner = study(10)
    assert chosen.weight in time_cells.WEIGHTS
    assert chosen.ema == chosen.offline == {"magmax": 0.5}
    told = time_scores.Told(runner.rows, main, 2, seeds, chosen)
    page = time_told.tables(told)
    assert "Not all cells were run" not in page
    assert "| ema | ema |" in page
    time_drawn.write(tmp_path, told)
    assert all((tmp_path / f"time-{name}.png").stat().st_size for name in ("steps", "plane", "techniques", "growth"))

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-3]))
    monkeypatch.setattr(time_stream, "fit", lambda *given: pytest.fail("what was trained is kept"))
    again, later = study(10)
    assert again == chosen
    assert {time_cells.key_of(row) for row in later.rows} == {time_cells.key_of(row) for row in runner.rows}
    assert len(file.read_text().splitlines()) == len(lines)

    last = next(row for row in runner.rows if row["init"] == row["deploy"] == "last" and row["step"] == 2)
    scores = streams[last["seed"]], jax.tree.map(np.asarray, time_study.trained(
        streams[last["seed"]], time_cells.Chain(last["seed"], *main, "last", last["replay"]), 2)[-1])  # fmt: skip
    assert last["scores"] == {name: round(one, 5) for name, one in time_stream.scores(*scores).items()}
