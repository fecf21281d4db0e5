"""The registry of methods and transforms that can be named in a recipe, and how they are made.

A factory's signature is the list of its parameters. Those annotated `Number` may be traced values, and may differ
from tensor to tensor; those annotated `PerExpert` from expert to expert too:

    0.3                                                     one number
    [0.3, 0.5, 0.7]                                         one for each expert, in order       (PerExpert)
    {"experts": {"math": 0.3, "code": 0.5}}                 the same by name                    (PerExpert)
    {"gradient": [0.0, 1.0]}                                piecewise linear over the depth
    [{"match": "*mlp*", "value": 0.2}, {"value": 0.5}]      by name; the first that matches

A parameter called `depth` is filled in: the tensor's depth in the network, from 0 to 1 (0 outside the layers).
"""

import ast
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array

from cfmerge.errors import CfmergeError, nearest
from cfmerge.methods._base import Method, Origin, Part, Transform, chain

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound=Part)

TRACED, LISTED = "may be traced", "may differ by expert"
Number = Annotated[float | int | Array | np.ndarray, TRACED]
PerExpert = Annotated[float | int | Array | np.ndarray, TRACED, LISTED]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered factory, and what can be said of it without calling it."""

    name: str
    factory: Callable[..., Any]
    kind: str  # "method" or "transform"

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        return {k: v for k, v in inspect.signature(self.factory).parameters.items() if k != "depth"}

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


def register(factory: F) -> F:
    """Decorator: makes a factory of methods or transforms known by its name, to recipes and the command line.

    The part that it returns gets the factory's name and the arguments of the call; its numbers can be replaced by
    traced ones, and resolved by tensor and expert. The factory's return annotation says which of the two it makes.
    """
    name = factory.__name__
    hints = typing.get_type_hints(factory, include_extras=True)
    signature = inspect.signature(factory)
    traced = frozenset(p for p in signature.parameters if p == "depth" or _marked(hints.get(p), TRACED))
    listed = frozenset(p for p, hint in hints.items() if _marked(hint, LISTED))

    @functools.wraps(factory)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CfmergeError(f"{name}: {error}") from None
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        plain = {key: _plain(name, key, value, key in listed) if key in traced else value
                 for key, value in arguments.items()}  # fmt: skip
        made = factory(**plain)
        shown = {key: value for key, value in arguments.items() if key != "depth"}
        return dataclasses.replace(made, name=name, parameters=shown, origin=Origin(named, arguments, traced, listed))

    if name in _REGISTRY and _REGISTRY[name].factory.__module__ != factory.__module__:
        raise CfmergeError(f"there is a method {name!r} already; give yours another name")
    kind = "transform" if hints.get("return") is Transform else "method"
    _REGISTRY[name] = Entry(name, named, kind)
    return named  # type: ignore[return-value]


def registry() -> dict[str, Entry]:
    """All registered methods and transforms by name."""
    return dict(sorted(_REGISTRY.items()))


def _marked(hint: Any, mark: str) -> bool:
    return mark in getattr(hint, "__metadata__", ()) or any(_marked(part, mark) for part in typing.get_args(hint))


# --- values of a parameter ----------------------------------------------------------------------------------------


LISTS = 'a list, or {"experts": {name: number}}'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and not isinstance(value, str)


def _plain(method: str, key: str, value: Any, per_expert: bool) -> Any:
    """Some number out of a value, for a part that is yet to be resolved; the value's form is checked."""
    if value is None or (_is_number(value) and not isinstance(value, bool)):
        return value
    if isinstance(value, Mapping) and set(value) == {"gradient"} and _is_list(value["gradient"]):
        return next(iter([_plain(method, key, item, False) for item in value["gradient"]]))
    by_name = value["experts"] if isinstance(value, Mapping) and set(value) == {"experts"} and per_expert else None
    if isinstance(by_name, Mapping) and by_name:
        return next(iter([_plain(method, key, item, False) for item in by_name.values()]))
    if _is_list(value):
        if all(isinstance(item, Mapping) and {"value"} <= set(item) <= {"match", "value"} for item in value):
            return next(iter([_plain(method, key, item["value"], per_expert) for item in value]))
        if per_expert:
            return next(iter([_plain(method, key, item, False) for item in value]))
    raise CfmergeError(
        f"{method}: parameter {key!r} cannot be {value!r}; give a number, a gradient over depth "
        '{"gradient": [first, ..., last]}, or values by name [{"match": "*mlp*", "value": 1}, {"value": 0}]'
        + (
            ', or one number for each expert (a list, or {"experts": {name: number}})'
            if per_expert
            else "; it cannot differ from expert to expert"
        )
    )


