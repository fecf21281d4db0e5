"""`cfmerge clean`: what merges that ended early have left, listed and removed."""

import json

import pytest
from typer.testing import CliRunner

from cfmerge.cli import app
from cfmerge.cli.leftovers import ago
from cfmerge.formats import journal as journals
from cfmerge.formats.journal import FileJournal
from cfmerge.formats.staged import StagedDirectory


def clean(*arguments) -> str:
    done = CliRunner().invoke(app, ["clean", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """A staging directory that is left, 37 % done."""
    monkeypatch.setattr(journals, "EVERY", 0.0)
    staged = StagedDirectory(tmp_path / "runs" / "out", digest="0123abcd", keep=True)
    with staged:
        (staged.path / "model.safetensors").write_bytes(b"x" * 10_000)
        journal = FileJournal(staged.target, [staged.path])
        journal.begin({"digest": "0123abcd", "versions": {}, "entries": 100}, lambda: None)
        journal.mark([("a", 0, 30)])
        journal.mark([("b", 10, 7)])
    return staged


def test_it_lists_and_removes_only_when_told_to(staged, tmp_path):
    (tmp_path / "runs" / "other").mkdir()
    for place in (tmp_path / "runs", tmp_path / "runs" / "out"):  # a directory that holds outputs, or an output
        told = clean(place)
        assert f"{tmp_path / 'runs' / 'out'}  37% done, " in told
        assert str(staged.path) in told
        assert "less than a minute ago" in told
        assert "--yes" in told
        assert staged.path.exists()
    (listed,) = json.loads(clean(tmp_path / "runs", "--json"))
    assert (listed["done"], listed["held"], listed["removed"]) == (0.37, False, False)
    assert listed["bytes"] >= 10_000
    assert "removed 1 of 1" in clean(tmp_path / "runs" / "out", "--yes")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    assert "nothing is left" in clean(tmp_path / "runs")


def test_what_a_process_writes_now_is_never_removed(staged, tmp_path):
    again = StagedDirectory(staged.target, digest="0123abcd", keep=True, resume=True)
    with again:
        assert "a process writes it now" in clean(tmp_path / "runs", "--yes")
        (listed,) = json.loads(clean(tmp_path / "runs", "--json", "--yes"))
        assert (listed["held"], listed["removed"]) == (True, False)
        assert (again.path / "model.safetensors").exists()
    (listed,) = json.loads(clean(tmp_path / "runs", "--json", "--yes"))
    assert listed["removed"]
    assert not staged.path.exists()


def test_nothing_else_is_taken_for_a_leftover(tmp_path):
    for name in (".out.cfmerge-previous", ".out.cfmerge-0123", "out.cfmerge-0123abcd", ".cfmerge-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / ".file.cfmerge-0123abcd").touch()
    (tmp_path / ".link.cfmerge-0123abcd").symlink_to(tmp_path)
    assert "nothing is left" in clean(tmp_path, "--yes")
    assert len(list(tmp_path.iterdir())) == 6


def test_times_are_told_in_the_unit_that_suits_them():
    assert [ago(seconds) for seconds in (3, 60, 7300, 200_000)] == [
        "less than a minute",
        "1 minute",
        "2 hours",
        "2 days",
    ]
