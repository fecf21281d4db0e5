"""Metrics by step: means over all tasks, untrained ones too; a missing score leaves a number undefined."""

import math

import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.temporal.metrics import (
    backward_transfer,
    checked,
    geometric_mean,
    knowledge_accumulation,
    table,
    zero_shot_retention,
)

TASKS, HELD_OUT = ["birds", "cars", "digits"], ["faces", "flags"]
HISTORY = {
    0: {"birds": 0.2, "cars": 0.3, "digits": 0.1, "faces": 0.8, "flags": 0.6},
    1: {"birds": 0.7, "cars": 0.4, "digits": 0.1, "faces": 0.7, "flags": 0.6},
    2: {"birds": 0.6, "cars": 0.9, "digits": 0.3, "faces": 0.5, "flags": 0.3},
    3: {"birds": 0.5, "cars": 0.8, "digits": 0.8, "faces": 0.4, "flags": 0.5},
}


def test_the_published_numbers_of_the_base_give_the_published_geometric_mean():
    assert round(geometric_mean(38.47, 67.93), 1) == 51.1


def test_accumulation_is_over_tasks_that_no_step_has_trained_yet_too():
    rows = table(HISTORY, TASKS, HELD_OUT, TASKS)
    for row in rows:
        scores = HISTORY[row.step]
        assert row.knowledge_accumulation == pytest.approx(np.mean([scores[name] for name in TASKS]))
        assert row.zero_shot_retention == pytest.approx(np.mean([scores[name] for name in HELD_OUT]))
        product = row.knowledge_accumulation * row.zero_shot_retention
        assert row.geometric_mean == pytest.approx(math.sqrt(product))
    assert [row.expert for row in rows] == [None, *TASKS]


def test_backward_transfer_compares_with_the_step_that_trained_the_task():
    assert backward_transfer(HISTORY, TASKS) == pytest.approx(((0.5 - 0.7) + (0.8 - 0.9)) / 2)
    assert backward_transfer(HISTORY, TASKS, step=2) == pytest.approx(0.6 - 0.7)
    rows = table(HISTORY, TASKS, HELD_OUT, TASKS)
    assert rows[0].backward_transfer is None
    assert rows[1].backward_transfer is None
    assert "before step 1" in rows[1].undefined["backward_transfer"]
    assert rows[3].backward_transfer == pytest.approx(-0.15)


def test_a_task_trained_twice_counts_from_the_last_time():
    trained = {"first": ["birds", "cars"], "second": ["cars"], "third": ["digits"]}
    found = backward_transfer(HISTORY, ["first", "second", "third"], trained=trained)
    assert found == pytest.approx(((0.5 - 0.7) + (0.8 - 0.9)) / 2)  # cars since step 2, not since step 1
    assert backward_transfer(HISTORY, ["first", "second"], trained=trained) == pytest.approx(0.6 - 0.7)


def test_experts_that_no_score_is_named_after_have_a_table_without_transfer():
    rows = table(HISTORY, TASKS, HELD_OUT, ["a", "b", "c"])
    assert rows[3].geometric_mean == pytest.approx(math.sqrt(0.7 * 0.45))
    assert rows[3].backward_transfer is None


def test_a_missing_score_leaves_its_numbers_undefined_and_is_named():
    history = {**HISTORY, 2: {name: score for name, score in HISTORY[2].items() if name not in ("digits", "flags")}}
    row = table(history, TASKS, HELD_OUT, TASKS)[2]
    assert (row.knowledge_accumulation, row.zero_shot_retention, row.geometric_mean) == (None, None, None)
    assert row.undefined["knowledge_accumulation"] == "no score of 'digits' (1 of 3 adaptation tasks)"
    assert row.undefined["zero_shot_retention"] == "no score of 'flags' (1 of 2 held-out tasks)"
    assert row.undefined["geometric_mean"] == "knowledge accumulation is not defined"
    assert row.backward_transfer == pytest.approx(-0.1)  # needs birds alone
    with pytest.raises(CfmergeError, match="'cars' at step 2"):
        backward_transfer({**HISTORY, 2: {"birds": 0.1}}, TASKS)


