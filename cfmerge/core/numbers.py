"""Numbers of a part, and the forms in which a recipe gives them.

Parameters of a factory that are annotated `Number` may be traced values, and may differ from tensor to tensor; those
annotated `PerExpert` from expert to expert too:

    0.3                                                     one number
    [0.3, 0.5, 0.7]                                         one for each expert, in order       (PerExpert)
    {"experts": {"math": 0.3, "code": 0.5}}                 the same by name                    (PerExpert)
    {"gradient": [0.0, 1.0]}                                piecewise linear over the depth
    [{"match": "*mlp*", "value": 0.2}, {"value": 0.5}]      by name; the first that matches

A parameter called `depth` is filled in: the tensor's depth in the network, from 0 to 1 (0 outside the layers).
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from cfmerge.errors import CfmergeError

TRACED, LISTED = "may be traced", "may differ by expert"
Number = Annotated[float | int | Array | np.ndarray, TRACED]
PerExpert = Annotated[float | int | Array | np.ndarray, TRACED, LISTED]


class Place(NamedTuple):
    """The place where a part works: a tensor's name and depth (None outside the layers), and the experts' names."""

    name: str
    depth: float | None
    experts: tuple[str, ...]
    matches: Callable[[str, str], bool]


def marked(hint: Any, mark: str) -> bool:
    """Whether an annotation, or a part of it, bears the mark."""
    return mark in getattr(hint, "__metadata__", ()) or any(marked(part, mark) for part in typing.get_args(hint))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )


def plain_number(value: Any) -> Any:
    """Arrays and NumPy's numbers as Python's own, for text."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0 else value


def plain(method: str, key: str, value: Any, per_expert: bool) -> Any:
    """Some number out of a value, for a part that is yet to be resolved; the value's form is checked."""
    if value is None or (is_number(value) and not isinstance(value, bool)):
        return value
    if isinstance(value, Mapping) and set(value) == {"gradient"} and _is_list(value["gradient"]):
        return _first([plain(method, key, item, False) for item in value["gradient"]])
    by_name = value["experts"] if isinstance(value, Mapping) and set(value) == {"experts"} and per_expert else None
    if isinstance(by_name, Mapping) and by_name:
        return _first([plain(method, key, item, False) for item in by_name.values()])
    if _is_list(value):
        if all(isinstance(item, Mapping) and {"value"} <= set(item) <= {"match", "value"} for item in value):
            return _first([plain(method, key, item["value"], per_expert) for item in value])
        if per_expert:
            return _first([plain(method, key, item, False) for item in value])
    raise CfmergeError(
        f"{method}: parameter {key!r} cannot be {value!r}; give a number, a gradient over depth "
        '{"gradient": [first, ..., last]}, or values by name [{"match": "*mlp*", "value": 1}, {"value": 0}]'
        + (
            ', or one number for each expert (a list, or {"experts": {name: number}})'
            if per_expert
            else "; it cannot differ from expert to expert"
        )
    )


def _first(values: list[Any]) -> Any:
    return values[0]  # all values were checked


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and not isinstance(value, str)


def settle_number(value: Any, place: Place, what: str) -> Any:
    """A number that may be a gradient over depth, or values by name, at one tensor.

    Raises:
        CfmergeError: it has another form; `what` says what it is.
    """
    plain(what, "value", value, False)
    return at(value, place, what)


def at(value: Any, place: Place, what: str) -> Any:
    """A value at one tensor: a number, or a tuple of one for each expert."""
    if value is None or is_number(value):
        return value
    if isinstance(value, Mapping) and "gradient" in value:
        stops = [at(stop, place, what) for stop in value["gradient"]]
        return float(np.interp((place.depth or 0.0) * (len(stops) - 1), range(len(stops)), stops))
    if isinstance(value, Mapping):
        unknown = [name for name in value["experts"] if name not in place.experts]
        missing = [name for name in place.experts if name not in value["experts"]]
        if unknown or missing:
            problem = f"there is no expert {unknown[0]!r}" if unknown else f"expert {missing[0]!r} has no value"
            raise CfmergeError(f"{what}: {problem}; the experts are {', '.join(place.experts)}")
        return tuple(at(value["experts"][name], place, what) for name in place.experts)
    if isinstance(value[0], Mapping) and "value" in value[0]:
        for item in value:
            if "match" not in item or place.matches(place.name, item["match"]):
                return at(item["value"], place, what)
        raise CfmergeError(
            f"{what} has no value for tensor {place.name!r}: no pattern matches it; add a last {{value: ...}} "
            "without match"
        )
    if len(value) != len(place.experts):
        raise CfmergeError(f"{what} has {len(value)} values for {len(place.experts)} experts")
    return tuple(at(item, place, what) for item in value)
