"""A directory that appears under its final name only when it is complete."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from cfmerge.errors import CfmergeError

LOCK = ".lock"


class StagedDirectory:
    """`with StagedDirectory(target) as staged:` write into `staged.path`, then `staged.commit()`.

    The staging directory lies beside the target and is locked while its process lives. Without a commit it is
    removed; what a killed process left behind is removed by the next merge to the same target. With `overwrite`
    the old directory is set aside until the new one is in place; a kill between the two is mended likewise.

    Raises:
        CfmergeError: the target exists (without `overwrite`), is not a model directory, or holds an input.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()):
        self.target = Path(os.path.abspath(target.expanduser()))
        self.overwrite = overwrite
        self.inputs = [path.resolve() for path in inputs]
        self._prefix = f".{self.target.name}.cfmerge-"
        self._previous = self.target.with_name(self._prefix + "previous")
        self.path = self.target.with_name(self._prefix + secrets.token_hex(4))
        self._lock: int | None = None

    def __enter__(self) -> "StagedDirectory":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._clean()
        self.check()
        self.path.mkdir()
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def check(self) -> None:
        """Raises `CfmergeError` if the target may not be written."""
        resolved = self.target.resolve()
        for path in self.inputs:
            if path == resolved or path.is_relative_to(resolved):
                raise CfmergeError(f"output {self.target}: holds an input of this merge ({path}); name another")
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return
        if not self.overwrite:
            raise CfmergeError(f"output {self.target}: exists already; name another, or pass --overwrite")
        models = self.target.is_dir() and any(
            next(self.target.glob(pattern), None) for pattern in ("*.safetensors", "*.safetensors.index.json")
        )
        if not models:
            raise CfmergeError(
                f"output {self.target}: exists and is not a directory with a model; it is not overwritten"
            )

    def commit(self) -> None:
        """Gives the directory its final name; after a crash at any moment either the old or the new one is there."""
        (self.path / LOCK).unlink()
        for file in self.path.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(self.path)
        if self.target.is_dir() and any(self.target.iterdir()):
            os.rename(self.target, self._previous)
        os.rename(self.path, self.target)
        _sync(self.target.parent)
        shutil.rmtree(self._previous, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _clean(self) -> None:
        """Mends what a killed process left: its staging directory, and a target that was set aside."""
        if self._previous.exists():
            if self.target.exists():
                shutil.rmtree(self._previous, ignore_errors=True)
            else:
                os.rename(self._previous, self.target)
        for stale in self.target.parent.glob(self._prefix + "*"):
            with contextlib.suppress(OSError):
                lock = os.open(stale / LOCK, os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(stale, ignore_errors=True)
                finally:
                    os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
