"""Passes over the whole model before the merge, for methods that need to know something of all of it."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cfmerge.engine.steps import Inputs, steps
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method, Survey
from cfmerge.methods._base import measure_jointly, xp_of
from cfmerge.methods._registry import exact, listed, numbers, of_expert, structure
from cfmerge.methods._several import gathered, members

TRACED = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip
Place = tuple[str, int]  # a tensor's name; and the first entry of its piece, or which of its stacked layers


class Stack(NamedTuple):
    """Tensors of one shape and layout, for one method: what is surveyed at once.

    Attributes:
        method: what merges them, and whose view of them is surveyed.
        places: of each of them; of each layer, where a tensor stacks several.
        layout: of the stored tensors; empty where there is no canonical view.
        base: `(stack, *stored shape)`.
        expert: `expert(t)` is the same of expert t.
        inputs: `inputs(t)` is what comes with it.
    """

    method: Method
    places: tuple[Place, ...]
    layout: str
    base: Any
    expert: Callable[[int], Any]
    inputs: Callable[[int], Inputs]


def survey(method: Method, experts: int, stacks: Callable[[], Iterable[Stack]], compute: str) -> Found | None:
    """All surveys of a method, one pass over `stacks()` each; None if it has none.

    Raises:
        CfmergeError: the values are not at hand (under `jit`), and the method needs them on the host.
    """
    if method.survey is None:
        return None
    found: Any = None
    while (following := method.survey(found)) is not None:
        try:
            found = _pass(method, following, found, experts, stacks, compute)
        except TRACED:
            raise CfmergeError(
                f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                "call it outside"
            ) from None
    return found if isinstance(found, Found) else Found(found)


def kind_of(method: Method) -> Any:
    """Equal for methods that can be in one batch: those that survey the model must agree in numbers too.

    All but the depth, which the engine fills in: what is surveyed is the model, whatever the tensor's depth.
    """
    return structure(method) if method.survey is None else (structure(method), exact(numbers(method, depth=False)))


def by_member(methods: Sequence[Method]) -> dict[Any, tuple[Method, list[int]]]:
    """`{kind: (member, numbers of the methods that hold it)}`: a method of a sweep surveys whatever it merges there."""
    groups: dict[Any, tuple[Method, list[int]]] = {}
    for number, method in enumerate(methods):
        if method.survey is not None:
            for kind, member in {kind_of(m): m for m in members(method) if m.survey is not None}.items():
                groups.setdefault(kind, (member, []))[1].append(number)
    return groups


def found_for(method: Method, found: Mapping[Any, Found | None]) -> Found | None:
    """What surveys found for the method, of what was found for each kind of member."""
    return gathered(method, [found.get(kind_of(member)) for member in members(method)])


def at_places(found: Found | None, places: Sequence[Place]) -> Found | None:
    """What was found for the tensors of a stack: `tensor` stacked, in the stack's order."""
    if found is None or found.tensor is None:
        return found
    return Found(
        found.model, jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves), *(found.tensor[p] for p in places))
    )


def _pass(
    method: Method, following: Survey, found: Any, experts: int, stacks: Callable[[], Iterable[Stack]], compute: str
) -> Any:
    measured: dict[Place, Any] = {}
    total: Any = None
    surveys = [following] * experts
    if listed(method):
        surveys = [of_expert(method, t).survey(found) for t in range(experts)]  # type: ignore[misc]
    compiled, entries = _Compiled(surveys, compute), 0
    for stack in stacks():
        values = compiled.joint(stack) if following.joint else compiled.by_expert(stack)
        entries += int(np.prod(stack.base.shape))
        if following.by_tensor:
            for number, place in enumerate(stack.places):
                measured[place] = jax.tree.map(lambda leaf, number=number: leaf[number], values)
        else:
            total = values if total is None else jax.tree.map(lambda a, b: a + b, total, values)
    totals = [dict(sorted(measured.items())) if following.by_tensor else total]
    totals += [entries] if following.sized else []
    if not listed(method) or following.joint:
        return following.combine(*totals)
    return jax.tree.map(_own_rows, *(own.combine(*totals) for own in surveys))


def _own_rows(*leaves: Any) -> Any:
    """Each expert's row of what its own survey found; what was there before, and is the same for all, as it is."""
    if all(leaf is leaves[0] for leaf in leaves):
        return leaves[0]
    return xp_of(*leaves).stack([leaf[t] for t, leaf in enumerate(leaves)])


class _Compiled:
    """The measures of one survey, compiled for each shape that they meet."""

    def __init__(self, surveys: Sequence[Survey], compute: str) -> None:
        self.surveys, self.compute = surveys, compute
        self.jointly = functools.partial(measure_jointly, surveys)
        self.made: dict[Any, Any] = {}

    def by_expert(self, stack: Stack) -> Any:
        """Measures `(stack, experts, ...)`; summed over the stack, but for a survey by tensor."""
        values = []
        for t, own in enumerate(self.surveys):
            function = self._function(own.measure, stack)
            values.append(_on_host(function([stack.base, stack.expert(t)], [stack.inputs(t)])))
        axis = 1 if self.surveys[0].by_tensor else 0
        return jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves, axis), *values)

    def joint(self, stack: Stack) -> Any:
        """Measures `(stack, ...)`; summed over the stack, but for a survey by tensor."""
        experts = range(len(self.surveys))
        function = self._function(self.jointly, stack)
        return _on_host(function([stack.base, *map(stack.expert, experts)], [stack.inputs(t) for t in experts]))

    def _function(self, measure: Any, stack: Stack) -> Any:
        key = (measure, stack.layout, stack.method.scope, stack.method.moments)
        if key not in self.made:
            first = self.surveys[0]
            plain = steps(stack.method, stack.layout, self.compute)
            self.made[key] = jax.jit(plain.measured(measure, first.joint, summed=not first.by_tensor))
        return self.made[key]


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = np.asarray(leaf)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(host, values)
