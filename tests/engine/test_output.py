"""The output appears whole or not at all: kill, interrupt, crash at every line, full disk."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats.staged import LOCK, StagedDirectory

# Runs `StagedDirectory` once for every line of it that is executed, and ends the process (or raises
# KeyboardInterrupt) at that line. Prints `line, what is there, what is there after the next run, names beside it`.
CRASH = """
import json, os, signal, sys, tempfile
import shutil
from pathlib import Path
from cfmerge.formats import staged as output

how, overwrite = sys.argv[1], sys.argv[2] == "overwrite"

def write(directory, text):
    directory.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_text(text)

def state(directory):
    files = {path.name: path.read_text() for path in directory.iterdir()} if directory.exists() else {}
    whole = set(files) - {output.LOCK} == {"config.json", "model.safetensors"} and len(set(files.values()) - {""}) == 1
    return files["config.json"] if whole else "absent" if not directory.exists() else f"broken {files}"

def run(target, stop_at):
    count = 0
    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename != output.__file__:
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    with output.StagedDirectory(target, overwrite=overwrite) as staged:
        write(staged.path, "new")
        staged.commit()
    sys.settrace(None)

results, stop_at, ended = [], 0, False
while not ended:
    stop_at += 1
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"
        if overwrite:
            write(target, "old")
        child = os.fork()
        if not child:
            try:
                run(target, stop_at)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        found = state(target)
        try:
            with output.StagedDirectory(target, overwrite=overwrite):
                pass
        except output.CfmergeError as error:
            assert "exists already" in str(error)
        results.append((stop_at, found, state(target), sorted(os.listdir(folder)),
                        (target / output.LOCK).exists()))
print(json.dumps(results))
"""


def python(script: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "new"])
def test_end_at_every_line(how, overwrite):
    """kill -9 (or Ctrl-C) at every line of the commit: the old model or the new one, and nothing beside it."""
    process = python(CRASH, how, "overwrite" if overwrite else "new")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    results = json.loads(out)
    assert len(results) > 30
    seen = set()
    for line, found, mended, beside, locked in results:
        message = f"stopped at event {line}: {found}, then {mended}, {beside}"
        seen.add(found)
        assert found in {"old", "new", "absent"}, message
        if overwrite:
            assert found != "absent" or how == "kill", message
            assert mended in {"old", "new"}, message
        else:
            assert mended == found, message
        assert beside == ([] if mended == "absent" else ["out"]), message
        assert not locked, message
    assert seen >= {"new", "old" if overwrite else "absent"}


def model(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "model.safetensors").write_text(text)
    return directory


def test_state_between_the_renames_is_mended(tmp_path):
    model(tmp_path / ".out.cfmerge-previous", "old")
    model(tmp_path / ".out.cfmerge-0123abcd", "new")
    with pytest.raises(CfmergeError, match="exists already"), StagedDirectory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/model.safetensors").read_text() == "old"


def test_state_after_the_renames_is_mended(tmp_path):
    model(tmp_path / ".out.cfmerge-previous", "old")
    model(tmp_path / "out", "new")
    (tmp_path / "out" / LOCK).touch()
    with pytest.raises(CfmergeError, match="exists already"), StagedDirectory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_text() == "new"


def test_an_empty_target_does_not_cost_the_old_model(tmp_path):
    model(tmp_path / ".out.cfmerge-previous", "old")
    (tmp_path / "out").mkdir()
    with pytest.raises(CfmergeError, match="exists already"), StagedDirectory(tmp_path / "out"):
        pass
    assert (tmp_path / "out/model.safetensors").read_text() == "old"


def test_a_running_merge_is_not_cleaned_away(tmp_path):
    """Only a staging directory that no process holds is stale; another target's are left alone."""
    others = [".out.cfmerge-x.cfmerge-0123abcd", ".outer.cfmerge-0123abcd", "out.cfmerge-0123abcd", ".out.cfmerge-mine"]
    for name in others:
        model(tmp_path / name, "other")
    with StagedDirectory(tmp_path / "out") as first:
        model_file = first.path / "model.safetensors"
        model_file.write_text("first")
        with StagedDirectory(tmp_path / "out") as second:
            assert first.path != second.path
        assert model_file.exists()
        first.commit()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "out"}


