"""What a method is, and the registry of those that can be named in a recipe."""

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from jaxtyping import Array

from cfmerge.errors import CfmergeError, nearest

Statistic = Any  # a pytree of arrays, private to each method
Report = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A rule that turns the experts' deltas of one tensor into the merged delta: three pure functions.

        statistic = init(base)                            nothing seen yet
        statistic = update(statistic, delta, weight)      one expert seen
        merged    = solve(statistic)                      the merged delta; the result is base + merged

    `base` and `delta` are canonical, `(out, in)`; for an `entrywise` method they may have any shape. All three
    can be jitted, vmapped and differentiated.

    Attributes:
        name, parameters: what the recipe called it.
        report: `report(statistic) -> (solve(statistic), {name: scalar})`, where there is something to tell.
        entrywise: every entry is merged by itself. Such a method takes all floating-point tensors; the others
            take matrices and convolutions, and the remaining tensors get the mean of the deltas.
        additive: the statistic is a sum over experts, of a size that does not depend on their number.
        notes: `{report name: (condition, message)}`: what is said to the user when `condition(value)` holds.
        of_rank: `of_rank(r)` is the method in a form for deltas of rank at most `r`, where it has one; it then
            reports `factor_error`, the relative error of taking them so.
        without_conv1d: the method for tensors that are *not* stored as GPT-2's Conv1D, if it is another one.
    """

    name: str
    init: Callable[[Array], Statistic]
    update: Callable[..., Statistic]
    solve: Callable[[Statistic], Array]
    report: Callable[[Statistic], tuple[Array, Report]] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    entrywise: bool = False
    additive: bool = True
    notes: Mapping[str, tuple[Callable[[float], bool], str]] = dataclasses.field(default_factory=dict)
    of_rank: Callable[[int], "Method"] | None = None
    without_conv1d: "Method | None" = None

    def solve_with_report(self, statistic: Statistic) -> tuple[Array, Report]:
        """`(solve(statistic), what there is to tell)`."""
        return self.report(statistic) if self.report else (self.solve(statistic), {})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered method: its factory and what can be said of it without calling it."""

    name: str
    factory: Callable[..., Method]

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.factory).parameters

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.factory) or "").split("\n")[0]

    @property
    def source(self) -> str:
        """The line of the docstring that begins with `Source:`."""
        found = re.search(r"^Source:\s*(.+)$", inspect.getdoc(self.factory) or "", re.MULTILINE)
        return found.group(1) if found else ""

    def describe(self, parameter: str) -> str:
        """The parameter's lines in the docstring's `Args:` section, joined."""
        doc = inspect.getdoc(self.factory) or ""
        found = re.search(rf"^    {parameter}: (.+?)(?=^    \w+: |^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
        return " ".join(found.group(1).split()) if found else ""


_REGISTRY: dict[str, Entry] = {}


def register(factory: Callable[..., Method]) -> Callable[..., Method]:
    """Decorator: makes a method factory known by its name, so that recipes and the CLI can use it.

    The factory's typed signature is the list of its parameters; the method that it returns gets the factory's
    name and the arguments of the call.
    """
    name = factory.__name__

    @functools.wraps(factory)
    def named(*args: Any, **kwargs: Any) -> Method:
        bound = inspect.signature(factory).bind(*args, **kwargs)
        bound.apply_defaults()
        return dataclasses.replace(factory(*args, **kwargs), name=name, parameters=dict(bound.arguments))

    _REGISTRY[name] = Entry(name, named)
    return named


def registry() -> dict[str, Entry]:
    """All registered methods by name."""
    return dict(sorted(_REGISTRY.items()))


def make(name: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`, with parameters as a recipe or a command line gives them.

    Strings are read as the type that the parameter is annotated with (`"1e-5"` as a float).

    Raises:
        CfmergeError: unknown method, unknown parameter (with the nearest names), or a value of another type.
    """
    if name not in _REGISTRY:
        raise CfmergeError(f"unknown method {name!r}{nearest(name, _REGISTRY)}")
    entry = _REGISTRY[name]
    hints = typing.get_type_hints(entry.factory)
    arguments = {}
    for key, value in (parameters or {}).items():
        if key not in entry.signature:
            raise CfmergeError(f"method {name!r} has no parameter {key!r}{nearest(key, entry.signature)}")
        try:
            arguments[key] = msgspec.convert(value, hints[key], strict=False)
        except msgspec.ValidationError as error:
            raise CfmergeError(f"method {name!r}, parameter {key!r}: {error}, got {value!r}") from None
    return _made(entry.factory, tuple(sorted(arguments.items())))


@functools.lru_cache(maxsize=256, typed=True)
def _made(factory: Callable[..., Method], arguments: tuple[tuple[str, Any], ...]) -> Method:
    """One object for the same call, so that its compiled steps are used again."""
    return factory(**dict(arguments))


def check(condition: bool, message: str) -> None:
    """Raises `CfmergeError(message)` unless the condition holds; for the parameters of a factory."""
    if not condition:
        raise CfmergeError(message)
