"""A merge that was stopped goes on where it ended: the same bytes, and nothing of what is done is read again."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import cfmerge
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError, StoppedError
from cfmerge.formats import journal as journals
from cfmerge.formats.journal import JOURNAL, FileJournal, trusted
from cfmerge.formats.ranges import Covered
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.products import carry_out, resume

HEAD = "lm_head.weight"
KEEP = [{"match": HEAD, "method": "keep-base"}]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units of a few entries; every one of them is in the journal at once."""
    monkeypatch.setattr(cutting, "ENTRIES", 128)
    monkeypatch.setattr(cutting, "STACKED", 64)
    monkeypatch.setattr(journals, "EVERY", 0.0)


@pytest.fixture
def stop(monkeypatch):
    """`stop(after, error)`: a run ends by the error when so many units are marked.

    `without`: those count that are marked when an expert was left out.
    """

    def arrange(
        after: int, error: BaseException | type[BaseException] = KeyboardInterrupt, without: bool = False
    ) -> None:
        left = iter(range(after))

        def mark(self, ranges, told=None):
            if (self.header["left_out"] or not without) and next(left, None) is None:
                raise error
            return FileJournal.mark(self, ranges, told)

        monkeypatch.setattr(carry_out, "FileJournal", type("Stopping", (FileJournal,), {"mark": mark}))

    return arrange


@pytest.fixture
def go_on(monkeypatch):
    """Takes the stop away; reads are noted from then on: `[(tensor, first, count)]`."""

    def arrange() -> list[tuple[str, int, int]]:
        reads, read = [], SafetensorsFile.read
        monkeypatch.setattr(carry_out, "FileJournal", FileJournal)

        def noted(self, name, first=0, count=None):
            reads.append((name, first, self.tensors[name].size if count is None else count))
            return read(self, name, first, count)

        monkeypatch.setattr(SafetensorsFile, "read", noted)
        return reads

    return arrange


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def left(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/.*.cfmerge-*"))


def lines(staging: Path) -> list[dict]:
    return trusted(staging / JOURNAL)


def done(staging: Path) -> Covered:
    return Covered(tuple(one) for line in lines(staging) for one in line.get("ranges", ()))


def read_again(reads, before: Covered) -> list:
    """Reads of what was done before."""
    return [one for one in reads if any(before.holds(one[0], entry, 1) for entry in range(one[1], one[1] + one[2]))]


def assert_same(result, expected, contents) -> None:
    assert contents(result.output) == contents(expected.output)
    assert (result.notes, result.warnings, result.reports) == (expected.notes, expected.warnings, expected.reports)


@pytest.mark.parametrize(
    ("method", "after"), [("average", 1), ("average", 5), ("ace", 4), ("ties", 3)], ids=lambda value: str(value)
)
def test_a_merge_goes_on_and_reads_nothing_of_a_finished_unit(family, tmp_path, contents, stop, go_on, method, after):
    """Whatever the method: `ties` surveys the whole model before it merges, `ace` reports on every tensor."""
    expected = cfmerge.merge(family.base, family.experts, method, output=tmp_path / "whole" / "out", rules=KEEP)
    assert expected.resumed == ()
    stop(after)
    with pytest.raises(KeyboardInterrupt) as caught:
        cfmerge.merge(family.base, family.experts, method, output=tmp_path / "out", rules=KEEP)
    (staging,) = left(tmp_path)
    assert f"kept in {staging}" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    before = done(staging)
    assert before.count(HEAD) == 96
    plan = cfmerge.plan(family.base, family.experts, method, rules=KEEP)
    reads, told = go_on(), []
    result = plan.run(tmp_path / "out", progress=lambda name, count: told.append(count))
    share = before.entries / 856
    assert result.resumed == (f"{share:.0%} of the merge was done by an earlier run, and is not done again",)
    assert sum(told) == plan.bytes_to_read
    assert reads
    assert not read_again(reads, before)
    assert_same(result, expected, contents)
    assert left(tmp_path) == []


def test_units_that_are_cut_in_another_way_go_on_too(family, tmp_path, contents, stop, go_on, monkeypatch):
    """The journal tells ranges: what is done stays done on a machine with more memory."""
    rules = [{"match": "*_proj.weight", "method": "ace"}]
    expected = cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "whole" / "out", rules=rules)
    stop(7)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out", rules=rules)
    monkeypatch.setattr(cutting, "ENTRIES", 512)
    monkeypatch.setattr(cutting, "STACKED", 256)
    go_on()
    result = cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out", rules=rules)
    assert result.resumed
    assert contents(result.output) == contents(expected.output)
    for name, report in expected.reports.items():  # of another stack, so to the last digits
        assert result.reports[name] == pytest.approx(report, rel=1e-4, abs=1e-6)


