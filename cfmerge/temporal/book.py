"""The book of a store: all that it knows, as one file, which is replaced whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cfmerge.errors import CfmergeError
from cfmerge.temporal.rules import name_of

BOOK, BASE = "time.json", "base.json"
IN_STORE = "base"  # a base that came as a tree
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
        return name_of(self.number, self.task)


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


def read_book(path: Path) -> Book:
    """The book of the store at a path.

    Raises:
        CfmergeError: there is none, or it cannot be read, or contradicts itself.
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
    _check(file, book)
    return book


def _check(file: Path, book: Book) -> None:
    """Raises `CfmergeError` where a book that somebody has edited contradicts itself."""
    numbers, tasks = [one.number for one in book.experts], [one.task for one in book.experts]
    wrong = [
        f"{key} counts experts, at least 1; found {value}"
        for key, value in (("window", book.window), ("keep", book.keep))
        if value is not None and value < 1
    ]
    if numbers != sorted(set(numbers)) or any(not 1 <= number <= len(book.order) for number in numbers):
        wrong.append(
            f"the experts' numbers should rise, from 1 to {len(book.order)}, which `order` has; found {numbers}"
        )
    elif len(set(tasks)) < len(tasks) or [book.order[number - 1] for number in numbers] != tasks:
        wrong.append(f"the experts' tasks should be those of `order` by their numbers, each once; found {tasks}")
    if wrong:
        raise CfmergeError(f"{file}: {wrong[0]}; restore it from a copy")


@contextlib.contextmanager
def telling(store: Path) -> Iterator[None]:
    """Errors of the file system as `CfmergeError`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or store})"
        raise CfmergeError(f"store {store}: cannot be written: {reason}; what it held before is kept") from None


def replace(file: Path, content: bytes) -> None:
    """Replaces a file whole."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
