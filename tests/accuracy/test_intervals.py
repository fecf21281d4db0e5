"""Intervals over tasks and seeds: against SciPy where they are classical, by simulation where they are not."""

import math

import numpy as np
import pytest
import scipy.stats

from cfmerge_accuracy import statistics


def crossed(numbers: np.ndarray) -> dict[int, dict[str, float]]:
    return {seed: {f"t{task}": float(value) for task, value in enumerate(row)} for seed, row in enumerate(numbers)}


def test_normalised_is_in_per_cent_of_the_expert():
    found = statistics.normalised({"a": 0.45, "b": 0.9, "c": 0.1}, {"a": 0.9, "b": 0.8, "c": 0.0})
    assert found == pytest.approx({"a": 50.0, "b": 112.5})  # nothing can be said of a task that its expert never gets


@pytest.mark.parametrize("shape", [(1, 6), (5, 1)])
def test_along_one_axis_it_is_the_t_interval(shape):
    numbers = np.random.default_rng(0).normal(3, 2, shape)
    found = statistics.interval(crossed(numbers))
    flat = numbers.ravel()
    low, high = scipy.stats.t.interval(0.95, flat.size - 1, flat.mean(), scipy.stats.sem(flat))
    np.testing.assert_allclose(found[:4], [flat.mean(), low, high, scipy.stats.ttest_1samp(flat, 0).pvalue], rtol=1e-10)
    assert (found.seeds, found.tasks) == shape


@pytest.mark.parametrize("deviations", [(0, 0, 1), (0, 2, 1), (0.5, 1, 1), (2, 0.5, 1)])
def test_intervals_hold_the_truth_as_often_as_they_say(deviations):
    """With 3 seeds and 7 tasks, whether seeds, tasks or neither decide; 900 draws have a standard error of 0.7 %."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(900):
        of_seed, of_task, rest = (rng.normal(0, deviation, (3, 7)) for deviation in deviations)
        found = statistics.interval(crossed(10 + of_seed[:, :1] + of_task[:1] + rest))
        held += found.low <= 10 <= found.high
    assert held / 900 > 0.92


def test_pairs_are_of_one_seed_and_task():
    """What is common to both methods cancels: tasks differ by tens of points, methods by one, always."""
    rng = np.random.default_rng(2)
    a = rng.normal(70, 20, (3, 6))
    b = a - 1 + rng.normal(0, 0.1, a.shape)
    assert statistics.paired(crossed(a), crossed(b)).significant
    assert statistics.paired(crossed(b), crossed(a)).high < 0
    shuffled = statistics.paired(crossed(a), crossed(b[:, ::-1]))
    assert not shuffled.significant
    less = crossed(b)
    del less[1]
    found = statistics.paired(crossed(a), less)
    assert (found.seeds, found.tasks) == (2, 6)
    np.testing.assert_allclose(found.mean, np.mean((a - b)[[0, 2]]))


def test_one_number_or_none_is_not_significant():
    one = statistics.interval({0: {"a": 5.0}})
    assert one.mean == 5
    assert not one.significant
    assert math.isinf(one.high)
    none = statistics.interval({0: {}})
    assert math.isnan(none.mean)
    assert not none.significant


def test_equal_models_differ_by_nothing_and_a_constant_is_certain():
    values = crossed(np.full((3, 4), 80.0))
    same = statistics.paired(values, values)
    assert (same.mean, same.low, same.high, same.p, same.significant) == (0, 0, 0, 1, False)
    shifted = statistics.paired(values, crossed(np.full((3, 4), 79.0)))
    assert (shifted.p, shifted.significant) == (0, True)


def test_holm_by_hand():
    assert statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}) == {}


def test_ordering_says_what_holds_on_every_seed():
    rng = np.random.default_rng(3)
    task = rng.normal(0, 5, 6)
    clear, middle = (crossed(level + task + rng.normal(0, 0.2, (3, 6))) for level in (90, 80))
    unsteady = crossed(80 + task + np.array([[3.0], [-3.0], [3.0]]))
    failed = {0: clear[0]}  # on two seeds: it is in no ranking
    found = statistics.ordering({"middle": middle, "unsteady": unsteady, "clear": clear, "failed": failed})
    assert [list(names) for names in found.rankings.values()] == [
        ["clear", "unsteady", "middle"],
        ["clear", "middle", "unsteady"],
        ["clear", "unsteady", "middle"],
    ]
    assert found.pairs == {("clear", "middle"), ("clear", "unsteady")}
    assert ("clear", "middle") in found.significant
    assert found.total == 3
    assert statistics.ordering({}).total == 0


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 6, 20).astype(float), rng.normal(size=20)
    assert statistics.rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert math.isnan(statistics.rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(statistics.rank_correlation([1, 2], [1, 2]))
