"""Notes of the methods: each under its own message, with the tensors that it is about."""

import pytest
import toys

import cfmerge
from cfmerge import methods


def noisy() -> methods.Method:
    """The mean, with two notes that begin with a value."""
    mean = methods.average()

    def report(statistic):
        return mean.solve(statistic), {"size": statistic.weight, "rank": statistic.weight + 1}

    return methods.Method(
        "noisy", mean.init, mean.update, mean.solve, report,
        notes={
            "size": (lambda value: value > 0, "{value:.0f} is its size"),
            "rank": (lambda value: value > 0, "{value:.0f} is its rank"),
        },
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own():
    with toys.registered(noisy):
        yield


def test_notes_that_begin_with_a_value_stay_apart(family, tmp_path):
    result = cfmerge.merge(family.base, family.experts, "noisy", output=tmp_path / "out")
    told = [note for note in result.notes if "its" in note]
    assert [note.partition(": ")[2] for note in told] == ["3 is its size", "4 is its rank"]
    assert all("and 5 more" in note for note in told)
