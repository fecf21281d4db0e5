"""Inert records of what a pickle would do: names, calls, references. `pickles` makes them."""

import dataclasses
from typing import Any, NamedTuple

MAX_KEY = 64  # parts of a tuple that is a key, and as many levels


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """An object that the pickle would make by a call, and what it would put into it.

    Attributes:
        func: what is called; a `Global`.
        args: its arguments, a tuple.
        state: what `__setstate__` would be given; None if nothing is.
        items: `(key, value)` pairs that would be set.
        entries: values that would be appended.
    """

    __slots__ = ("args", "entries", "func", "items", "state")

    def __init__(self, func: Global, args: tuple):
        self.func, self.args = func, args
        self.state: Any = None
        self.items: list[tuple[Any, Any]] = []
        self.entries: list[Any] = []


class Persistent:
    """An object that lies outside of the pickle, by its id."""

    __slots__ = ("id",)

    def __init__(self, id: Any):
        self.id = id


class Opaque:
    """A key that is not looked at: too large, or made of objects."""

    __slots__ = ()


class Pickle(NamedTuple):
    """What a pickle holds, the names that it would import, and the objects that lie elsewhere, in order."""

    value: Any
    globals: tuple[Global, ...]
    persistents: tuple[Persistent, ...]


class Malformed(Exception):
    """It is no pickle, or a broken one."""


def key_of(key: Any) -> Any:
    """A key that is hashed in no time."""
    return key if _parts(key, MAX_KEY) >= 0 else Opaque()


def _parts(key: Any, left: int) -> int:
    """How many more parts a key may have; negative if it is none that is looked at."""
    if type(key) is tuple:
        left -= 1 + len(key)
        for part in key if left >= 0 else ():
            left = _parts(part, left)
            if left < 0:
                break
    elif type(key) is list or type(key) is dict:
        raise Malformed(f"a key that is a {type(key).__name__}")
    elif type(key) is int and key.bit_length() > 64:
        return -1
    return left
