"""Passes over the whole model before the merge, for methods that need to know something of all of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cfmerge.core.call import call_of, identity, of_expert, structure
from cfmerge.core.part import Method
from cfmerge.core.several import gathered, members
from cfmerge.core.survey import Found, Measure, looked, xp_of
from cfmerge.engine.steps import Inputs, Views, measured
from cfmerge.errors import CfmergeError

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


def survey(
    method: Method, experts: int, entries: int, stacks: Callable[[], Iterable[Stack]], compute: str
) -> Found | None:
    """A method's findings in the model, by one pass over `stacks()` for each measure; None if it has no survey.

    Args:
        entries: size of the whole model, of which the stacks are.

    Raises:
        CfmergeError: the values are not at hand (under `jit`), and the method needs them on the host.
    """
    if method.survey is None:
        return None
    look, totals = looked(method, [of_expert(method, t) for t in range(experts)], entries), None
    while True:
        try:
            totals = _pass(look.send(totals), experts, stacks, compute)
        except StopIteration as done:
            return done.value
        except TRACED:
            raise CfmergeError(
                f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                "call it outside"
            ) from None


def kind_of(method: Method) -> Any:
    """Equal for methods that can be in one batch; those that survey the model must agree in numbers too.

    All but the depth, which the engine fills in: what is surveyed is the model, whatever the tensor's depth.
    """
    if method.survey is None:
        return structure(method)
    return identity(call_of(method).mapped(lambda call, key, value: 0.0 if key == "depth" else value))


def by_member(methods: Sequence[Method]) -> dict[Any, tuple[Method, list[int]]]:
    """`{kind: (member, numbers of the methods that hold it)}`: a method of a sweep surveys whatever it merges there."""
    groups: dict[Any, tuple[Method, list[int]]] = {}
    for number, method in enumerate(methods):
        if method.survey is not None:
            for kind, member in {kind_of(m): m for m in members(method) if m.survey is not None}.items():
                groups.setdefault(kind, (member, []))[1].append(number)
    return groups


def found_for(method: Method, found: Mapping[Any, Found | None]) -> Found | None:
    """The findings for the method, out of those for each kind of member."""
    return gathered(method, [found.get(kind_of(member)) for member in members(method)])


def at_places(found: Found | None, places: Sequence[Place]) -> Found | None:
    """The findings for the tensors of a stack: `tensor` stacked, in the stack's order."""
    if found is None or found.tensor is None:
        return found
    return Found(
        found.model, jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves), *(found.tensor[p] for p in places))
    )


def _pass(wanted: Measure, experts: int, stacks: Callable[[], Iterable[Stack]], compute: str) -> Any:
    """The totals of a measure over the whole model."""
    by_place: dict[Place, Any] = {}
    total: Any = None
    compiled = _Compiled(wanted, compute)
    for stack in stacks():
        values = compiled.joint(stack, experts) if wanted.joint else compiled.by_expert(stack, experts)
        if not wanted.by_tensor:
            total = values if total is None else jax.tree.map(lambda a, b: a + b, total, values)
            continue
        for number, place in enumerate(stack.places):
            by_place[place] = jax.tree.map(lambda leaf, number=number: leaf[number], values)
    return dict(sorted(by_place.items())) if wanted.by_tensor else total


class _Compiled:
    """A measure, compiled for each shape that it meets."""

    def __init__(self, wanted: Measure, compute: str) -> None:
        self.wanted, self.compute = wanted, compute
        self.made: dict[Any, Any] = {}

    def by_expert(self, stack: Stack, experts: int) -> Any:
        """Measures `(stack, experts, ...)`; summed over the stack, but for those by tensor."""
        values = []
        for t, measure in enumerate(self.wanted.each(experts)):
            function = self._function(measure, stack)
            values.append(_on_host(function([stack.base, stack.expert(t)], [stack.inputs(t)])))
        axis = 1 if self.wanted.by_tensor else 0
        return jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves, axis), *values)

    def joint(self, stack: Stack, experts: int) -> Any:
        """Measures `(stack, ...)`; summed over the stack, but for those by tensor."""
        all_of_them, inputs = [stack.expert(t) for t in range(experts)], [stack.inputs(t) for t in range(experts)]
        return _on_host(self._function(self.wanted.of, stack)([stack.base, *all_of_them], inputs))

    def _function(self, measure: Any, stack: Stack) -> Any:
        key = (measure, stack.layout, stack.method.needs)
        if key not in self.made:
            view = Views(stack.layout, self.compute, stack.method.needs)
            self.made[key] = jax.jit(measured(view, self.wanted, measure))
        return self.made[key]


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = np.asarray(leaf)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(host, values)
