"""A meeting of processes that write one output: a directory beside it, through which they tell each other plain values.

The file system is the one thing that they share in any case. So nothing is asked of a network or of devices, and a
process that is gone is known by its file, which stands still: JAX's own service would end the others with it, at once
and with a stack trace of C++.

    .NAME.cfmerge-00000000/     beside the output; the first process makes, locks and removes it
        NUMBER-ID               of each process that comes, named by chance
        ID/                     of this meeting, named as the first process
            peers               the processes' names
            NUMBER-ID           of each process; counts on while it lives. (A file that is made anew in the directory
                                makes a network file system look at it anew, too.)
            ATTEMPT-STEP-NAME-NUMBER    a value
            error-ATTEMPT       the error that all stop with: whoever makes the file first
            over-ATTEMPT-NUMBER, left-NUMBER
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError, StoppedError
from cfmerge.formats.packed import packed, unpacked
from cfmerge.formats.sinks import disk_errors
from cfmerge.formats.staged import LOCK, locked, place_of
from cfmerge.formats.told_errors import GO_ON, heard, told
from cfmerge.formats.whole import write_whole

NAME = "0" * 8  # like a staging directory without work, so that it is cleaned up like one
BEAT = 1.0  # seconds between two signs of life
GONE = 30.0  # seconds without a sign of life after which a process is gone
COME = 120.0  # seconds in which all must have come


class Meeting:
    """See `cfmerge.engine.processes.Processes`; a context.

    Args:
        output: the output that they write.
        number: of this process.
        count: of all.

    Raises:
        CfmergeError: on entering: the others do not come, or others write this output now.
    """

    def __init__(self, output: Path, number: int, count: int) -> None:
        self.number, self.count = number, count
        self._output, self._target = output, place_of(output)
        self._place = self._target.with_name(f".{self._target.name}.cfmerge-{NAME}")
        self._id = secrets.token_hex(8)
        self._lock: int | None = None
        self._new_parents = [parent for parent in self._target.parents if not parent.exists()]
        self._attempt, self._step, self._looked = 0, 0, 0.0
        self._heard: dict[int, BaseException] = {}  # by attempt
        self._signs: dict[int, tuple[bytes, float]] = {}  # of the others: the last sign of life, and since when
        self._room = self._place  # until all have come
        self._ending = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beat", daemon=True)

    # --- coming and leaving -------------------------------------------------------------------------------------------

    def __enter__(self) -> "Meeting":
        try:
            if self.number == 0:
                self._open()
            self._beating.start()
            self._peers = self._meet()
            self._room = self._place / self._peers[0]
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with contextlib.suppress(OSError):
                self._write(f"left-{self.number}", b"")
            if self.number == 0:
                self._wait_for_all("left")
        finally:
            self._close()

    def _open(self) -> None:
        self._place.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self._place)
        if self._lock is None:
            raise CfmergeError(f"output {self._output}: other processes write it now; wait for them")
        for path in self._place.iterdir():  # of a meeting that was killed
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self._place / self._id).mkdir()

    def _meet(self) -> list[str]:
        """The names of all processes by number."""
        until = time.monotonic() + COME
        while True:
            found = self._seen_by_first() if self.number == 0 else self._listed()
            if found:
                return found
            if time.monotonic() > until:
                who = "process 0 has" if self.number else "not all processes have"
                raise CfmergeError(
                    f"process {self.number} of {self.count}: {who} not come to {self._target.parent} in {COME:.0f} s. "
                    "Every process must run the same merge, and see the output's directory"
                )
            time.sleep(0.05)

    def _seen_by_first(self) -> list[str]:
        names = {0: self._id}
        for path in self._place.iterdir():
            number, dash, name = path.name.partition("-")
            if dash and number.isdecimal() and int(number) < self.count and "." not in name:  # not half written
                names.setdefault(int(number), name)
        if len(names) < self.count:
            return []
        peers = [names[number] for number in range(self.count)]
        write_whole(self._place / self._id / "peers", json.dumps(peers).encode())
        return peers

    def _listed(self) -> list[str]:
        for path in self._place.glob("*/peers"):
            with contextlib.suppress(OSError):
                peers = json.loads(path.read_bytes())
                if peers[self.number : self.number + 1] == [self._id]:
                    return peers
        return []

    def _close(self) -> None:
        self._ending.set()
        if self._beating.is_alive():
            self._beating.join()
        if self.number or self._lock is None:
            return
        shutil.rmtree(self._place, ignore_errors=True)
        os.close(self._lock)
        for parent in self._new_parents:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()

    # --- signs of life ------------------------------------------------------------------------------------------------

    def _sign(self, number: int, name: str) -> Path:
        return self._room / f"{number}-{name}"

    def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            with contextlib.suppress(OSError):  # the first process has not yet made the directory
                write_whole(self._sign(self.number, self._id), str(count).encode())
            if self._ending.wait(BEAT / 10 if self._room == self._place else BEAT):
                return

    def _lives(self, number: int) -> bool:
        try:
            now = self._sign(number, self._peers[number]).read_bytes()
        except OSError:
            now = b""
        before, since = self._signs.get(number, (b"", 0.0))
        if before != now or number not in self._signs:
            self._signs[number] = (now, time.monotonic())
            return True
        return time.monotonic() - since < GONE

    def check(self) -> None:
        """Raises the error that another process stops with, or that another process is gone."""
        if time.monotonic() - self._looked < 0.1:
            return
        self._looked = time.monotonic()
        for attempt in range(self._attempt + 1):
            if attempt not in self._heard and (self._room / f"error-{attempt}").exists():
                raise self._hear(attempt)
        for number in range(self.count):
            if number == self.number or self._has(f"left-{number}") or self._lives(number):
                continue
            raise StoppedError(f"process {number} of {self.count} is gone: no sign of life for {GONE:.0f} s", GO_ON)

    # --- values -------------------------------------------------------------------------------------------------------

    def gathered(self, name: str, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        self._step += 1
        key = f"{self._attempt}-{self._step}-{name}"
        try:
            content = packed(value)
        except TypeError as error:
            raise CfmergeError(f"{name}: processes cannot tell each other {error}; merge in one process") from None
        with disk_errors(self._output):
            self._write(f"{key}-{self.number}", content)
        return [unpacked(content if n == self.number else self._read(f"{key}-{n}", n)) for n in range(self.count)]

    def _read(self, name: str, number: int) -> bytes:
        for pause in _pauses():
            left = self._has(f"left-{number}")
            with contextlib.suppress(FileNotFoundError):
                return (self._room / name).read_bytes()
            self.check()
            if left:
                raise StoppedError(f"process {number} of {self.count} has ended before the others", GO_ON)
            time.sleep(pause)
        raise AssertionError

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self._room / name, content)

    def _has(self, name: str) -> bool:
        return (self._room / name).exists()

    # --- errors and attempts ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begins another attempt at the merge."""
        self._attempt, self._step = self._attempt + 1, 0

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A context whose errors all processes stop with."""
        try:
            yield
        except BaseException as error:
            agreed = self._agreed(error)
            if agreed is error:
                raise
            raise agreed from None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """The same; the first process leaves it when all have."""
        try:
            with self.telling():
                yield
        finally:
            with contextlib.suppress(OSError):
                self._write(f"over-{self._attempt}-{self.number}", b"")
            if self.number == 0:
                self._wait_for_all(f"over-{self._attempt}")

    def _wait_for_all(self, name: str) -> None:
        """Waits for a file of every process that lives."""
        for number in range(1, self.count):
            for pause in _pauses():
                if self._has(f"{name}-{number}") or self._has(f"left-{number}") or not self._lives(number):
                    break
                time.sleep(pause)

    def _agreed(self, error: BaseException) -> BaseException:
        """The error that all stop with: this one, or that of a process which was faster."""
        if self._attempt in self._heard:
            return error
        try:
            with (self._room / f"error-{self._attempt}").open("x") as file:
                file.write(json.dumps(told(error, self.number, self.count)) + "\n")
        except FileExistsError:
            return self._hear(self._attempt)
        except OSError:  # the directory is gone: nobody is there to hear it
            pass
        self._heard[self._attempt] = error
        return error

    def _hear(self, attempt: int) -> BaseException:
        for pause in _pauses():
            text = (self._room / f"error-{attempt}").read_text()
            if text.endswith("\n"):
                break
            time.sleep(pause)  # it is being written
        self._heard[attempt] = heard(json.loads(text))
        return self._heard[attempt]


def _pauses() -> Iterator[float]:
    pause = 0.005
    while True:
        yield pause
        pause = min(1.5 * pause, 0.2)