def test_a_sweep_goes_on(family, tmp_path, contents, stop, go_on):
    grid = cfmerge.grid("task_arithmetic", scale=[0.3, 1.0])
    expected = cfmerge.sweep(family.base, family.experts, grid, output=tmp_path / "whole")
    recipes = {label: result.plan.recipe for label, result in expected.items()}
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.sweep(family.base, family.experts, grid, output=tmp_path / "runs")
    assert len(left(tmp_path)) == 2
    assert len({(staging / JOURNAL).read_bytes() for staging in left(tmp_path)}) == 1
    before, plan, reads = done(left(tmp_path)[0]), cfmerge.plan(recipes), go_on()
    results = plan.run(tmp_path / "runs")
    assert not read_again(reads, before)
    for label, result in results.items():
        assert result.resumed
        assert_same(result, expected[label], contents)


def test_a_sweep_whose_labels_are_exchanged_starts_anew(family, tmp_path, contents, stop, go_on):
    one, other = cfmerge.grid("task_arithmetic", scale=[0.3, 1.0]).values()
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.sweep(family.base, family.experts, {"a": one, "b": other}, output=tmp_path / "runs")
    go_on()
    results = cfmerge.sweep(family.base, family.experts, {"b": one, "a": other}, output=tmp_path / "runs")
    whole = cfmerge.sweep(family.base, family.experts, {"b": one, "a": other}, output=tmp_path / "whole")
    assert all(contents(results[label].output) == contents(whole[label].output) for label in "ab")


def test_one_file_goes_on(family, tmp_path, stop, go_on):
    expected = cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "whole.safetensors")
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out.safetensors")
    before, plan = done(left(tmp_path)[0]), cfmerge.plan(family.base, family.experts, "average")
    reads = go_on()
    result = plan.run(tmp_path / "out.safetensors")
    assert not read_again(reads, before)
    assert result.output.read_bytes() == expected.output.read_bytes()
    assert left(tmp_path) == []


# --- what is not gone on with ---------------------------------------------------------------------------------------


def stopped(family, tmp_path, stop, go_on, after=3) -> Path:
    """The staging directory of a merge that was stopped."""
    stop(after)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
    go_on()
    (staging,) = left(tmp_path)
    return staging


def merged(family, output, method="average", **options):
    return cfmerge.merge(family.base, family.experts, method, output=output, **options)


def test_another_recipe_starts_anew_and_removes_what_is_left_when_it_is_done(family, tmp_path, contents, stop, go_on):
    staging = stopped(family, tmp_path, stop, go_on)
    with pytest.raises(CfmergeError, match="no such file"):  # an error costs nothing that is done
        cfmerge.merge(family.base, [*family.experts, tmp_path / "typo"], output=tmp_path / "out")
    there = []
    result = merged(
        family, tmp_path / "out", "task_arithmetic", progress=lambda name, count: there.append(staging.exists())
    )
    assert all(there)
    assert result.resumed == ()
    assert contents(result.output) == contents(merged(family, tmp_path / "whole", "task_arithmetic").output)
    assert left(tmp_path) == []


def test_an_input_that_has_changed_starts_anew(family, tmp_path, contents, stop, go_on):
    """Even where its size and its time are as they were."""
    stopped(family, tmp_path, stop, go_on)
    file = family.experts[0] / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = merged(family, tmp_path / "out")
    assert result.resumed == ()
    assert contents(result.output) == contents(merged(family, tmp_path / "whole").output)


