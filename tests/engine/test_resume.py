"""A merge that was stopped goes on where it ended: the same bytes, and nothing of what is done is read again."""

import os
from pathlib import Path

import numpy as np
import pytest
from resuming import assert_same, done, full, left, lines, merged, read_again

import cfmerge
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError, StoppedError
from cfmerge.formats.journal import JOURNAL
from cfmerge.products import resume

HEAD = "lm_head.weight"
KEEP = [{"match": HEAD, "method": "keep-base"}]
pytestmark = pytest.mark.usefixtures("small_units")


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
    found, whole = contents(result.output), contents(expected.output)
    assert {name for name in whole if found.get(name) != whole[name]} <= {"model.safetensors"}
    merged, wanted = cfmerge.open(result.output), cfmerge.open(expected.output)
    for name, array in wanted.items():  # some processors solve matrices that are stacked otherwise to other last bits
        close = 1e-5 * np.abs(array).max() if name.endswith("_proj.weight") else 0
        np.testing.assert_allclose(merged[name], array, rtol=0, atol=close)
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
