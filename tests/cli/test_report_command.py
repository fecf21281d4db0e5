"""`cfmerge report`: the page is written where it is told, and nothing is replaced unasked."""

import json

import pytest
from typer.testing import CliRunner

import cfmerge
from cfmerge.cli import app
from cfmerge.errors import CfmergeError
from cfmerge.products import report


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty directory; pages are made of nothing."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def made(what, **how):
        asked.append((what, how["name"]))
        return report.Report("<!doctype html>", ("an input is gone",))

    monkeypatch.setattr(cfmerge, "make_report", made, raising=False)

    def run(*arguments):
        done = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=True)
        if isinstance(done.exception, CfmergeError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    run.asked = asked
    return run


def test_the_page_lies_here_under_the_name_of_the_model(run, tmp_path):
    (tmp_path / "models/merged").mkdir(parents=True)
    told = run("models/merged")
    assert (tmp_path / "merged-report.html").read_text() == "<!doctype html>"
    assert "an input is gone" in told
    assert told.strip().endswith("merged-report.html")
    assert str(run.asked[0][0]) == "models/merged"


def test_a_recipe_and_an_output(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: base\nexperts: [math, code]\nmethod: ties\n")
    told = json.loads(run("mine.yaml", "-o", "page.html", "--json"))
    assert told == {"event": "done", "output": "page.html", "lacking": ["an input is gone"]}
    recipe, name = run.asked[0]
    assert (recipe.method, name) == ("ties", "mine.yaml")
    assert (tmp_path / "page.html").exists()


def test_what_is_there_is_kept(run, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(CfmergeError, match="is there already"):
        run("merged", "-o", "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
    run("merged", "-o", "page.html", "--overwrite", "-q")
    assert (tmp_path / "page.html").read_text() == "<!doctype html>"


def test_a_page_is_replaced_at_once_or_not_at_all(run, tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "page.html").write_text("mine")
    (tmp_path / "link.html").symlink_to("nowhere.html")
    with pytest.raises(CfmergeError, match="is there already"):
        run("merged", "-o", "link.html")
    monkeypatch.setattr(cfmerge, "make_report", lambda *asked, **how: report.Report("r\udcff", ()))  # a file's name
    run("merged", "-o", "page.html", "--overwrite", "-q")
    assert (tmp_path / "page.html").read_text() == r"r\udcff"
    (tmp_path / "page.html").write_text("mine")

    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CfmergeError, match=r"page\.html: cannot be written: no space"):
        run("merged", "-o", "page.html", "--overwrite")
    assert (tmp_path / "page.html").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "merged", "page.html"]


def test_mistakes_are_told_before_anything_is_read(run, tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(CfmergeError, match="there is no directory nowhere"):
        run("merged", "-o", "nowhere/page.html")
    with pytest.raises(CfmergeError, match="no such file or directory; give a merged model or a recipe"):
        run("missing")
    with pytest.raises(CfmergeError, match="with a base and experts in it"):
        run("ace-published-gpt2")
    assert run.asked == []
