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
    """How many units are in a journal, behind its header, if there is one and its header is whole."""
    return max((max(len(trusted(staging / JOURNAL)) - 1, 0) for staging in left(folder)), default=0)


def wait_for(units: int, folder: Path, process: subprocess.Popen) -> None:
    """Waits until so many units are in the journal, or the process has ended."""
    while marked(folder) < units and process.poll() is None:
        time.sleep(0.0005)


def test_killed_at_50_moments_it_goes_on_to_the_same_bytes(family, tmp_path, contents):
    """40 of them behind the first unit that is in the journal, 10 at any moment before."""
    expected = contents(cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "whole" / "out").output)
    pick, folder = random.Random(0), tmp_path / "runs"
    folder.mkdir()
    started = time.monotonic()
    process = merging(family, folder / "out")
    wait_for(1, folder, process)
    before = time.monotonic() - started
    assert process.wait() == 0
    shutil.rmtree(folder / "out")
    early, late = [], []
    while len(early) < 10 or len(late) < 40:
        process = merging(family, folder / "out")
        if len(late) < 40:
            wait_for(pick.randrange(1, 54), folder, process)
            time.sleep(pick.uniform(0, 0.01))
        else:
            time.sleep(pick.uniform(0, 0.95 * before))
        process.send_signal(signal.SIGKILL)
        process.wait()
        was, complete = marked(folder), (folder / "out").exists()
        if not complete:  # it was faster than the kill
            (late if was else early).append(was)
            result = cfmerge.merge(family.base, family.experts, "average", output=folder / "out")
            assert bool(result.resumed) == bool(was)
        assert contents(folder / "out") == expected
        assert left(folder) == []
        shutil.rmtree(folder / "out")
    print(f"killed {len(early)} times before the first unit was in the journal, and {len(late)} behind it: {late}")
    assert len(set(late)) > 10


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
