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
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, located, open_checkpoint
from cfmerge.formats.staged import STAGING
from cfmerge.temporal.book import BASE, BOOK, IN_STORE, Book, Expert, read_book, replace, telling
from cfmerge.temporal.metrics import check_tasks
from cfmerge.temporal.prints import print_of, prints


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
        cls.check_new(path)
        store = cls(path, book)
        source = store.source(store.base_path)
        with telling(path):
            path.mkdir(parents=True, exist_ok=True)
            replace(path / BASE, msgspec.json.encode(prints(source)))
            store.write()
        return store

    @staticmethod
    def check_new(path: Path) -> None:
        """Raises `CfmergeError` where there is something at the path that a stop has not left there."""
        if path.exists() and (not path.is_dir() or set(map(_plain, path.iterdir())) - {IN_STORE, BASE, ""}):
            raise CfmergeError(f"store {path}: exists, and is no store (it has no {BOOK}); name another directory")

    @classmethod
    def opened(cls, path: Path) -> "Store":
        """The store at a path.

        Raises:
            CfmergeError: there is none, or its book cannot be read.
        """
        return cls(path, read_book(path))

    def again(self) -> "Store":
        """The store, its book read again: another process may have changed it."""
        self.book = self.opened(self.path).book
        return self

    def write(self) -> None:
        """Makes the book's state last: the file is the old one or the new one at any moment."""
        replace(self.path / BOOK, msgspec.json.format(msgspec.json.encode(self.book), indent=1))

    @contextlib.contextmanager
    def changing(self, *, writes: bool = True) -> Iterator[None]:
        """A lock while the store changes; before and after, the book is read and what it does not tell of is removed.

        Args:
            writes: running models are brought up to date, so that none that was stopped is gone on with later.

        Raises:
            CfmergeError: another process changes it now, or it cannot be written.
        """
        with telling(self.path), (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CfmergeError(f"store {self.path}: another process changes it now; wait for it") from None
            self.again()._tidy()
            done = False
            try:
                yield
                done = writes
            finally:
                self.again()._tidy(done)

    @property
    def written(self) -> Book:
        """The book as it lies in the store."""
        return read_book(self.path)

    def _tidy(self, done: bool = False) -> None:
        """Removes experts and states that the book does not know.

        Args:
            done: merges that were stopped too, since none of them will be gone on with.
        """
        known = {one.path for one in self.book.experts if not one.gone} | {one.path for one in self.book.states}
        for folder in (self.path / "experts", self.path / "states"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if str(path.relative_to(self.path)) not in known and (done or not STAGING.fullmatch(path.name)):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def check_output(self, output: Path) -> None:
        """Raises `CfmergeError` where a model would be written among the store's own files."""
        place = Path(os.path.abspath(output)).resolve()
        own = [self.path, *(self.path / name for name in ("experts", "states", IN_STORE, BOOK, BASE))]
        if place == own[0].resolve() or any(place.is_relative_to(path.resolve()) for path in own[1:]):
            raise CfmergeError(f"output {output}: lies among the store's own files; name a place outside {self.path}")

    # --- the base -------------------------------------------------------------------------------------------------

    @property
    def base_path(self) -> str:
        return _base_of(self.path, self.book.base)

    @property
    def base(self) -> Source:
        """The base.

        Raises:
            CfmergeError: it is not there, or not the one that the store was made over.
        """
        if self._base is None:
            source = self.source(self.base_path)
            self.check_base(self.base_path, prints(source))
            self._base = source
        return self._base

    def prints(self) -> dict[str, str]:
        """The hashes of the base's tensors, by name."""
        try:
            return msgspec.json.decode((self.path / BASE).read_bytes(), type=dict[str, str])
        except (msgspec.DecodeError, OSError) as error:
            raise CfmergeError(f"{self.path / BASE}: cannot be read: {error}; restore it from a copy") from None

    def check_base(self, who: str, found: dict[str, str]) -> None:
        """Raises `CfmergeError` unless a model with these hashes is the base that the store was made over."""
        expected = self.prints()
        other = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if other:
            raise CfmergeError(
                f"base {who}: is not the one that the store {self.path} was made over: {len(other)} of "
                f"{len(expected)} tensors differ, such as {other[0]!r}; name the base where it lies now (base=, "
                "--base), or make another store"
            )

    # --- experts --------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[Expert]:
        """The experts that rules see, oldest first: those in the window, into which none that was let go comes back."""
        return self.seen(self.book.experts)

    def seen(self, experts: Sequence[Expert]) -> list[Expert]:
        """Those of some experts that rules would see."""
        if not self.book.window:
            return list(experts)
        return [one for one in experts[-self.book.window :] if not one.gone]

    def expert(self, number: int) -> Expert:
        """An expert by its number; one that was forgotten as one that is gone."""
        there = [*self.book.experts, *([self.leaving] if self.leaving else [])]
        lost = Expert(self.book.order[number - 1], number, "", gone=True)
        return next((one for one in there if one.number == number), lost)

    @property
    def there(self) -> set[int]:
        """The numbers of the experts whose tensors are kept, and are there; one that is being forgotten may be lost."""
        there = {one.number for one in self.book.experts if not one.gone and not self._is_lost(one)}
        return there | ({self.leaving.number} if self.leaving and self._is_whole(self.leaving) else set())

    def _is_lost(self, expert: Expert) -> bool:
        """Whether nothing is left of an expert's files, such as a step of a run that its trainer has removed."""
        place = self.where(expert.path)
        return not place.exists() and (not expert.linked or Path(expert.path).is_absolute())  # else it is on the hub

    def _is_whole(self, expert: Expert) -> bool:
        try:
            self.source(self.readable(expert))
        except CfmergeError:
            return False
        return True

    def named(self, task: str) -> Expert:
        """The expert of a task; raises `CfmergeError` if there is none."""
        found = next((one for one in self.book.experts if one.task == task), None)
        if found is None:
            names = [one.task for one in self.book.experts]
            raise CfmergeError(f"store {self.path}: holds no expert {task!r}{nearest(task, names)}")
        return found

    def check_task(self, task: str) -> None:
        """Raises `CfmergeError` unless a new expert may have that task."""
        book = self.book
        if any(one.task == task for one in book.experts):
            raise CfmergeError(
                f"store {self.path}: there is an expert of {task!r} already (step {self.named(task).number}); give "
                "this one another name, or forget that one first"
            )
        if not task.strip():
            raise CfmergeError("an expert needs the name of its task")
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", task):
            raise CfmergeError(f"task {task!r}: has characters that cannot be shown; give it another name")
        check_tasks(book.tasks or [task], book.held_out, [task], book.trained or None)
        if book.tasks and task not in book.tasks and task not in book.trained:
            raise CfmergeError(
                f"store {self.path}: {task!r} is none of its tasks{nearest(task, book.tasks)} (a store that is made "
                "without tasks takes any name)"
            )

    @property
    def next_number(self) -> int:
        return len(self.book.order) + 1

    def where(self, path: str) -> Path:
        """The place of a path of the book: in the store, unless it is absolute."""
        return self.path / path

    def source(self, path: str) -> Source:
        """A model in files, or on the hub."""
        return open_checkpoint(self.located(path))

    def located(self, path: str) -> Path:
        """The path of a model; of one on the hub its snapshot in the cache, by the store's download and cache_dir."""
        options = self.book.options
        return located(path, options.get("download", False), options.get("cache_dir"))

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
        path = self.where(expert.path) if not expert.linked else Path(expert.path)
        if not expert.linked and not path.exists():
            raise CfmergeError(
                f"store {self.path}: {expert.path}, the expert {expert.task!r}, is not there any more; put it back, or "
                "forget the task"
            )
        if expert.linked:
            if path.is_absolute() and not path.exists():  # else it is on the hub
                raise CfmergeError(
                    f"expert {expert.task!r}: {path} is not there any more; it was stored as a link. Put it back, or "
                    "forget the task"
                )
            if print_of(self.source(str(path))) != expert.linked:
                raise CfmergeError(
                    f"expert {expert.task!r}: {path} has changed since it was stored as a link; forget the task and "
                    "store it again, without a link where the file is written over"
                )
        return str(path)


def _plain(path: Path) -> str:
    return "" if path.name.startswith(".") else path.name


def _base_of(store: Path, base: str) -> str:
    """The path of a base: one that came as a tree lies in the store; others are absolute, or names of the hub."""
    return str(store / base) if base == IN_STORE else base
