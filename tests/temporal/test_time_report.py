"""Reports: tables in Markdown, numbers in JSON, a picture in which each score has its cell, written whole."""

import json

import matplotlib.image
import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.formats.staged import StagedFile
from cfmerge.temporal.plots import crowded, picture
from cfmerge.temporal.report import report_of

TASKS, HELD_OUT = ["cars", "birds", "digits"], ["faces"]
ORDER = ["birds", "cars"]
HISTORY = {
    0: {"birds": 0.2, "cars": 0.3, "digits": 0.1, "faces": 0.9},
    1: {"birds": 0.75, "cars": 0.25, "digits": 0.125, "faces": 0.8},
    2: {"birds": 0.5, "cars": 0.875, "faces": 0.64},
}
ABOUT = {"deploy": "ema(weight=0.5)", "technique": "average | x"}


@pytest.fixture
def report():
    return report_of(HISTORY, ORDER, TASKS, HELD_OUT, ABOUT)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_markdown_has_a_row_for_each_step_and_marks_trained_and_unseen_tasks(report):
    lines = report.markdown().splitlines()
    assert "- technique: average \\| x" in lines
    assert "| 0 | (base) | 0.200 | 0.900 | 0.424 | - |" in lines
    assert "| 1 | birds | 0.375 | 0.800 | 0.548 | - |" in lines
    assert "| 2 | cars | - | 0.640 | - | -0.250 |" in lines
    assert "- step 2, knowledge accumulation: no score of 'digits' (1 of 3 adaptation tasks)" in lines
    assert "Geometric mean after step 1 (`birds`): **0.548**. The base has 0.424." in lines
    assert lines[lines.index("| task | 0 base | 1 birds | 2 cars |") + 2 :] == [
        "| birds | *0.200* | **0.750** | 0.500 |",
        "| cars | *0.300* | *0.250* | **0.875** |",
        "| digits | *0.100* | *0.125* | - |",
        "| faces (held out) | 0.900 | 0.800 | 0.640 |",
    ]


def test_a_step_without_scores_is_told_once():
    report = report_of({0: HISTORY[0], 2: HISTORY[2]}, ORDER, TASKS, HELD_OUT)
    assert report.markdown().count("step 1 has no scores") == 1


def test_json_has_all_numbers_and_the_reasons_for_those_that_are_missing(report):
    content = json.loads(report.to_json())
    assert content["scores"]["1"] == HISTORY[1]
    assert content["rows"][2]["knowledge_accumulation"] is None
    assert "'digits'" in content["rows"][2]["undefined"]["knowledge_accumulation"]
    assert content["rows"][1]["geometric_mean"] == pytest.approx((0.375 * 0.8) ** 0.5)
    assert content["trained"] == {"birds": ["birds"], "cars": ["cars"]}
    assert (content["tasks"], content["held_out"], content["order"]) == (TASKS, HELD_OUT, ORDER)


def test_percentages_have_two_digits(report):
    assert report_of({0: {"birds": 81.256, "cars": 3.5, "digits": 100}}, [], TASKS, []).shown(81.256) == "81.26"
    assert report.shown(0.81256) == "0.813"


def test_the_picture_has_a_cell_for_each_score_and_a_curve_for_each_metric(report):
    curves, matrix, bar = picture(report).axes
    assert sorted(texts(curves)) == [
        " geometric mean 0.548",
        " knowledge accumulation 0.375",
        " zero-shot retention 0.640",
    ]
    assert [np.isfinite(line.get_ydata()).tolist() for line in curves.lines] == [
        [True, True, False],  # geometric mean
        [True, True, False],
        [True, True, True],
    ]
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["birds", "cars", "digits", "faces"]
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["base", "birds", "cars"]
    cells = [text for text in texts(matrix) if text not in ("adaptation", "held out")]
    assert cells == ["0.20", "0.75", "0.50", "0.30", "0.25", "0.88", "0.10", "0.12", "-", "0.90", "0.80", "0.64"]
    hatched = [patch for patch in matrix.patches if patch.get_hatch()]
    assert [(p.get_x(), p.get_y(), p.get_width()) for p in hatched] == [
        (-0.5, -0.5, 1), (-0.5, 0.5, 2), (-0.5, 1.5, 2), (1.5, 1.5, 1),
    ]  # fmt: skip
    outlined = {(round(p.get_x() + 0.45), round(p.get_y() + 0.45)) for p in matrix.patches if not p.get_hatch()}
    assert outlined == {(1, 0), (2, 1)}
    assert bar.get_title(loc="left") == "score"


