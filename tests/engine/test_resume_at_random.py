"""Merges that end at any moment, journals that are damaged anywhere, a disk that is really full: `pytest -m long`."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cfmerge
from cfmerge.engine import cutting
from cfmerge.errors import StoppedError
from cfmerge.formats import journal as journals
from cfmerge.formats.journal import JOURNAL, trusted

pytestmark = pytest.mark.long
ENTRIES = 16
MERGE = f"""
import sys
import cfmerge
from cfmerge.engine import cutting
from cfmerge.formats import journal
cutting.ENTRIES, journal.EVERY = {ENTRIES}, 0.0
base, *experts, output = sys.argv[1:]
cfmerge.merge(base, experts, "average", output=output)
"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """As in the processes that are killed."""
    monkeypatch.setattr(cutting, "ENTRIES", ENTRIES)
    monkeypatch.setattr(journals, "EVERY", 0.0)


def merging(family, output: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", MERGE, *map(str, (family.base, *family.experts, output))])


def left(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.cfmerge-*"))


def marked(folder: Path) -> int:
    """How many units are in a journal, if there is one."""
    return max((len(trusted(staging / JOURNAL)) - 1 for staging in left(folder)), default=0)


def first_marked(folder: Path, process: subprocess.Popen) -> None:
    """Waits until a unit is in the journal, or the process has ended."""
    while marked(folder) < 1 and process.poll() is None:
        time.sleep(0.001)


def test_killed_at_50_moments_it_goes_on_to_the_same_bytes(family, tmp_path, contents):
    """10 of them before the first unit is in the journal, 40 behind it; some are killed twice."""
    expected = contents(cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "whole" / "out").output)
    pick, folder = random.Random(0), tmp_path / "runs"
    folder.mkdir()
    started = time.monotonic()
    process = merging(family, folder / "timed")
    first_marked(folder, process)
    before = time.monotonic() - started
    assert process.wait() == 0
    behind = time.monotonic() - started - before
    early, late, resumed = 0, 0, []
    while early + late < 50:
        output, wants_late = folder / f"out{early}-{late}-{len(resumed)}", late < 40
        process = merging(family, output)
        if wants_late:
            first_marked(folder, process)
            time.sleep(pick.uniform(0, 0.7 * behind))
        else:
            time.sleep(pick.uniform(0.3 * before, 0.9 * before))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:  # it was faster
            shutil.rmtree(output)
            continue
        was = marked(folder)
        early, late = (early, late + 1) if was else (early + 1, late)
        result = cfmerge.merge(family.base, family.experts, "average", output=output, overwrite=True)
        assert bool(result.resumed) == bool(was)
        assert contents(output) == expected
        assert left(folder) == []
        resumed.append(was)
        shutil.rmtree(output)
    print(f"killed {early} times before the first unit was in the journal and {late} times behind it, at {resumed}")
    assert late >= 40
    assert len(set(resumed)) > 10


def stopped_half_way(family, output: Path, after: int = 20) -> Path:
    """The staging directory of a merge that was interrupted when about so many units were in the journal."""

    def interrupt(name, count):
        if marked(output.parent) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cfmerge.merge(family.base, family.experts, "average", output=output, progress=interrupt)
    (staging,) = left(output.parent)
    return staging


def test_a_journal_with_flipped_bits_never_gives_other_bytes(family, tmp_path, contents):
    expected = contents(cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "whole" / "out").output)
    staging = stopped_half_way(family, tmp_path / "out")
    shutil.copytree(staging, tmp_path / "copy")
    shares = set()
    for seed in range(100):
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(tmp_path / "copy", staging)
        pick, content = random.Random(seed), bytearray((staging / JOURNAL).read_bytes())
        for _ in range(pick.choice([1, 1, 2, 8])):
            content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
        (staging / JOURNAL).write_bytes(content)
        result = cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "out")
        shares.add(result.resumed)
        assert contents(result.output) == expected
        shutil.rmtree(result.output)
    assert len(shares) > 5


def test_a_disk_that_is_full_and_then_has_room(family, tmp_path, contents):
    """A file system of its own is filled while the merge runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        expected = contents(cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "w" / "out").output)
        filler = disk / "filler"

        def fill(name, count):
            if marked(disk) >= 5 and not filler.exists():
                with filler.open("wb", 0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass

        with pytest.raises(StoppedError, match=r"(?s)the disk is full.*cfmerge clean"):
            cfmerge.merge(family.base, family.experts, "average", output=disk / "out", progress=fill)
        assert marked(disk) >= 5
        with pytest.raises(StoppedError, match="the disk is full"):  # no room yet, and nothing is lost
            cfmerge.merge(family.base, family.experts, "average", output=disk / "out")
        filler.unlink()
        result = cfmerge.merge(family.base, family.experts, "average", output=disk / "out")
        assert result.resumed
        assert contents(result.output) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert os.listdir(disk) == []
