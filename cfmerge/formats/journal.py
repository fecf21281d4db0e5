"""The journal of a merge as a file in its staging directory: a line for the header, then one for all that is done.

    CRC {"digest": ..., "versions": ..., "entries": ..., ...}
    CRC {"ranges": [[tensor, first, count], ...], "told": ...}         written and synced before the line is
    CRC {"key": ..., "value": ...}                                     remembered: totals of a survey, packed, in base64

Of several processes the first writes this file, and each other one a file of its own beside it, with its number, under
the same header. The next run adds their lines to the first's, and removes them.

The CRC is that of the line's JSON. A line that is cut off or damaged ends what is trusted, and is written over. Of a
sweep every staging directory holds the same journal, and the lines that all of them hold are trusted.
"""

import base64
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cfmerge.formats.packed import packed, unpacked
from cfmerge.formats.ranges import Covered, Range
from cfmerge.formats.sinks import disk_errors
from cfmerge.formats.staged import JOURNAL, journals, staging_directories, sync

EVERY = 1.0  # seconds of work that a kill may cost: so often data are synced, and their lines appended


class FileJournal:
    """A journal in staging directories; see `cfmerge.engine.journal.Journal` for its calls.

    `read` gives the header that is there, if all directories hold the same one. Then `begin` starts anew, or `go_on`
    trusts the lines; a process that is not the first calls `join`. Lines are kept back until `sync`, which is given to
    these, has made their data safe.

    Args:
        output: as the user named it, for messages.
        directories: the staging directories.
        process: the number of this process.
    """

    def __init__(self, output: Path, directories: Sequence[Path], process: int = 0) -> None:
        self._output, self._directories, self._process = output, list(directories), process
        self.files = [directory / (f"{JOURNAL}-{process}" if process else JOURNAL) for directory in directories]
        self._empty({})
        self.written = Covered()  # by this run, whether safe or not
        self._pending: list[dict[str, Any]] = []
        self._since: float | None = None  # when lines were last written, or were first kept back
        self._sync: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def _empty(self, header: dict[str, Any]) -> None:
        self.header = header
        self.kept = 0  # lines behind the header that are in the files
        self.covered = Covered()  # by earlier runs
        self.safe = Covered()  # by earlier runs and this one
        self._told: list[Any] = []
        self._values: dict[str, Any] = {}

    # --- the file -----------------------------------------------------------------------------------------------------

    def read(self) -> dict[str, Any] | None:
        """The header of the journal that is there; None: there is none, or it is damaged."""
        headers = [next(iter(trusted(file)), None) for file in self._first]
        return headers[0] if headers and all(header == headers[0] for header in headers) else None

    def begin(self, header: dict[str, Any], sync: Callable[[], None]) -> None:
        """An empty journal with that header."""
        self._empty(header)
        self._sync = sync
        with disk_errors(self._output):
            for file in self.files:
                file.write_bytes(_line(header))

    def go_on(self, sync: Callable[[], None]) -> None:
        """The journal that is there; lines that are not trusted are cut off."""
        lines = _common([trusted(file) for file in self._first])
        others = self._of_others(lines[0])
        with disk_errors(self._output):
            for file in self.files:
                os.truncate(file, sum(len(_line(line)) for line in lines))
                _append(file, b"".join(map(_line, others)))
            for file in (file for directory in self._directories for file in journals(directory)[1:]):
                file.unlink()
        self._trust([*lines, *others], sync)

    def join(self, sync: Callable[[], None]) -> None:
        """The journal that the first process has begun or gone on with, to which this one adds."""
        lines = _common([trusted(file) for file in self._first])
        with disk_errors(self._output):
            for file in self.files:
                file.write_bytes(_line(lines[0]))
        self._trust(lines, sync)
        self.kept = 0

    def hear(self) -> None:
        """Takes note of all that the other processes have kept."""
        others = self._of_others(self.header)
        self.kept += len(others)
        for one in (one for line in others for one in line.get("ranges", ())):
            self.safe.add(*one)

    @property
    def _first(self) -> list[Path]:
        return [directory / JOURNAL for directory in self._directories]

    def _of_others(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of the other processes' journals with that header."""
        names = sorted({file.name for directory in self._directories for file in journals(directory)} - {JOURNAL})
        found = [_common([trusted(directory / name) for directory in self._directories]) for name in names]
        return [line for lines in found if lines[:1] == [header] for line in lines[1:]]

    def _trust(self, lines: Sequence[dict[str, Any]], sync: Callable[[], None]) -> None:
        self.header, self._sync, self.kept = lines[0], sync, len(lines) - 1
        for line in lines[1:]:
            if "ranges" in line:
                self._told.append(line["told"])
                for one in line["ranges"]:
                    self.covered.add(*one)
                    self.safe.add(*one)
            else:
                self._values[line["key"]] = unpacked(base64.b64decode(line["value"]))

    # --- what the loop asks and tells ---------------------------------------------------------------------------------

    def done(self, ranges: Sequence[Range]) -> bool:
        return all(self.covered.holds(*one) for one in ranges)

    def told(self) -> Sequence[Any]:
        return self._told

    def recall(self, key: str) -> Any:
        return self._values.get(key)

    def mark(self, ranges: Sequence[Range], told: Any = None) -> None:
        for one in ranges:
            self.written.add(*one)
        self._add({"ranges": [list(one) for one in ranges], "told": told})

    def remember(self, key: str, value: Any) -> None:
        if self._process:  # the first does
            return
        try:
            self._add({"key": key, "value": base64.b64encode(packed(value)).decode()})
        except TypeError:  # a survey's own kind of container: its pass is made again
            return

    def _add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._pending.append(line)
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if now - self._since >= EVERY:
                with disk_errors(self._output):
                    self._flush()

    def _flush(self) -> None:
        """Makes the data safe that the lines are about, then the lines."""
        self._sync()
        if not self.kept:  # the files' names too
            for file in self.files:
                sync(file.parent)
                sync(file.parent.parent)
        content = b"".join(map(_line, self._pending))
        for file in self.files:
            _append(file, content)
        for one in (one for line in self._pending for one in line.get("ranges", ())):
            self.safe.add(*one)
        self.kept, self._pending, self._since = self.kept + len(self._pending), [], time.monotonic()


def found_beside(target: Path) -> Iterator[dict[str, Any]]:
    """The headers of the journals that earlier merges to a target have left."""
    for staging in staging_directories(target):
        yield from trusted(staging / JOURNAL)[:1]


def trusted(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is cut off or damaged; none where there is no journal."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    lines = []
    for line in content.split(b"\n")[:-1]:
        check, _, text = line.partition(b" ")
        if check != _check(text):
            break
        lines.append(json.loads(text))
    return lines


def _common(journals: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines that all of them begin with."""
    one, shortest = journals[0], min(map(len, journals))
    return next(one[:n] for n in range(shortest, -1, -1) if all(other[:n] == one[:n] for other in journals))


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return _check(text) + b" " + text + b"\n"


def _check(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _append(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        sync_data(descriptor)
    finally:
        os.close(descriptor)


def sync_data(descriptor: int) -> None:
    """Flushes the data of an open file to the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)
