"""Journals as files: ranges that join, arrays that come back as they were, lines that are trusted."""

import random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfmerge.formats import journal as journals
from cfmerge.formats.journal import JOURNAL, FileJournal, trusted
from cfmerge.formats.ranges import Covered

HEADER = {"digest": "ab", "versions": {}, "entries": 10}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(journals, "EVERY", 0.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.integers(0, 6)), max_size=12))
def test_ranges_hold_what_their_entries_say(ranges):
    there, covered = {"a": set(), "b": set()}, Covered(ranges)
    for name, first, count in ranges:
        there[name] |= set(range(first, first + count))
    for name, entries in there.items():
        assert covered.count(name) == len(entries)
        for first in range(14):
            for count in range(5):
                assert covered.holds(name, first, count) == (set(range(first, first + count)) <= entries)
    assert set(Covered(covered.ranges()).ranges()) == set(covered.ranges())
    assert covered.entries == sum(map(len, there.values()))


def journal(folder, lines=3, synced=lambda: None) -> FileJournal:
    made = FileJournal(folder / "out", [folder])
    made.begin(HEADER, synced)
    for number in range(lines):
        made.mark([("a", 2 * number, 2)], [[], [f"told {number}"]])
    return made


def test_totals_come_back_as_they_were(tmp_path):
    totals = {
        "histogram": np.arange(6, dtype=np.int64).reshape(2, 3), "sum": np.float64(0.1) / 3, "none": None,
        ("layer.weight", 4): (np.zeros((0, 2)), [np.array([np.nan, -0.0, np.inf])]),
    }  # fmt: skip
    made = journal(tmp_path, 0)
    made.remember("survey", totals)
    again = FileJournal(tmp_path / "out", [tmp_path])
    again.go_on(lambda: None)
    back = again.recall("survey")
    assert list(back) == list(totals)
    assert back["sum"] == totals["sum"]
    assert back["sum"].dtype == np.float64
    assert back["none"] is None
    for mine, theirs in zip(back["layer.weight", 4][1], totals["layer.weight", 4][1], strict=True):
        assert mine.tobytes() == theirs.tobytes()
    np.testing.assert_array_equal(back["histogram"], totals["histogram"])
    assert back["layer.weight", 4][0].shape == (0, 2)


@pytest.mark.parametrize("value", [Covered(), {"a": object()}, np.zeros(2, ml_dtypes.bfloat16)])
def test_what_has_no_plain_form_is_not_remembered(tmp_path, value):
    made = journal(tmp_path, 1)
    made.remember("survey", value)
    again = FileJournal(tmp_path / "out", [tmp_path])
    again.go_on(lambda: None)
    assert again.recall("survey") is None
    assert again.kept == 1


def test_data_are_synced_before_their_lines(tmp_path):
    seen = []
    made = journal(tmp_path, 0, lambda: seen.append(len(trusted(tmp_path / JOURNAL))))
    for number in range(3):
        made.mark([("a", number, 1)])
    assert seen == [1, 2, 3]


def test_lines_are_kept_back_until_the_work_of_a_while_is_there(tmp_path, monkeypatch):
    """A run that ends before has left nothing that is worth to be kept."""
    clock = iter([0.0, 0.4, 0.9, 1.1, 1.2, 1.3])
    monkeypatch.setattr(journals, "EVERY", 1.0)
    monkeypatch.setattr(journals.time, "monotonic", lambda: next(clock))
    made = journal(tmp_path, 3)
    assert made.kept == 0
    made.mark([("a", 6, 2)])
    assert made.kept == 4
    made.mark([("a", 8, 2)])
    assert made.kept == 4
    assert len(trusted(tmp_path / JOURNAL)) == 5


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_ends_what_is_trusted(tmp_path, seed):
    journal(tmp_path, 5)
    file, pick = tmp_path / JOURNAL, random.Random(seed)
    whole, content = trusted(file), bytearray(file.read_bytes())
    content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    file.write_bytes(content)
    found = trusted(file)
    assert len(found) < len(whole)
    assert found == whole[: len(found)]


def test_what_is_not_trusted_is_cut_off_and_written_over(tmp_path):
    journal(tmp_path, 3)
    file = tmp_path / JOURNAL
    file.write_bytes(file.read_bytes()[:-4])
    again = FileJournal(tmp_path / "out", [tmp_path])
    assert again.read() == HEADER
    again.go_on(lambda: None)
    assert (again.done([("a", 0, 4)]), again.done([("a", 4, 1)])) == (True, False)
    assert again.told() == [[[], ["told 0"]], [[], ["told 1"]]]
    again.mark([("a", 4, 2)], [[], ["told again"]])
    assert [line["told"][1] for line in trusted(file)[1:]] == [["told 0"], ["told 1"], ["told again"]]


def test_of_several_journals_the_lines_count_that_all_of_them_hold(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    made = FileJournal(tmp_path / "out", folders)
    made.begin(HEADER, lambda: None)
    for number in range(3):
        made.mark([("a", number, 1)])
    (folders[1] / JOURNAL).write_bytes((folders[1] / JOURNAL).read_bytes()[:-40])
    again = FileJournal(tmp_path / "out", folders)
    assert again.read() == HEADER
    again.go_on(lambda: None)
    assert again.covered.count("a") == again.kept < 3
    assert (folders[0] / JOURNAL).read_bytes() == (folders[1] / JOURNAL).read_bytes()
    (folders[1] / JOURNAL).unlink()
    assert FileJournal(tmp_path / "out", folders).read() is None
