"""What a run leaves when it ends early: by an error of the input, a full disk, an interruption."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from resuming import assert_same, done, full, left, lines, merged, read_again

import cfmerge
from cfmerge.errors import StoppedError
from cfmerge.formats.journal import FileJournal
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.products import carry_out

pytestmark = pytest.mark.usefixtures("small_units")


def test_an_error_of_the_input_leaves_nothing(family, make_model, tmp_path, llama, contents):
    tensors = llama(1)
    tensors["model.norm.weight"][3] = np.nan  # the last unit
    bad = make_model(tmp_path / "in" / "bad", tensors)
    before = contents(tmp_path)
    with pytest.raises(cfmerge.CfmergeError, match="holds NaN or infinity"):
        cfmerge.merge(family.base, [bad, *family.experts], "average", output=tmp_path / "out")
    assert contents(tmp_path) == before


def test_an_expert_that_was_left_out_stays_left_out(family, make_model, tmp_path, llama, contents, stop, go_on):
    tensors = llama(5)
    tensors["model.norm.weight"][3] = np.nan
    bad = make_model(tmp_path / "in" / "bad", tensors)
    asked = ([*family.experts, bad], "average")
    expected = cfmerge.merge(family.base, *asked, output=tmp_path / "whole/out", on_nonfinite="skip-expert")
    stop(3, without=True)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.merge(family.base, *asked, output=tmp_path / "out", on_nonfinite="skip-expert")
    (staging,) = left(tmp_path)
    assert done(staging).entries
    go_on()
    result = cfmerge.merge(family.base, *asked, output=tmp_path / "out", on_nonfinite="skip-expert")
    assert result.resumed
    assert any("was left out" in note for note in result.notes)
    assert_same(result, expected, contents)


@pytest.mark.parametrize("moment", ["a tensor", "the journal", "the card", "the last flush"])
def test_a_full_disk_and_then_room(family, tmp_path, contents, monkeypatch, go_on, moment):
    expected = merged(family, tmp_path / "whole" / "out")
    calls = {"a tensor": ("pwrite", 8), "the journal": ("write", 3), "the last flush": ("fsync", 3)}
    with monkeypatch.context() as patched:
        if moment == "the card":
            patched.setattr(Path, "write_text", lambda *arguments: (_ for _ in ()).throw(full()))
        else:
            name, count = calls[moment]
            real, before = getattr(os, name), iter(range(count))

            def limited(*arguments):
                if next(before, None) is None:
                    raise full()
                return real(*arguments)

            patched.setattr(os, name, limited)
        with pytest.raises(StoppedError) as caught:
            merged(family, tmp_path / "out")
    message = str(caught.value)
    (staging,) = left(tmp_path)
    for word in (str(tmp_path / "out"), "the disk is full", f"kept in {staging}", "--fresh", "cfmerge clean"):
        assert word in message
    assert "nothing was written" not in message
    before, plan = done(staging), cfmerge.plan(family.base, family.experts, "average")
    assert before.entries
    reads = go_on()
    result = plan.run(tmp_path / "out")
    assert result.resumed
    assert not read_again(reads, before)
    assert_same(result, expected, contents)
    assert left(tmp_path) == []


def test_an_error_of_another_kind_keeps_what_is_done(family, tmp_path, stop):
    """Such as memory that has run out."""
    stop(3, MemoryError("no more"))
    with pytest.raises(MemoryError, match="no more") as caught:
        merged(family, tmp_path / "out")
    assert "The same command goes on from there" in caught.value.__notes__[0]
    assert len(left(tmp_path)) == 1


def test_a_unit_that_was_not_written_is_not_marked(family, tmp_path, monkeypatch):
    """The first write that fails is followed by others, which are given up."""
    real, calls = os.pwrite, iter(range(10**6))

    def failing(*arguments):
        if next(calls) == 6:
            raise full()
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StoppedError):
        merged(family, tmp_path / "out")
    (staging,) = left(tmp_path)
    there = {name: array.reshape(-1) for name, array in written(staging / "model.safetensors").items()}
    assert all(there[name][first : first + count].any() for line in lines(staging)[1:]
               for name, first, count in line["ranges"])  # fmt: skip


def written(file: Path) -> dict[str, np.ndarray]:
    opened = SafetensorsFile(file)
    return {name: opened.read(name) for name in opened.tensors}


def test_a_users_own_sink_has_no_journal(family, tmp_path):
    class Kept:
        def write(self, name, values, first=0):
            pass

    cfmerge.plan(family.base, family.experts, "average").run(Kept())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_command_line_says_how_to_go_on(family, tmp_path, stop, monkeypatch, capsys):
    from cfmerge import cli

    stop(3)
    monkeypatch.setattr(cli.ending.signal, "signal", lambda *arguments: None)
    arguments = ["--base", family.base, *(text for path in family.experts for text in ("-e", path))]
    monkeypatch.setattr(
        sys, "argv", ["cfmerge", "merge", *map(str, arguments), "-m", "average", "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    told = capsys.readouterr().err
    assert "interrupted; " in told
    assert f"cfmerge clean {tmp_path / 'out'} --yes" in told
    assert "nothing was written" not in told
    monkeypatch.setattr(carry_out, "FileJournal", FileJournal)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json", "-q"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "was done by an earlier run" in json.loads(capsys.readouterr().out.splitlines()[-1])["resumed"][0]