def test_a_step_without_scores_keeps_its_row():
    rows = table({0: HISTORY[0], 2: HISTORY[2]}, TASKS, HELD_OUT, TASKS)
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert set(rows[1].undefined.values()) == {"step 1 has no scores"}
    assert rows[2].undefined["backward_transfer"] == "no score of 'birds' at step 1"


def test_many_missing_scores_are_told_as_a_few_and_a_count():
    with pytest.raises(CfmergeError, match=r"'t4' and 15 more \(20 of 20 adaptation tasks\)"):
        knowledge_accumulation({}, [f"t{number}" for number in range(20)])


def test_no_task_has_no_mean():
    with pytest.raises(CfmergeError, match="no held-out tasks"):
        zero_shot_retention({"birds": 1}, [])
    row = table({0: {"birds": 1}}, ["birds"], [], [])[0]
    assert row.knowledge_accumulation == 1
    assert row.undefined["zero_shot_retention"] == "there are no held-out tasks"


def test_a_score_of_an_unknown_task_names_the_nearest():
    with pytest.raises(CfmergeError, match="unknown task 'bird'; did you mean 'birds'"):
        checked({"bird": 0.1}, TASKS, HELD_OUT)
    with pytest.raises(CfmergeError, match="unknown task 'flag'"):
        table({0: {"flag": 0.1}}, TASKS, HELD_OUT, [])


@pytest.mark.parametrize("score", [math.nan, math.inf, "0.5", None, True, [0.5]])
def test_a_score_is_a_finite_number(score):
    with pytest.raises(CfmergeError, match="score of 'birds': expected a finite number"):
        checked({"birds": score}, TASKS, HELD_OUT)


def test_scores_of_numpy_become_numbers_of_python():
    found = checked({"birds": np.float32(0.5), "cars": np.int64(3)}, TASKS, HELD_OUT)
    assert found == {"birds": 0.5, "cars": 3.0}
    assert {type(score) for score in found.values()} == {float}


def test_percentages_and_negative_scores_are_allowed_but_have_no_geometric_mean():
    assert knowledge_accumulation({"birds": 90, "cars": -10}, ["birds", "cars"]) == 40
    with pytest.raises(CfmergeError, match=r"zero-shot retention is -0\.5"):
        geometric_mean(0.5, -0.5)
    row = table({0: {"birds": 0.5, "faces": -0.5}}, ["birds"], ["faces"], [])[0]
    assert row.zero_shot_retention == -0.5
    assert row.geometric_mean is None
    assert "not negative" in row.undefined["geometric_mean"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"held_out": ["birds"], "order": []}, "'birds': an adaptation task cannot be held out"),
        ({"held_out": ["faces"], "order": ["faces"]}, "'faces', which is held out"),
        ({"held_out": ["faces", "faces"], "order": []}, "'faces' stands there twice"),
        ({"order": ["a"], "trained": {"a": ["bird"]}}, "unknown task 'bird'; did you mean 'birds'"),
        ({"order": ["a"], "trained": {"a": ["faces"]}}, "expert 'a' was trained on 'faces', which is held out"),
    ],
)
def test_tasks_that_contradict_each_other_are_refused(arguments, told):
    with pytest.raises(CfmergeError, match=told):
        table({}, TASKS, **{"held_out": HELD_OUT, **arguments})


def test_scores_of_a_step_that_does_not_exist_are_refused():
    with pytest.raises(CfmergeError, match=r"step 2: there are steps 0 \(the base\) to 1"):
        table({2: {}}, TASKS, HELD_OUT, ["birds"])
    with pytest.raises(CfmergeError, match="step '1'"):
        table({"1": {}}, TASKS, HELD_OUT, ["birds"])
    with pytest.raises(CfmergeError, match="step 4: there are 3 steps: birds, cars, digits"):
        backward_transfer(HISTORY, TASKS, step=4)
