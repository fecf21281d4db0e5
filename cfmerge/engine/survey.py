"""Passes over the whole model before the merge, for methods that need to know something of all of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.engine.steps import Inputs, steps
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method, Survey
from cfmerge.methods._registry import listed, of_expert

TRACED = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip
Place = tuple[str, int]  # a tensor's name; and the first entry of its piece, or which of its stacked layers


class Stack(NamedTuple):
    """Tensors of one shape and layout, for one method: what is surveyed at once.

    Attributes:
        places: of each of them; of each layer, where a tensor stacks several.
        layout: of the stored tensors; empty where there is no canonical view.
        base: `(stack, *stored shape)`.
        expert: `expert(t)` is the same of expert t.
        inputs: `inputs(t)` is what comes with it.
    """

    places: tuple[Place, ...]
    layout: str
    base: Any
    expert: Callable[[int], Any]
    inputs: Callable[[int], Inputs]


def survey(method: Method, experts: int, stacks: Callable[[], Iterable[Stack]], compute: str) -> Found | None:
    """All surveys of a method, one pass over `stacks()` each; None if it has none.

    Raises:
        CfmergeError: the values are not at hand (under `jit`), and the method combines them on the host.
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


def at_places(found: Found | None, places: Sequence[Place]) -> Found | None:
    """What was found for the tensors of a stack: `tensor` stacked, in the stack's order."""
    if found is None or found.tensor is None:
        return found
    return Found(found.model, jax.tree.map(lambda *leaves: np.stack(leaves), *(found.tensor[p] for p in places)))


def _pass(
    method: Method, following: Survey, found: Any, experts: int, stacks: Callable[[], Iterable[Stack]], compute: str
) -> Any:
    measured: dict[Place, Any] = {}
    total: Any = None
    measures = [of_expert(method, t).survey(found).measure for t in range(experts)]  # type: ignore[misc, union-attr]
    shared = measures[:1] * experts if not listed(method) else measures
    compiled = _Compiled(method, following, shared, compute)
    for stack in stacks():
        values = compiled.joint(stack) if following.joint else compiled.by_expert(stack)
        if following.by_tensor:
            for number, place in enumerate(stack.places):
                measured[place] = jax.tree.map(lambda leaf, number=number: leaf[number], values)
        else:
            values = jax.tree.map(lambda leaf: leaf.sum(axis=0), values)
            total = values if total is None else jax.tree.map(lambda a, b: a + b, total, values)
    totals = dict(sorted(measured.items())) if following.by_tensor else total
    if not listed(method) or following.joint:
        return following.combine(totals)
    each = [of_expert(method, t).survey(found).combine(totals) for t in range(experts)]  # type: ignore[misc, union-attr]
    return jax.tree.map(lambda *leaves: np.stack([leaf[t] for t, leaf in enumerate(leaves)]), *each)


class _Compiled:
    """The measures of one survey, compiled for each shape that they meet."""

    def __init__(self, method: Method, following: Survey, measures: Sequence[Any], compute: str) -> None:
        self.method, self.following, self.measures, self.compute = method, following, measures, compute
        self.made: dict[Any, Any] = {}

    def by_expert(self, stack: Stack) -> Any:
        """Measures `(stack, experts, ...)`."""
        values = []
        for t, measure in enumerate(self.measures):
            function = self._function(measure, stack.layout)
            values.append(_on_host(function([stack.base, stack.expert(t)], [stack.inputs(t)])))
        return jax.tree.map(lambda *leaves: _xp(*leaves).stack(leaves, axis=1), *values)

    def joint(self, stack: Stack) -> Any:
        """Measures `(stack, ...)`."""
        experts = range(len(self.measures))
        function = self._function(self.following.measure, stack.layout)
        return _on_host(function([stack.base, *map(stack.expert, experts)], [stack.inputs(t) for t in experts]))

    def _function(self, measure: Any, layout: str) -> Any:
        if (measure, layout) not in self.made:
            measured = steps(self.method, layout, self.compute).measured(measure, self.following.joint)
            self.made[measure, layout] = jax.jit(measured)
        return self.made[measure, layout]


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = np.asarray(leaf)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(host, values)


def _xp(*leaves: Any) -> Any:
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np
