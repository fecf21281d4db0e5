"""Cards that cfmerge wrote tell what it wrote into them."""

import numpy as np

import cfmerge
from cfmerge.report.card import model_card, table
from cfmerge.report.card_reading import read_card


def test_a_card_is_read_as_it_was_written(make_model, llama, tmp_path):
    for number, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, llama(number))
    experts = [cfmerge.Expert(str(tmp_path / "math"), weight=0.5), cfmerge.Expert(str(tmp_path / "code"))]
    plan = cfmerge.plan(tmp_path / "base", experts, "average")
    files = {file: f"{number:064x}" for number, file in enumerate(
        file for model in (plan.base, *plan.experts) for file in model.files
    )}  # fmt: skip
    warning = "The merged model is long:\n  cfmerge merge README.md -m dc_merge"
    card = read_card(model_card(plan, files, ["a note", "another: of `two` words"], [warning]))
    assert card.warnings == (warning,)
    assert card.notes == (*plan.notes, "a note", "another: of `two` words")
    assert {(kind, what): count for kind, what, count in card.counts} == dict(plan.counts())
    assert [(one.role, one.weight, one.file) for one in card.inputs] == [
        ("base", "", "model.safetensors"), ("math", "0.5", "model.safetensors"), ("code", "1", "model.safetensors"),
    ]  # fmt: skip
    assert [one.digest for one in card.inputs] == list(files.values())
    assert f"cfmerge {cfmerge.__version__}" in card.versions
    assert f"numpy {np.__version__}" in card.versions
    assert card.about.endswith(f"Source: {cfmerge.methods.registry()['average'].source}")


def test_cells_hold_any_text():
    rows = [("a|b", "", "c", "d"), ("a", "two\nlines", "", "`|`")]
    card = read_card(f"## Inputs\n\n{table('a', 'b', 'c', 'd', rows=rows)}")
    assert card.inputs == (("a|b", "", "c", "d"), ("a", "two lines", "", "|"))


def test_a_card_of_someone_else_tells_nothing():
    card = read_card("---\ntags: [x]\n---\n# A model\n\nIt is good.\n\n> A quote\n")
    assert card == ("", (), (), (), (), "")
