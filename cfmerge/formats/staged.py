"""A directory, or a file, that appears under its final name only when it is complete."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from cfmerge.errors import CfmergeError

LOCK = ".cfmerge-lock"
JOURNAL = ".cfmerge-journal"  # of what is done, see `journal.py`
STAGING = re.compile(r"\.(.+)\.cfmerge-[0-9a-f]{8}", re.DOTALL)  # the name of a staging directory, with its target's
# A directory that holds one of these is a model: files of weights, or a checkpoint of Orbax or torch.distributed
MODELS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*pytorch_model*.bin",
    "*pytorch_model*.bin.index.json",
    "*flax_model*.msgpack",
    "_CHECKPOINT_METADATA",
    "orbax.checkpoint",
    "*.distcp",
)


class StagedDirectory:
    """`with StagedDirectory(target) as staged:` write into `staged.path`, then `staged.commit()`.

    The staging directory lies beside the target and is locked while its process lives. Without a commit it is
    removed. What a killed process has left is taken up by the same work, and removed by other work to the same target:
    at its start if there is no work in it, else when it has made the target. With `overwrite` the old directory is set
    aside until the new one is in place; a kill between the two is mended likewise.

    Args:
        target: the final name.
        overwrite: a model that is there is replaced.
        inputs: files and directories that are read.
        digest: a name for the staging directory, in hexadecimal digits: the same work finds it again; none: by chance.
        keep: without a commit it is left where it is.
        resume: where the same work has left its staging directory, it is taken up as it is, and kept if it holds work.
        join: another process has made it; this one writes into it, and neither locks nor removes anything.

    Raises:
        CfmergeError: the target exists (without `overwrite`), is not a model directory, holds an input, or lies
            in one; or another process writes the same digest to it now.
    """

    kind = "a directory with a model"

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
        digest: str = "",
        keep: bool = False,
        resume: bool = False,
        join: bool = False,
    ):
        self.target = place_of(target)
        self.overwrite = overwrite
        self.inputs = {Path(os.path.abspath(path.expanduser())) for path in inputs}
        self.inputs |= {path.resolve() for path in self.inputs}
        prefix = f".{self.target.name}.cfmerge-"
        self._previous = self.target.with_name(prefix + "previous")
        self.path = self.target.with_name(prefix + (digest[:8] or secrets.token_hex(4)))
        self.keep, self.resume, self.join = keep, resume, join
        self._lock: int | None = None
        self._new_parents = [parent for parent in self.target.parents if not parent.exists()]

    def __enter__(self) -> "StagedDirectory":
        if self.join:
            return self
        if not self._new_parents:
            self._mend()
            self._clean(only_empty=True)
        self.check()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock = locked(self.path)
        if self._lock is None:
            raise CfmergeError(f"output {self.target}: another process writes this very merge there now; wait for it")
        if self.resume:
            self.keep = self.keep or holds_work(self.path)  # whatever comes before it is gone on with
        else:
            self.clear()
        return self

    def clear(self) -> None:
        """Removes everything that an earlier run has left in the staging directory."""
        for path in self.path.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check(self) -> None:
        """Raises `CfmergeError` if the target may not be written."""
        for target in {self.target, self.target.resolve()}:
            for path in self.inputs:
                if path.is_relative_to(target):
                    raise CfmergeError(f"output {self.target}: holds an input of this merge ({path}); name another")
                if target.is_relative_to(path):
                    raise CfmergeError(f"output {self.target}: lies in an input of this merge ({path}); name another")
        if self._is_free():
            return
        if not self.overwrite:
            raise CfmergeError(f"output {self.target}: exists already; name another, or pass --overwrite")
        if not self._may_be_replaced():
            raise CfmergeError(f"output {self.target}: exists and is not {self.kind}; it is not overwritten")

    def _is_free(self) -> bool:
        return not self.target.exists() or _is_empty(self.target)

    def _may_be_replaced(self) -> bool:
        """Whether the target is a model: a mistyped output does not cost a home directory."""
        patterns = [*MODELS]
        if any((self.target / name).is_file() for name in ("modules.json", "model_index.json")):
            patterns += [f"*/{pattern}" for pattern in MODELS]
        return self.target.is_dir() and any(next(self.target.glob(pattern), None) for pattern in patterns)

    def commit(self) -> None:
        """Gives the directory its final name; after a crash at any moment either the old or the new one is there."""
        _sync_all(self.path)
        if self.target.is_dir() and not _is_empty(self.target):
            os.rename(self.target, self._previous)
        os.rename(self.path, self.target)
        for path in _own(self.target):
            path.unlink(missing_ok=True)
        sync(self.target.parent)
        self._clean()
        shutil.rmtree(self._previous, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.join:
            return
        if not self.keep and self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._mend()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in self._new_parents:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()

    def _mend(self) -> None:
        """Finishes a `commit` that was cut off between its two renames, or after them."""
        if self._previous.exists():
            if self.target.exists() and not _is_empty(self.target):
                shutil.rmtree(self._previous, ignore_errors=True)
            else:
                os.rename(self._previous, self.target)
        for path in _own(self.target):
            with contextlib.suppress(OSError):
                path.unlink()

    def _clean(self, only_empty: bool = False) -> None:
        """Removes the staging directories that killed processes have left of other work."""
        for stale in staging_directories(self.target):
            if stale != self.path and not (only_empty and holds_work(stale)):
                removed(stale)


class StagedFile(StagedDirectory):
    """The same for one file: write `staged.path / staged.target.name`, then `staged.commit()`."""

    kind = "a file"

    def _is_free(self) -> bool:
        return not self.target.exists()

    def _may_be_replaced(self) -> bool:
        return self.target.is_file()

    def commit(self) -> None:
        """Gives the file its final name: the old one or the new one is there, whenever the process ends."""
        _sync_all(self.path)
        os.replace(self.path / self.target.name, self.target)
        sync(self.target.parent)
        self.keep = False
        self._clean()


def place_of(target: Path) -> Path:
    """The absolute path of a target; where it is a link, of what it links to."""
    absolute = Path(os.path.abspath(target.expanduser()))
    return absolute.resolve() if absolute.is_symlink() else absolute


def staging_directories(target: Path) -> list[Path]:
    """All staging directories that there are of a target."""
    place = place_of(target)
    if not place.parent.is_dir():
        return []
    named = ((path, STAGING.fullmatch(path.name)) for path in sorted(place.parent.iterdir()))
    return [path for path, match in named if match and match[1] == place.name and path.is_dir()]


def locked(staging: Path) -> int | None:
    """The lock of a staging directory, an open file; None: another process holds it, or has removed the directory."""
    try:
        lock = os.open(staging / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def journals(staging: Path) -> list[Path]:
    """The journals that are there: the first process's, and behind it those of others."""
    return sorted(staging.glob(f"{JOURNAL}*"))


def holds_work(staging: Path) -> bool:
    """Whether a journal has more than a header."""
    try:
        return any(file.read_bytes().count(b"\n") > 1 for file in journals(staging))
    except OSError:
        return False


def _own(directory: Path) -> list[Path]:
    """Files that are no part of the output."""
    return [directory / LOCK, *journals(directory)]


def removed(staging: Path) -> bool:
    """Removes a staging directory, unless a process holds it; whether it did."""
    with contextlib.suppress(OSError):
        lock = locked(staging)
        if lock is not None:
            try:
                shutil.rmtree(staging)
                return True
            finally:
                os.close(lock)
    return False


def _sync_all(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)
    sync(directory)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def sync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
