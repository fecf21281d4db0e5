"""What was asked of the fresh zoos, on made-up rows."""

import fresh_questions
import pytest

from cfmerge_accuracy.results import Results


def zoo(name, accuracies, notes=(), factors=None, lengths=None):
    """Two tasks, two seeds, experts that are right half of the time."""

    def row(seed):
        def method(name, accuracy):
            told = list(notes) if name == "auto" else []
            kept = {"name": name, "method": name, "group": "", "data": "none", "failed": None, "notes": told}
            return kept | {"published": {"a": accuracy, "b": accuracy}, "factor": (factors or {}).get(name)}

        methods = [method(name, accuracy) for name, accuracy in accuracies.items()]
        references = {"experts": {"a": 0.5, "b": 0.5}, "base": {"a": 0.25, "b": 0.25}}
        facts = {"lengths": lengths} if lengths else {}
        made = {"zoo": name, "seed": seed, "tasks": ["a", "b"], "facts": facts, "references": references}
        return made | {"methods": methods}

    return Results(name, (row(0), row(1)))


NOTES = ("auto: opcm for x and 3 more: deltas of low rank (up to 8)", "another note")


def test_auto_is_held_against_the_best_of_its_rivals():
    first = zoo("first", {"auto": 0.4, "average": 0.42, "ace": 0.3}, NOTES)
    second = zoo("second", {"auto": 0.45, "average": 0.2, "ace": 0.3}, NOTES[:1])
    text = fresh_questions.of_auto([first, second])
    assert "| `first` | `opcm` | 80.0 | `average` 84.0 | -4.0 [-4.0, -4.0] |" in text
    assert "| `second` | `opcm` | 90.0 | `ace` 60.0 | +30.0 [30.0, 30.0] |" in text
    assert "**no** (most behind on `first`: 4.0)" in text
    assert "A better mean than each of them: **yes** (`auto` 85.0, `average` 62.0, `ace` 60.0)" in text
    assert "At least three methods taken: **no** (`opcm`)" in text
    assert fresh_questions.of_auto([zoo("other", {"ace": 0.3})]) == ""


@pytest.mark.parametrize("auto", [0.41, 0.42, 0.5])
def test_auto_may_be_two_points_behind(auto):
    text = fresh_questions.of_auto([zoo("first", {"auto": auto, "average": 0.42})])
    assert "of the 7: **yes**" in text


def test_the_constant_is_compared_with_the_chain_without_it():
    chain = "tsv_m >> svc(alpha=1)"
    text = fresh_questions.of_constant([zoo("first", {chain: 0.4, f"{chain} >> scale(0.71)": 0.45})])
    assert "| `first` | +10.0 [10.0, 10.0] |  |" in text
    assert fresh_questions.of_constant([zoo("first", {chain: 0.4})]) == ""


def test_scales_are_told_of_zoos_that_tried_any():
    tried = zoo("tried", {"ace": 0.4, "average": 0.3}, factors={"ace": 0.5}, lengths={"a": 0.1, "b": 0.3})
    text = fresh_questions.of_scales([tried, zoo("not", {"ace": 0.4})])
    assert "| `ace` | 0.50 |" in text
    assert "`average`" not in text
    assert "| (length of deltas over the base's) | 0.200 |" in text
    assert fresh_questions.of_scales([zoo("not", {"ace": 0.4})]) == ""


def test_experts_and_base_are_told():
    assert "| `first` | a, b | 50.0 | 50.0 | 0.200 |" in fresh_questions.experts(
        [zoo("first", {"ace": 0.4}, lengths={"a": 0.2})]
    )