class Place(NamedTuple):
    """Where a part is to work: a tensor's name and depth (None outside the layers), and the experts' names."""

    name: str
    depth: float | None
    experts: tuple[str, ...]
    matches: Callable[[str, str], bool]


def resolve(part: P, place: Place) -> P:
    """The part with the numbers of one tensor: plain ones, and tuples of one for each expert."""

    def settle(key: str, value: Any, origin: Origin) -> Any:
        if key == "depth":
            return place.depth or 0.0
        return _at(value, place, key in origin.listed, f"{part.name}: parameter {key!r}") if value is not None else None

    if all(key != "depth" and (value is None or _is_number(value)) for key, value in _numbers(part)):
        return part
    return _remake(part, settle)


def settle_number(value: Any, place: Place, what: str) -> Any:
    """A number that may be a gradient over depth, or values by name, at one tensor.

    Raises:
        CfmergeError: it has another form; `what` says what it is.
    """
    _plain(what, "value", value, False)
    return _at(value, place, False, what)


def _at(value: Any, place: Place, per_expert: bool, what: str) -> Any:
    if _is_number(value):
        return value
    if isinstance(value, Mapping) and "gradient" in value:
        stops = [_at(stop, place, False, what) for stop in value["gradient"]]
        return float(np.interp((place.depth or 0.0) * (len(stops) - 1), range(len(stops)), stops))
    if isinstance(value, Mapping):
        unknown = [name for name in value["experts"] if name not in place.experts]
        missing = [name for name in place.experts if name not in value["experts"]]
        if unknown or missing:
            problem = f"there is no expert {unknown[0]!r}" if unknown else f"expert {missing[0]!r} has no value"
            raise CfmergeError(f"{what}: {problem}; the experts are {', '.join(place.experts)}")
        return tuple(_at(value["experts"][name], place, False, what) for name in place.experts)
    if isinstance(value[0], Mapping) and "value" in value[0]:
        for item in value:
            if "match" not in item or place.matches(place.name, item["match"]):
                return _at(item["value"], place, per_expert, what)
        raise CfmergeError(
            f"{what} has no value for tensor {place.name!r}: no pattern matches it; add a last {{value: ...}} "
            "without match"
        )
    if len(value) != len(place.experts):
        raise CfmergeError(f"{what} has {len(value)} values for {len(place.experts)} experts")
    return tuple(_at(item, place, False, what) for item in value)


def of_expert(part: P, number: int) -> P:
    """The part with the numbers of one expert."""
    if not any(isinstance(value, tuple | list) for _, value in _numbers(part)):
        return part
    return _remake(part, lambda key, value, origin: value[number] if isinstance(value, tuple | list) else value)


def listed(part: Part) -> set[int]:
    """Lengths of the lists of one number for each expert in the part's parameters."""
    lists = [value for _, value in _numbers(part) if isinstance(value, tuple | list)]
    return {len(value) for value in lists if value and _is_number(value[0])}


def _numbers(part: Part) -> Iterator[tuple[str, Any]]:
    """`(parameter, value)` of every number in the part, and in the parts that are its parameters."""
    if part.origin is None:
        return
    for key, value in part.origin.arguments.items():
        if key in part.origin.traced:
            yield key, value
        for inner in _parts(value):
            yield from _numbers(inner)


def _remake(part: P, change: Callable[[str, Any, Origin], Any]) -> P:
    """The part made again, every number `value` of parameter `key` replaced by `change(key, value, origin)`."""
    origin = part.origin
    if origin is None:
        return part

    def renewed(key: str, value: Any) -> Any:
        if key in origin.traced:
            return change(key, value, origin)
        if isinstance(value, Part):
            return _remake(value, change)
        if isinstance(value, tuple) and value and all(isinstance(item, Part) for item in value):
            return tuple(_remake(item, change) for item in value)
        return value

    return origin.factory(**{key: renewed(key, value) for key, value in origin.arguments.items()})


