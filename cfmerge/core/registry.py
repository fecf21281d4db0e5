"""The registry of methods and transforms that can be named in a recipe. A factory's signature lists its parameters."""

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cfmerge.core.call import Call, Formed
from cfmerge.core.numbers import LISTED, TRACED, marked, plain
from cfmerge.core.part import FILLED_IN, Composer, Method, Part, Transform
from cfmerge.errors import CfmergeError, nearest

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered factory, and what can be said of it without calling it."""

    name: str
    factory: Callable[..., Any]
    kind: str  # "method", "transform" or "composer"

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        return {k: v for k, v in inspect.signature(self.factory).parameters.items() if k not in FILLED_IN}

    @property
    def summary(self) -> str:
        return self._doc.split("\n")[0]

    @property
    def source(self) -> str:
        """The paragraph of the docstring that begins with `Source:`, in one line."""
        found = re.search(r"^Source:\s*(.+?)(?=\n\s*\n|\n\S|\Z)", self._doc, re.MULTILINE | re.DOTALL)
        return " ".join(found.group(1).split()) if found else ""

    def describe(self, parameter: str) -> str:
        """The parameter's lines in the docstring's `Args:` section, joined."""
        found = re.search(rf"^    {parameter}: (.+?)(?=^    \w+: |^\S|\Z)", self._doc, re.MULTILINE | re.DOTALL)
        return " ".join(found.group(1).split()) if found else ""

    @property
    def _doc(self) -> str:
        return inspect.getdoc(self.factory) or ""


_REGISTRY: dict[str, Entry] = {}
ELSEWHERE = ("emr", "tall", "tsv_c", "smile")  # composers, which `cfmerge.compose` registers
KINDS: dict[Any, str] = {Transform: "transform", Composer: "composer"}


def register(factory: F) -> F:
    """The factory of a method or a transform, known by its name to recipes and the command line: a decorator.

        >>> @methods.register
        ... def clip(limit: methods.Number = 1.0) -> methods.Transform:
        ...     '''Deltas without entries beyond a limit.'''
        ...     return methods.Transform("clip", lambda delta: jnp.clip(delta, -limit, limit))
        >>> methods.make("clip(limit=0.5) >> average").name
        'clip >> average'

    The factory's return annotation says whether it makes a `Method`, a `Transform` or a `Composer`. The part gets the
    factory's name and the call that made it, see `Call`; parameters annotated `Number` can be traced, and differ by
    tensor and expert.

    Raises:
        CfmergeError: another module has registered that name.
    """
    name = factory.__name__
    hints = typing.get_type_hints(factory, include_extras=True)
    signature = inspect.signature(factory)
    numbers = frozenset(p for p in signature.parameters if p == "depth" or marked(hints.get(p), TRACED))
    listed = frozenset(p for p, hint in hints.items() if marked(hint, LISTED))

    @functools.wraps(factory)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CfmergeError(f"{name}: {error}") from None
        bound.apply_defaults()
        given = dict(bound.arguments)
        made = factory(**{k: plain(name, k, v, k in listed) if k in numbers else v for k, v in given.items()})
        return _named(made, name, Call.of(named, given, numbers))

    if name in _REGISTRY and _REGISTRY[name].factory.__module__ != factory.__module__:
        raise CfmergeError(f"there is a method {name!r} already; give yours another name")
    _REGISTRY[name] = Entry(name, named, KINDS.get(hints.get("return"), "method"))
    return named  # type: ignore[return-value]


def _named(made: Part, name: str, call: Call) -> Part:
    """The part under its name; its other forms have the name and the call's numbers too."""
    if isinstance(made, Method) and made.form is not None:
        made = dataclasses.replace(made, form=functools.partial(_form, made.form, name, call))
    return dataclasses.replace(made, name=name, call=call)


def _form(ask: Callable[[int | None], Method | None], name: str, call: Call, rank: int | None) -> Method | None:
    made = ask(rank)
    formed = dataclasses.replace(call, factory=Formed(call.factory, rank))
    return made and dataclasses.replace(made, name=name, call=formed, form=None)


def registry(*kinds: str) -> dict[str, Entry]:
    """All registered methods and transforms by name; or those of some kinds.

    >>> entry = methods.registry()["ties"]
    >>> entry.kind, list(entry.signature)[0], entry.source[:20]
    ('method', 'density', 'Yadav et al., TIES-M')
    """
    wanted = kinds or ("method", "transform")
    return {name: entry for name, entry in sorted(_REGISTRY.items()) if entry.kind in wanted}


def entry(name: str) -> Entry:
    """The registered factory of that name.

    Raises:
        CfmergeError: there is none; with the nearest ones.
    """
    if name not in _REGISTRY:
        if name in ELSEWHERE:
            raise CfmergeError(
                f"{name} makes a result that is not one checkpoint: use cfmerge compose {name} RECIPE -o OUT (in "
                "Python cfmerge.compose.build)"
            )
        raise CfmergeError(f"unknown method {name!r}{nearest(name, [*registry(), *ELSEWHERE])}")
    return _REGISTRY[name]
