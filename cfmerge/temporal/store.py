"""A store: the directory that holds a protocol, the experts in their order, running models, and scores.

    STORE/time.json          all that is known of it, replaced whole
    STORE/base.json          {tensor: hash}, by which the base is known again
    STORE/base/              the base, where it came as a tree
    STORE/experts/0001-NAME  an expert, copied, or linked to where it lies
    STORE/states/            running models, see `states.py`
    STORE/init, STORE/deploy the models that were made last, unless they went elsewhere

Whatever a change writes lies complete in the store before `time.json` tells of it, and is removed after `time.json` has
forgotten it. So a stop at any moment leaves the store as it was before the change, or as it is after it.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, open_checkpoint
from cfmerge.formats.staged import STAGING
from cfmerge.temporal.prints import print_of, prints

BOOK, BASE = "time.json", "base.json"
VERSION = 1


class Expert(msgspec.Struct):
    """An expert: its task, its number (from 1, never given twice), and where it lies."""

    task: str
    number: int
    path: str  # in the store, or absolute for one that is linked
    linked: str = ""  # the hash of one that lies elsewhere
    gone: bool = False  # its tensors are no longer kept

    @property
    def key(self) -> str:
        safe = re.sub(r"[^\w.=-]+", "_", self.task)
        return f"{self.number:04d}-{safe[:80]}"


class State(msgspec.Struct):
    """A running model or statistics: what they hold, and of which experts.

    Attributes:
        rule: the text of the rule that it is for.
        kind: see `states.py`.
        path: in the store; "" where it is one expert as it is.
        through: the experts that are in it, in their order.
        coefficients: theirs, where it is a weighted sum.
        numbers: what else the next step needs.
        drift: how often rounding may have added up, in units of one rounding.
    """

    rule: str
    kind: str
    path: str
    through: list[int]
    coefficients: dict[int, float] = {}
    numbers: dict[str, list[float]] = {}
    drift: float = 1.0


class Book(msgspec.Struct):
    """All that a store knows, as `time.json` has it.

    Attributes:
        scores: `{number of the newest expert: {name: score}}` of the model that was deployed then; 0 is the base.
        options: of every merge, as a recipe has them.
    """

    base: str
    init: str
    deploy: str
    window: int | None = None
    keep: int | None = None
    tasks: list[str] = []
    held_out: list[str] = []
    trained: dict[str, list[str]] = {}
    options: dict[str, Any] = {}
    experts: list[Expert] = []
    states: list[State] = []
    scores: dict[int, dict[str, float]] = {}
    order: list[str] = []  # tasks by the experts' numbers, those that are forgotten too
    version: int = VERSION


class Store:
    """A store on disk; `Store.made` and `Store.opened` give it.

    Attributes:
        path: its directory.
        book: what it knows; `write` makes a change last.
    """

    def __init__(self, path: Path, book: Book) -> None:
        self.path, self.book = path, book
        self.leaving: Expert | None = None  # one that is being forgotten; its tensors are there
        self._base: Source | None = None

    @classmethod
    def made(cls, path: Path, book: Book) -> "Store":
        """A new store over a base.

        Raises:
            CfmergeError: there is something else at the path, or no base.
        """
        if path.exists() and (not path.is_dir() or set(map(_plain, path.iterdir())) - {"base", ""}):
            raise CfmergeError(f"store {path}: exists, and is no store (it has no {BOOK}); name another directory")
        source = open_checkpoint(_where(path, book.base))
        path.mkdir(parents=True, exist_ok=True)
        store = cls(path, book)
        _replace(path / BASE, msgspec.json.encode(prints(source)))
        store.write()
        return store

    @classmethod
    def opened(cls, path: Path) -> "Store":
        """The store at a path.

        Raises:
            CfmergeError: there is none, or its book cannot be read.
        """
        file = path / BOOK
        if not file.is_file():
            there = "is no store" if path.exists() else "there is no such store"
            raise CfmergeError(f"store {path}: {there} ({BOOK} is missing); make one with its base: cfmerge time init")
        try:
            book = msgspec.json.decode(file.read_bytes(), type=Book)
        except (msgspec.DecodeError, OSError) as error:
            raise CfmergeError(f"{file}: cannot be read as a store's book: {error}; restore it from a copy") from None
        if book.version > VERSION:
            raise CfmergeError(f"{file}: was written by a later version of cfmerge ({book.version}, not {VERSION})")
        return cls(path, book)

    def write(self) -> None:
        """Makes the book's state last: the file is the old one or the new one at any moment."""
        _replace(self.path / BOOK, msgspec.json.format(msgspec.json.encode(self.book), indent=1))

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """A lock while the store changes; before and after, the book is read and what it does not tell of is removed.

        Raises:
            CfmergeError: another process changes it now.
        """
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CfmergeError(f"store {self.path}: another process changes it now; wait for it") from None
            self.book = self.opened(self.path).book
            self._tidy()
            try:
                yield
            finally:
                self.book = self.opened(self.path).book
                self._tidy()

    def _tidy(self) -> None:
        """Removes experts and states that the book does not know; a merge that can go on stays."""
        known = {one.path for one in self.book.experts if not one.gone} | {one.path for one in self.book.states}
        for folder in (self.path / "experts", self.path / "states"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if str(path.relative_to(self.path)) not in known and not STAGING.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    # --- the base -------------------------------------------------------------------------------------------------

    @property
    def base_path(self) -> str:
        return str(_where(self.path, self.book.base))

    @property
    def base(self) -> Source:
        """The base.

        Raises:
            CfmergeError: it is not there, or not the one that the store was made over.
        """
        if self._base is None:
            source = open_checkpoint(self.base_path)
            self.check_base(source)
            self._base = source
        return self._base

    def check_base(self, source: Source) -> None:
        """Raises `CfmergeError` unless the model is the base that the store was made over."""
        expected, found = msgspec.json.decode((self.path / BASE).read_bytes(), type=dict[str, str]), prints(source)
        other = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if other:
            raise CfmergeError(
                f"base {source.path}: is not the one that the store {self.path} was made over: {len(other)} of "
                f"{len(expected)} tensors differ, such as {other[0]!r}; name the base where it lies now (base=, "
                "--base), or make another store"
            )

    # --- experts --------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[Expert]:
        """The experts that rules see, oldest first: those in the window."""
        return self.book.experts[-self.book.window :] if self.book.window else self.book.experts

    def expert(self, number: int) -> Expert:
        """An expert by its number; one that was forgotten as one that is gone."""
        there = [*self.book.experts, *([self.leaving] if self.leaving else [])]
        lost = Expert(self.book.order[number - 1], number, "", gone=True)
        return next((one for one in there if one.number == number), lost)

    @property
    def there(self) -> set[int]:
        """The numbers of the experts whose tensors are kept."""
        return {one.number for one in (*self.book.experts, self.leaving) if one is not None and not one.gone}

    def named(self, task: str) -> Expert:
        """The expert of a task; raises `CfmergeError` if there is none."""
        found = next((one for one in self.book.experts if one.task == task), None)
        if found is None:
            names = [one.task for one in self.book.experts]
            raise CfmergeError(f"store {self.path}: holds no expert {task!r}{nearest(task, names)}")
        return found

    @property
    def next_number(self) -> int:
        return len(self.book.order) + 1

    def where(self, path: str) -> Path:
        """The place of a path of the book."""
        return _where(self.path, path)

    def readable(self, expert: Expert) -> str:
        """The path of an expert.

        Raises:
            CfmergeError: its tensors are not kept, or it lies elsewhere and has changed.
        """
        if expert.gone:
            raise CfmergeError(
                f"store {self.path}: expert {expert.task!r} is no longer kept (keep={self.book.keep}), and is needed "
                "here; choose a rule whose running model is kept"
            )
        path = self.where(expert.path)
        if expert.linked:
            if not path.exists():
                raise CfmergeError(
                    f"expert {expert.task!r}: {path} is not there any more; it was stored as a link. Put it back, or "
                    "forget the task"
                )
            if print_of(open_checkpoint(path)) != expert.linked:
                raise CfmergeError(
                    f"expert {expert.task!r}: {path} has changed since it was stored as a link; forget the task and "
                    "store it again, without a link where the file is written over"
                )
        return str(path)


def _plain(path: Path) -> str:
    return "" if path.name.startswith(".") else path.name


def _where(store: Path, path: str) -> Path:
    """A path of the book: one that is not absolute lies in the store, or, of a base, is as the user wrote it."""
    return store / path if (store / path).exists() else Path(path)


def _replace(file: Path, content: bytes) -> None:
    """Replaces a file whole."""
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