def expression(part: Part) -> str:
    """The part as text that `make` reads: `trim(density=0.2) >> disjoint_mean()`, with what differs from defaults."""
    if part.origin is None:
        return part.name
    links = part.parameters.get("parts")
    if links is not None:
        return " >> ".join(expression(link) for link in links)

    def text(value: Any) -> str:
        return expression(value) if isinstance(value, Part) else repr(plain_number(value))

    defaults = {key: p.default for key, p in inspect.signature(part.origin.factory).parameters.items()}
    shown = {key: value for key, value in part.parameters.items() if defaults.get(key) is not value}
    changed = {key: text(value) for key, value in shown.items() if text(value) != text(defaults.get(key))}
    return f"{part.name}({', '.join(f'{key}={value}' for key, value in changed.items())})" if changed else part.name


def plain_number(value: Any) -> Any:
    """Arrays and NumPy's numbers as Python's own, for text."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0 else value


def exact(values: Any) -> str:
    """Text that tells all numbers apart, whatever array holds them; traced ones too, while they live."""
    return repr(
        jax.tree.map(lambda v: f"traced {id(v)}" if isinstance(v, jax.core.Tracer) else plain_number(v), values)
    )


def _leaves(value: Any) -> list[Any]:
    return [
        leaf
        for item in jax.tree.leaves(value)
        for leaf in (_leaves(numbers(item)) if isinstance(item, Part) else [item])
    ]


def _parts(value: Any) -> tuple[Part, ...]:
    if isinstance(value, Part):
        return (value,)
    return tuple(item for item in value if isinstance(item, Part)) if isinstance(value, tuple) else ()


# --- numbers apart from structure, so that one compiled step serves many values -----------------------------------


def numbers(part: Part, *, depth: bool = True) -> list[Any]:
    """The part's numbers in a fixed order, for `with_numbers`; if not `depth`, without those that it fills in."""
    return [value for key, value in _numbers(part) if depth or key != "depth"]


def with_numbers(part: P, values: Sequence[Any]) -> P:
    """The part with other numbers, which may be traced; the inverse of `numbers`. None stays None."""
    following = iter(values)
    return _remake(part, lambda key, value, origin: next(following))


def with_argument(part: P, name: str, value: Any) -> P:
    """The part with another argument of its factory."""
    return part.origin.factory(**{**part.origin.arguments, name: value}) if part.origin else part


def structure(part: Part) -> Hashable:
    """All of the part but its numbers: parts of equal structure differ in these alone."""
    if part.origin is None:
        return part

    def frozen(key: str, value: Any) -> Hashable:
        if key in part.origin.traced:  # type: ignore[union-attr]
            return value is None
        if isinstance(value, Part):
            return structure(value)
        if isinstance(value, tuple | list):
            return tuple(structure(v) if isinstance(v, Part) else v for v in value)
        return repr(value) if isinstance(value, dict) else value

    items = tuple((key, frozen(key, value)) for key, value in sorted(part.origin.arguments.items()))
    return (part.origin.factory, items)


# --- from text ----------------------------------------------------------------------------------------------------


