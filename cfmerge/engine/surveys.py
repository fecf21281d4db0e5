"""Surveys: the tensors that each of them sees, and the way of the findings to the methods that asked."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cfmerge.core.call import call_of, identity, structure
from cfmerge.core.several import gathered, members
from cfmerge.core.survey import Found, xp_of
from cfmerge.methods import Method

Place = tuple[str, int]  # a tensor's name; and the first entry of its piece, or which of its stacked layers


def kind_of(method: Method) -> Any:
    """A key that is equal for methods of one unit: those that survey the model must agree in numbers too.

    All but the depth, which planning fills in: the model is surveyed, whatever the tensor's depth.
    """
    if method.survey is None or looks_within(method):
        return structure(method)
    return identity(call_of(method).mapped(lambda call, key, value: 0.0 if key == "depth" else value))


def looks_within(method: Method) -> bool:
    """Whether the method looks at each tensor before it merges it."""
    return method.survey is not None and method.survey.within == "tensor"


def by_member(methods: Sequence[Method]) -> dict[Any, tuple[Method, list[int]]]:
    """`{kind: (member, numbers of the methods that hold it)}`: a method of a sweep surveys whatever it merges there."""
    groups: dict[Any, tuple[Method, list[int]]] = {}
    for number, method in enumerate(methods):
        if method.survey is not None:
            for kind, member in {kind_of(m): m for m in members(method) if m.survey is not None}.items():
                groups.setdefault(kind, (member, []))[1].append(number)
    return groups


def found_for(method: Method, found: Mapping[Any, Found | None]) -> Found | None:
    """The findings for a method, out of those for each kind of member."""
    return gathered(method, [found.get(kind_of(member)) for member in members(method)])


def at_places(found: Found | None, places: Sequence[Place]) -> Found | None:
    """The findings for the tensors of a unit: `tensor` stacked, in the unit's order."""
    if found is None or found.tensor is None:
        return found
    return Found(
        found.model, jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves), *(found.tensor[p] for p in places))
    )