def test_names_with_special_characters(tmp_path):
    target = tmp_path / "out[1]*?"
    model(tmp_path / f".{target.name}.cfmerge-0123abcd", "stale")
    with StagedDirectory(target) as staged:
        (staged.path / "model.safetensors").write_text("new")
        staged.commit()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_link_stays_a_link(tmp_path):
    model(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to("v1")
    with StagedDirectory(tmp_path / "latest", overwrite=True) as staged:
        (staged.path / "model.safetensors").write_text("new")
        staged.commit()
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1/model.safetensors").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "latest"}


# --- a merge that is cut off --------------------------------------------------------------------------------------

# The command line with a callback that dwells where the given share has been read.
SLOW = """
import contextlib, signal, sys, time
from cfmerge.cli import main, show

signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, it is ignored
share = float(sys.argv.pop(1))

@contextlib.contextmanager
def progress(total, *, json, quiet):
    read = 0
    def tell(name, count):
        nonlocal read
        before, read = read, read + count
        if before < share * total <= read:
            print("waiting", flush=True)
            time.sleep(2)
    yield tell

show.progress = progress
main()
"""


def cut_off(family, output: Path, share: float, number: int, *options: str) -> tuple[int, str]:
    """Starts a merge, sends it a signal when a share of the input has been read: `(exit code, stderr)`."""
    experts = [text for path in family.experts for text in ("-e", path)]
    process = python(SLOW, share, "merge", "--base", family.base, *experts, "-m", "average", "-o", output, *options)
    try:
        line = process.stdout.readline()
        assert line == "waiting\n", process.communicate()[1]
        process.send_signal(number)
        return process.wait(30), process.communicate()[1]
    finally:
        process.kill()


@pytest.mark.parametrize("share", [0.01, 0.6, 1.0])
def test_kill(family, tmp_path, share):
    """No final directory; the next merge to the same place cleans up and succeeds."""
    code, _ = cut_off(family, tmp_path / "out", share, signal.SIGKILL)
    assert code == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name != "in"]
    assert len(left) == 1
    assert left[0].startswith(".out.cfmerge-")
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_kill_with_overwrite(family, make_model, tmp_path, contents):
    before = contents(make_model(tmp_path / "out"))
    code, _ = cut_off(family, tmp_path / "out", 0.6, signal.SIGKILL, "--overwrite")
    assert code == -signal.SIGKILL
    assert contents(tmp_path / "out") == before
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(family, tmp_path, contents, number):
    before = contents(tmp_path)
    code, err = cut_off(family, tmp_path / "out", 0.6, number)
    assert code == 130
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert contents(tmp_path) == before


def test_error_in_the_callback(family, tmp_path, contents):
    before = contents(tmp_path)

    def fail(name, count):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out", progress=fail)
    assert contents(tmp_path) == before


def test_output_is_not_there_before_it_is_complete(family, tmp_path):
    seen = []
    cfmerge.merge(
        family.base, family.experts, "average", output=tmp_path / "out",
        progress=lambda name, count: seen.append((tmp_path / "out").exists()),
    )  # fmt: skip
    assert seen
    assert not any(seen)
    assert (tmp_path / "out").exists()


def test_permissions_are_those_of_new_files(family, tmp_path):
    cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode == (tmp_path / "file").stat().st_mode, path
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "directory").stat().st_mode


# --- the disk is full ---------------------------------------------------------------------------------------------


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def late(function, calls):
    """The function, which fails for want of space from some call on."""
    left = iter(range(calls))

    def limited(*arguments, **options):
        return full() if next(left, None) is None else function(*arguments, **options)

    return limited


FULL = {
    "when space is reserved": (os, "posix_fallocate", 0),
    "while the header is written": (os, "pwrite", 0),
    "while tensors are written": (os, "pwrite", 5),
    "while config.json is copied": (shutil, "copyfile", 0),
    "while the card is written": (Path, "write_text", 0),
    "when all is flushed": (os, "fsync", 2),
}


@pytest.mark.parametrize("moment", FULL)
def test_full_disk(family, refused, monkeypatch, moment, make_model, tmp_path):
    make_model(tmp_path / "out")  # and the old model stays
    owner, name, calls = FULL[moment]
    monkeypatch.setattr(owner, name, late(getattr(owner, name), calls))
    words = [str(tmp_path / "out"), "the disk is full", "nothing was written"]
    refused(words, family.base, family.experts, overwrite=True)


def test_file_size_limit(family, refused, tmp_path):
    """A real refusal of the kernel, in the middle of the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        refused([str(tmp_path / "out"), "File too large", "nothing was written"], family.base, family.experts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_space_is_known_beforehand(family, refused, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused([str(tmp_path), "GB are free"], family.base, family.experts)


@pytest.mark.parametrize("moment", ["when space is reserved", "while tensors are written", "when all is flushed"])
def test_full_disk_while_statistics_are_accumulated(family, monkeypatch, moment, tmp_path, contents):
    before = contents(tmp_path)
    owner, name, calls = FULL[moment]
    monkeypatch.setattr(owner, name, late(getattr(owner, name), calls))
    with pytest.raises(cfmerge.CfmergeError, match=r"the disk is full.*nothing was written"):
        cfmerge.accumulate(family.base, family.experts, "average", output=tmp_path / "sums")
    assert contents(tmp_path) == before


def test_too_little_space_for_statistics_is_known_beforehand(family, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(cfmerge.CfmergeError, match="GB are free"):
        cfmerge.accumulate(family.base, family.experts, "average", output=tmp_path / "sums")


# --- the staging directory ----------------------------------------------------------------------------------------


def test_the_same_plan_is_staged_in_the_same_directory_which_can_be_kept(family, tmp_path):
    plan = cfmerge.plan(family.base, family.experts, "average")
    assert plan.digest == cfmerge.plan(family.base, family.experts, "average").digest
    assert plan.digest != cfmerge.plan(family.base, family.experts, "task_arithmetic").digest
    with StagedDirectory(tmp_path / "out", digest=plan.digest, keep=True) as staged:
        (staged.path / "part").write_text("half")
        with pytest.raises(cfmerge.CfmergeError, match="another process writes this very merge"):
            plan.run(tmp_path / "out")
    assert (tmp_path / f".out.cfmerge-{plan.digest[:8]}" / "part").read_text() == "half"
    plan.run(tmp_path / "out")  # removes what was left, and is whole
    assert [path.name for path in tmp_path.glob(".out*")] == []
