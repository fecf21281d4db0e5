"""What merges that ended early have left: their staging directories, listed and removed."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cfmerge.formats.journal import trusted
from cfmerge.formats.ranges import Covered
from cfmerge.formats.staged import STAGING, journals, locked, removed, staging_directories


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A staging directory that is there.

    Attributes:
        path: the staging directory.
        target: the output that it was to become.
        seconds: since something was last written there.
        size: bytes on the disk.
        done: the share of the merge that its journal tells of; 0 without a journal.
        held: whether a process works there now.
    """

    path: Path
    target: Path
    seconds: float
    size: int
    done: float
    held: bool

    def remove(self) -> bool:
        """Removes it, unless a process holds it; whether it did."""
        return removed(self.path)


def leftovers(place: Path) -> list[Leftover]:
    """What is left in a directory, and of merges to an output of that name."""
    inside = sorted(place.iterdir()) if place.is_dir() else []
    found = [path for path in inside if STAGING.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return [_told(path) for path in dict.fromkeys([*staging_directories(place), *found])]


def _told(staging: Path) -> Leftover:
    match = STAGING.fullmatch(staging.name)
    assert match is not None
    states = list(_states(staging))
    age = time.time() - max(state.st_mtime for state in states)
    size = sum(state.st_blocks * 512 for state in states)
    target = staging.with_name(match[1])
    return Leftover(staging, target, max(age, 0.0), size, _done(staging), _held(staging))


def _states(staging: Path) -> Iterator[os.stat_result]:
    for path in (staging, *staging.rglob("*")):
        with contextlib.suppress(OSError):  # a live merge has just committed
            yield path.lstat()


def _done(staging: Path) -> float:
    """The share of the merge that is done."""
    own = [trusted(file) for file in journals(staging)]
    header, lines = next((lines[0] for lines in own if lines), {}), [line for lines in own for line in lines[1:]]
    done = Covered((name, first, count) for line in lines for name, first, count in line.get("ranges", ()))
    return done.entries / max(header.get("entries", 0), 1)


def _held(staging: Path) -> bool:
    lock = locked(staging)
    if lock is None:
        return True
    os.close(lock)
    return False
