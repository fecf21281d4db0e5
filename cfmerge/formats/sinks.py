"""Sinks of merged models: a directory that lies as its base does, or one file, in its format or in another.

Both appear whole or not at all, and turn errors of the disk into `CfmergeError`s.
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError, StoppedError
from cfmerge.formats.base import Folder, Header, Totals, bytes_of
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.ranges import Covered, Range
from cfmerge.formats.shards import Writer, save
from cfmerge.formats.side_files import TENSORS
from cfmerge.formats.staged import StagedDirectory, staging_directories

HEADS = "heads"  # the directory of exported heads in the output
UNBOUNDED = 1 << 62
FORMAT = {"format": "pt"}
FILES = {*TENSORS, ".json", ".zip", ".tar", ".gz", ".tgz", ".yaml", ".yml", ".md", ".npy", ".pkl", ".onnx_data"}


class DirectorySink:
    """A model's directory: shards and index of every folder, side files, heads, README.md.

    Args:
        target: the directory that appears.
        folders: how the files lie; `source.folders` of the base.
        shard_bytes: how large a shard becomes at most.
        side_files: `{name in the directory: path}`, copied when the tensors are written.
        edits: `{name of a JSON side file: {key: value}}`, set in the copy; taken out where the value is None.
        metadata: entries for every file of tensors, beside those of its folder.
        overwrite, digest, keep, resume, join: see `StagedDirectory`.
        inputs: files and directories that are read, and so not written into.
    """

    def __init__(
        self,
        target: Path,
        folders: Sequence[Folder] = (Folder(),),
        *,
        shard_bytes: int = 5 * 10**9,
        side_files: Mapping[str, Path] | None = None,
        edits: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, str] = FORMAT,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
        digest: str = "",
        keep: bool = False,
        resume: bool = False,
        join: bool = False,
    ):
        self.notes: tuple[str, ...] = ()
        self._folders = sorted(folders, key=lambda folder: len(folder.prefix), reverse=True)
        self._side_files, self._edits = dict(side_files or {}), dict(edits or {})
        self._shard_bytes, self._metadata = shard_bytes, dict(metadata)
        self._writers: dict[str, Writer] = {}  # by the prefix of their folder
        self._folder_of: dict[str, Folder] = {}
        self._copies: dict[str, list[str]] = {}  # {name: further names, that are written too}
        how = {"overwrite": overwrite, "inputs": inputs, "digest": digest, "keep": keep, "resume": resume, "join": join}
        self._staged = self._stage(target, **how)
        self.target = self._staged.target
        self._asked = target  # as the user named it, for messages

    def _stage(self, target: Path, **how: Any) -> StagedDirectory:
        check_directory_name(target)
        return StagedDirectory(target, **how)

    @property
    def path(self) -> Path:
        """The output's place until it is committed."""
        return self._staged.path

    def __enter__(self) -> "DirectorySink":
        with disk_errors(self._asked):
            self._staged.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def keep(self, wanted: bool) -> None:
        """Says whether what is written stays in the staging directory if there is no commit."""
        self._staged.keep = wanted

    def declare(self, headers: Mapping[str, Header], done: Covered | None = None) -> None:
        """See `Sink`.

        Args:
            done: ranges that an earlier run has written into the staging directory; none: it is emptied.

        Raises:
            Unfit: its files are not those of an earlier run.
        """
        with disk_errors(self._asked):
            self._close()
            if done is None:
                self._staged.clear()
                _check_space(self._staged, headers)
            headers = self._with_copies(headers)
            self._folder_of = {name: self._find_folder(name) for name in headers}
            for folder in self._folders:
                mine = {
                    name.removeprefix(folder.prefix): header
                    for name, header in headers.items()
                    if self._folder_of[name] is folder
                }
                if mine:
                    self._writers[folder.prefix] = self._open(folder, mine, done)

    def _with_copies(self, headers: Mapping[str, Header]) -> dict[str, Header]:
        """The headers, and those of further names of tensors, in formats that write each name by itself."""
        self._copies = {}
        named = dict(headers)
        for folder in self._folders:
            ties = {} if FORMATS[folder.format].shares else folder.ties
            for alias, name in ((folder.prefix + alias, folder.prefix + name) for alias, name in ties.items()):
                if name in headers and alias not in headers:
                    self._copies.setdefault(name, []).append(alias)
                    named[alias] = headers[name]
        return named

    def _all_names(self, ranges: Iterable[Range]) -> Iterator[Range]:
        for name, first, count in ranges:
            yield from ((own, first, count) for own in (name, *self._copies.get(name, ())))

    def _find_folder(self, name: str) -> Folder:
        return next(folder for folder in self._folders if name.startswith(folder.prefix))

    def _open(self, folder: Folder, headers: Mapping[str, Header], done: Covered | None) -> Writer:
        place = self.path / folder.name
        place.mkdir(parents=True, exist_ok=True)
        size = total_bytes(headers)
        if not folder.sharded and size > self._shard_bytes:
            note = (
                f"{folder.stem}{folder.suffix} is one file of {size / 1e9:.2f} GB, as in the base, whatever "
                "--shard-size says: no client looks for an index of that name"
            )
            self.notes += () if note in self.notes else (note,)
        most = self._shard_bytes if folder.sharded else UNBOUNDED
        if done is not None:
            ranges = [one for one in self._all_names(done.ranges()) if self._folder_of.get(one[0]) is folder]
            done = Covered((name.removeprefix(folder.prefix), first, count) for name, first, count in ranges)
        metadata = {**self._metadata, **folder.metadata}
        index = None if self._staged.join else folder.index
        write = FORMATS[folder.format].write
        return write(place, headers, most, folder, metadata=metadata, index=index, done=done)

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        with disk_errors(self._asked):
            for own in (name, *self._copies.get(name, ())):
                prefix = self._folder_of[own].prefix
                self._writers[prefix].write(own.removeprefix(prefix), values, first)

    def covers(self, ranges: Iterable[Range]) -> None:
        """Takes note of ranges that another process has written."""
        for name, first, count in self._all_names(ranges):
            prefix = self._folder_of[name].prefix
            self._writers[prefix].covers([(name.removeprefix(prefix), first, count)])

    def sync(self) -> None:
        """Makes safe on the disk what is written so far."""
        with disk_errors(self._asked):
            for writer in self._writers.values():
                writer.sync()

    def finish(self, totals: Totals) -> None:
        with disk_errors(self._asked):
            shutil.rmtree(self.path / HEADS, ignore_errors=True)  # of an earlier run, half written
            for writer in self._writers.values():
                writer.close()
            for name, source in self._side_files.items():
                self._copy(name, source)
            for expert, tensors in totals.heads:
                (self.path / HEADS).mkdir(exist_ok=True)
                save(self.path / HEADS, tensors, FORMAT, expert)
            for name, text in {**totals.files, **({"README.md": totals.card} if totals.card else {})}.items():
                (self.path / name).write_text(text)

    def _copy(self, name: str, source: Path) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in self._edits:
            edits = self._edits[name]
            content = json.loads(source.read_text()) | edits
            content = {key: value for key, value in content.items() if key not in edits or value is not None}
            target.write_text(json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(source, target)

    def commit(self) -> None:
        with disk_errors(self._asked):
            self._staged.commit()

    def abort(self) -> None:
        self._close()
        self._staged.__exit__(None, None, None)

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.abort()
        self._writers = {}


def check_directory_name(target: Path) -> None:
    """Raises `CfmergeError` if the name is that of a file, so that a directory of that name would be a surprise."""
    if target.suffix.lower() in FILES and not target.is_dir():
        raise CfmergeError(
            f"output {target}: would be a directory, and {target.suffix} is the ending of a file; name a directory, "
            "or, for a merged model in one file, NAME.safetensors, .pt, .msgpack or .npz"
        )


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Errors of the file system as `StoppedError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = "the disk is full" if full else f"{error.strerror or error}"
        place = f" ({error.filename})" if error.filename else ""
        raise StoppedError(f"output {output}: {reason}{place}") from None


def total_entries(headers: Mapping[str, Header]) -> int:
    return sum(math.prod(shape) for shape, _ in headers.values())


def total_bytes(headers: Mapping[str, Header]) -> int:
    return sum(map(bytes_of, headers.values()))


def _check_space(staged: StagedDirectory, headers: Mapping[str, Header]) -> None:
    needed, free = total_bytes(headers), shutil.disk_usage(staged.path).free
    if needed > free:
        others = [path for path in staging_directories(staged.target) if path != staged.path]
        hint = "; `cfmerge clean` removes what an earlier merge has left there" if others else ""
        raise CfmergeError(
            f"output {staged.target}: it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in "
            f"{staged.target.parent}; nothing was written{hint}"
        )