def test_a_plugin_that_has_changed_is_another_merge(family, tmp_path):
    plugin = tmp_path / "resumed_plugin.py"
    text = (
        "from cfmerge import methods\n\n@methods.register\ndef resumed_half() -> methods.Method:\n"
        "    '''Half of the mean.'''\n    return methods.task_arithmetic(scale=0.5)\n"
    )
    plugin.write_text(text)
    asked = {"plugins": [str(plugin)]}
    before = cfmerge.plan(family.base, family.experts, "resumed_half", **asked).digest
    assert before == cfmerge.plan(family.base, family.experts, "resumed_half", **asked).digest
    plugin.write_text(text.replace("0.5", "0.7"))
    assert before != cfmerge.plan(family.base, family.experts, "resumed_half", **asked).digest


def test_another_version_starts_anew_and_says_so(family, tmp_path, contents, stop, go_on, monkeypatch):
    stopped(family, tmp_path, stop, go_on)
    now = resume.versions()
    monkeypatch.setattr(resume, "versions", lambda: now | {"jax": "99.0"})
    result = merged(family, tmp_path / "out")
    (told,) = result.resumed
    assert told == f"what an earlier run had done was done anew: jax was {now['jax']}, and is 99.0 now"
    assert contents(result.output) == contents(merged(family, tmp_path / "whole").output)


def test_fresh_starts_anew(family, tmp_path, contents, stop, go_on):
    staging = stopped(family, tmp_path, stop, go_on)
    before = done(staging)
    reads = go_on()
    result = merged(family, tmp_path / "out", fresh=True)
    assert result.resumed == ()
    assert before.entries == sum(before.holds(name, entry, 1) for name, first, count in set(reads)
                                 for entry in range(first, first + count))  # fmt: skip
    assert contents(result.output) == contents(merged(family, tmp_path / "whole").output)


@pytest.mark.parametrize("damage", ["cut off", "in the middle", "header", "empty", "gone", "shard cut", "shard gone"])
def test_what_is_damaged_is_done_again(family, tmp_path, contents, stop, go_on, damage):
    staging = stopped(family, tmp_path, stop, go_on)
    file, shard = staging / JOURNAL, staging / "model.safetensors"
    content = file.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    kept = {"cut off": 2, "in the middle": 1}.get(damage, 0)
    match damage:
        case "cut off":
            file.write_bytes(content[:-5])
        case "in the middle" | "header":
            place = ends[0] // 2 if damage == "header" else ends[1] + 30
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        case "empty":
            file.write_bytes(b"")
        case "gone":
            file.unlink()
        case "shard cut":
            os.truncate(shard, shard.stat().st_size - 1)
        case "shard gone":
            shard.unlink()
    assert len(lines(staging)) == (kept + 1 if kept else 4 if "shard" in damage else 0)
    result = merged(family, tmp_path / "out")
    assert bool(result.resumed) == (kept > 0 or "shard" in damage)
    assert contents(result.output) == contents(merged(family, tmp_path / "whole").output)
    assert left(tmp_path) == []


@pytest.mark.parametrize("error", [full(), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_run_that_ends_while_it_takes_up_what_is_left_loses_nothing(family, tmp_path, stop, go_on, error):
    staging = stopped(family, tmp_path, stop, go_on)
    before = (staging / JOURNAL).read_bytes()

    def fail(*arguments):
        raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fail)
        with pytest.raises((StoppedError, KeyboardInterrupt)):
            merged(family, tmp_path / "out")
    assert (staging / JOURNAL).read_bytes() == before
    assert merged(family, tmp_path / "out").resumed


def test_a_sweep_one_of_whose_outputs_is_there_loses_nothing(family, tmp_path, stop, go_on):
    labels = {"a": "average", "b": "task_arithmetic"}
    stop(3)
    with pytest.raises(KeyboardInterrupt):
        cfmerge.sweep(family.base, family.experts, labels, output=tmp_path / "runs")
    go_on()
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/file").touch()
    with pytest.raises(CfmergeError, match="exists already"):
        cfmerge.sweep(family.base, family.experts, labels, output=tmp_path / "runs")
    assert len(left(tmp_path)) == 2
    (tmp_path / "runs/b/file").unlink()
    results = cfmerge.sweep(family.base, family.experts, labels, output=tmp_path / "runs")
    assert all(result.resumed for result in results.values())


# --- how runs end ---------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
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