def test_numbers_in_cells_stand_out_from_their_colours(report):
    _, matrix, _ = picture(report).axes
    for text in matrix.texts:
        if text.get_text() not in ("adaptation", "held out"):
            [stroke] = text.get_path_effects()
            fill = np.array(stroke._gc["foreground"][:3])
            ink = 1.0 if text.get_color() == "white" else 0.0
            luminance = np.where(fill <= 0.04045, fill / 12.92, ((fill + 0.055) / 1.055) ** 2.4) @ [
                0.2126,
                0.7152,
                0.0722,
            ]
            lighter, darker = max(ink, luminance), min(ink, luminance)
            assert (lighter + 0.05) / (darker + 0.05) > 4


def test_ends_of_curves_that_meet_are_named_apart():
    history = {0: {"birds": 0.5, "faces": 0.5}, 1: {"birds": 0.52, "faces": 0.519}}
    curves = picture(report_of(history, ["birds"], ["birds"], ["faces"])).axes[0]
    places = sorted(text.get_position()[1] for text in curves.texts)
    low, high = curves.get_ylim()
    assert np.all(np.diff(places) > 0.1 * (high - low))


def test_tasks_that_many_steps_train_are_marked_by_corners():
    order = [f"task-{number}" for number in range(6)]
    history = {step: {"birds": 50.0 + step} for step in range(7)}
    report = report_of(history, order, ["birds", "cars"], [], trained={name: ["birds"] for name in order})
    assert crowded(report)
    _, matrix, _ = picture(report).axes
    marks = [patch for patch in matrix.patches if not patch.get_hatch()]
    assert len(marks) == 6
    assert all(len(mark.get_xy()) == 4 for mark in marks)  # triangles, closed


def test_more_than_a_hundred_steps_have_a_picture_of_bounded_size():
    tasks = [f"task-{number}" for number in range(120)]
    history = {step: dict.fromkeys(tasks, step / 120) for step in range(0, 121, 10)}
    figure = picture(report_of(history, tasks, tasks, []))
    assert max(figure.get_size_inches()) < 45
    curves, matrix, _ = figure.axes
    assert texts(matrix) == ["adaptation"]  # numbers would not be readable
    for axis in (matrix.get_xticklabels(), matrix.get_yticklabels(), curves.get_xticklabels()):
        assert 20 < len(axis) < 250


def test_a_report_without_any_task_is_written_too(tmp_path):
    report_of({}, [], [], []).save(tmp_path / "report")
    assert (tmp_path / "report" / "scores.png").is_file()


def test_a_report_without_scores_is_written_too(tmp_path):
    report = report_of({}, ["birds"], TASKS, HELD_OUT)
    assert "No step has a geometric mean yet." in report.markdown()
    curves, _ = picture(report).axes
    assert texts(curves) == ["no step has all scores"]
    report.save(tmp_path / "report")
    assert len(list((tmp_path / "report").iterdir())) == 3


def test_files_are_written_whole_and_replaced(report, tmp_path, monkeypatch):
    place = report.save(tmp_path / "deep" / "report")
    assert sorted(path.name for path in place.iterdir()) == ["report.json", "report.md", "scores.png"]
    image = matplotlib.image.imread(place / "scores.png")
    assert image.shape[0] > 600
    assert image.shape[1] > 600
    assert image.std() > 0.05
    before = (place / "report.md").read_text()

    def stopped(self):
        raise KeyboardInterrupt

    other = report_of({0: {"birds": 1}}, [], ["birds"], [])
    with monkeypatch.context() as patched:
        patched.setattr(StagedFile, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            other.save(place)
    assert (place / "report.md").read_text() == before
    assert sorted(path.name for path in place.iterdir()) == ["report.json", "report.md", "scores.png"]
    other.save(place)
    assert (place / "report.md").read_text() == other.markdown()


def test_a_report_does_not_replace_a_file(report, tmp_path):
    (tmp_path / "report").write_text("mine")
    with pytest.raises(CfmergeError, match="is a file; name a directory"):
        report.save(tmp_path / "report")


def test_a_place_that_cannot_be_written_is_told_by_the_report(report):
    with pytest.raises(CfmergeError, match="report /proc/none: cannot be written"):
        report.save("/proc/none")