def make(name: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """The method of that name, with parameters as a recipe or a command line gives them.

    The name may be an expression that chains transforms with a method: `trim(density=0.2) >> disjoint_mean`.
    Strings are read as the type that the parameter is annotated with (`"1e-5"` as a number).

    Raises:
        CfmergeError: unknown name or parameter (with the nearest ones), or a value of another type.
    """
    part = make_part(name, parameters)
    if not isinstance(part, Method):
        raise CfmergeError(
            f"{name} is a transform, not a method: chain it with one, such as '{name} >> average' or "
            f"'task_arithmetic(scale=0.3) >> {name}'"
        )
    return part


def make_part(text: str, parameters: Mapping[str, Any] | None = None) -> Any:
    """`make`, for a method or a transform."""
    if re.fullmatch(r"\s*\w+\s*", text):
        return _named(text.strip(), parameters or {})
    if parameters:
        raise CfmergeError(f"method {text!r}: write the parameters into the expression, found {dict(parameters)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise CfmergeError(f"method {text!r} cannot be read; write NAME(key=value) >> NAME(key=value)") from None
    return _built(tree, text)


def _built(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return chain(_built(node.left, text), _built(node.right, text))
    if isinstance(node, ast.Name):
        return _named(node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        entry = _entry(node.func.id)
        keys = list(entry.signature)
        if len(node.args) > len(keys):
            raise CfmergeError(f"method {text!r}: {entry.name} has {len(keys)} parameters, found {len(node.args)}")
        given = [*zip(keys, node.args, strict=False), *((str(k.arg), k.value) for k in node.keywords)]
        return _named(entry.name, {key: _literal(value, text) for key, value in given})
    raise CfmergeError(f"method {text!r} cannot be read at {ast.unparse(node)!r}; write NAME(key=value) >> NAME")


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _built(node, text)


def _entry(name: str) -> Entry:
    if name not in _REGISTRY:
        raise CfmergeError(f"unknown method {name!r}{nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def _named(name: str, parameters: Mapping[str, Any]) -> Any:
    entry = _entry(name)
    hints = typing.get_type_hints(entry.factory, include_extras=True)
    arguments = {}
    for key, value in parameters.items():
        if key not in entry.signature:
            raise CfmergeError(f"method {name!r} has no parameter {key!r}{nearest(key, entry.signature)}")
        arguments[key] = _converted(name, key, value, hints[key])
    missing = [key for key, p in entry.signature.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise CfmergeError(f"method {name!r} needs a value for {missing[0]!r}: {entry.describe(missing[0])}")
    if any(isinstance(value, jax.core.Tracer) for value in _leaves(arguments)):  # not to be kept
        return entry.factory(**arguments)
    return _made(entry.factory, _frozen(arguments))


def _converted(method: str, key: str, value: Any, hint: Any) -> Any:
    if _marked(hint, TRACED):
        return _numeric(method, key, value)
    if _parts(value) or value is None:
        return value
    if any(issubclass(h, Part) for h in (hint, *typing.get_args(hint)) if isinstance(h, type)):
        return make_part(value)
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"method {method!r}, parameter {key!r}: {error}, got {value!r}") from None


def _numeric(method: str, key: str, value: Any) -> Any:
    """Texts turned into numbers, at any depth of a value's form."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise CfmergeError(f"method {method!r}, parameter {key!r}: {value!r} cannot be read") from None
    if isinstance(value, str):
        if value.lower() in {"none", "null", ""}:
            return None
        try:
            return float(value)
        except ValueError:
            raise CfmergeError(f"method {method!r}, parameter {key!r}: expected a number, got {value!r}") from None
    if isinstance(value, bool):
        raise CfmergeError(f"method {method!r}, parameter {key!r}: expected a number, got {value!r}")
    if isinstance(value, Mapping):
        return {k: v if k == "match" else _numeric(method, key, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_numeric(method, key, item) for item in value]
    return value


class _Frozen(NamedTuple):
    """Arguments of a call with a hash: one object is made for the same call, so that compiled steps are reused."""

    text: str
    arguments: Any

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.text == other.text


def _frozen(arguments: Mapping[str, Any]) -> _Frozen:
    def text(value: Any) -> str:
        return repr((structure(value), exact(numbers(value)))) if isinstance(value, Part) else exact(value)

    return _Frozen(repr([(key, text(value)) for key, value in sorted(arguments.items())]), dict(arguments))


@functools.lru_cache(maxsize=1024)
def _made(factory: Callable[..., Any], arguments: _Frozen) -> Any:
    return factory(**arguments.arguments)


# --- checks of a factory's arguments ------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    """Raises `CfmergeError(message)` unless the condition holds; for the parameters of a factory."""
    if not condition:
        raise CfmergeError(message)


def check_number(
    what: str, value: Any, low: float | int = -np.inf, high: float | int = np.inf, *, above: float | int | None = None
) -> None:
    """Raises `CfmergeError` unless the number lies in `[low, high]`, or in `(above, high]`; traced ones pass."""
    if isinstance(value, jax.core.Tracer) or value is None:
        return
    number = float(value)
    if (low <= number <= high) and np.isfinite(number) and (above is None or number > above):
        return
    if not np.isfinite(low) and not np.isfinite(high) and above is None:
        rule = "be finite"
    elif not np.isfinite(high):
        least = above if above is not None else low
        rule = ("be positive" if above is not None else "not be negative") if least == 0 else (
            f"be {'above' if above is not None else 'at least'} {least:g}"
        )  # fmt: skip
    else:
        rule = f"lie in {f'({above:g}' if above is not None else f'[{low:g}'}, {high:g}]"
    raise CfmergeError(f"{what} must {rule}, got {value}")


def as_array(value: Any, dtype: Any) -> Array:
    """A number as a scalar of a dtype: one that was traced in another precision may come in."""
    return jnp.asarray(value, dtype)
