"""The steps of a pass for one unit: they start from the base, see the experts one by one, and finish.

Additive     a statistic of a fixed size, then its solution
Unsolved     the statistic itself
Together     all experts at once, for methods that are not sums
Measuring    a survey's measure
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from cfmerge.core.call import of_expert
from cfmerge.core.survey import Measure, xp_of
from cfmerge.engine.checks import check_finite, finite_flags
from cfmerge.engine.precision import Attempt, Outcome
from cfmerge.engine.steps import Inputs, Settings, Steps, Views, compiled, measured, steps
from cfmerge.engine.units import Unit


class UnitSteps(Protocol):
    """The steps of a pass for one unit; `experts` are the numbers of the experts that they see."""

    @property
    def experts(self) -> Sequence[int]: ...

    def start(self, base: jax.Array) -> Any: ...

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any: ...

    def finish(self, state: Any, base: jax.Array) -> Any: ...


class _Merging:
    """The common part of all steps that merge: the compiled code, the numbers, and the checks of values."""

    def __init__(self, attempt: Attempt) -> None:
        self.unit, self.attempt = attempt.unit, attempt
        self.traced = attempt.unit.work.traced
        layout = self.unit.job.layout
        self.by: Steps = steps(layout, attempt.compute, True) if self.traced else compiled(layout, attempt.compute)
        self.settings: list[Settings] = self.unit.settings(attempt.methods, attempt.found)
        self.experts = self.unit.experts
        self.order = {number: place for place, number in enumerate(self.unit.experts, 1)}

    def checked(self, base: jax.Array, number: int | None, flags: Any) -> None:
        """Raises `NonFiniteError` unless the flags of an expert (of the result: None) are all set."""
        if not self.traced:  # looking at them waits: steps that are only queued would hold all experts' buffers
            check_finite(self.unit, base, number, np.asarray(flags))

    def outcome(self, merged: Any, reports: Any, statistics: Any = None) -> Outcome:
        return Outcome(merged, reports if self.traced else jax.tree.map(np.asarray, reports), statistics)


class Additive(_Merging):
    """A statistic of a fixed size, that each expert is added to."""

    def start(self, base: jax.Array) -> Any:
        kept = self.unit.kept(of_expert(self.attempt.methods[0], 0), self.attempt.compute)
        return self.by.start(self.settings[0], base) if kept is None else kept

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        state, finite = self.by.step(self.settings[self.order[number]], state, base, expert, inputs)
        self.checked(base, number, finite)
        return state

    def finish(self, state: Any, base: jax.Array) -> Any:
        merged, reports, finite = self.by.finish(self.settings[0], state, base, self.unit.job.dtype.name)
        self.checked(base, None, finite)
        return self.outcome(merged, reports, state)


class Unsolved(Additive):
    """The statistic itself."""

    def finish(self, state: Any, base: jax.Array) -> Any:
        return state


class Together(_Merging):
    """All experts at once."""

    def start(self, base: jax.Array) -> Any:
        return ()

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        return (*state, (expert, inputs))

    def finish(self, state: Any, base: jax.Array) -> Any:
        experts, inputs = [list(column) for column in zip(*state, strict=True)]
        out = self.unit.job.dtype.name
        merged, reports, finite = self.by.together(self.settings[1:], base, experts, inputs, out)
        for flags, number in zip(finite, (*self.unit.experts, None), strict=True):
            self.checked(base, number, flags)
        return self.outcome(merged, reports)


class Measures:
    """A survey's measure, compiled for every shape that it meets."""

    def __init__(self, wanted: Measure, experts: int, compute: str) -> None:
        self.wanted, self.compute, self.each = wanted, compute, wanted.each(experts)
        self._made: dict[Any, Any] = {}

    def function(self, measure: Any, unit: Unit) -> Any:
        key = (measure, unit.job.layout, unit.job.method.needs)
        if key not in self._made:
            view = Views(unit.job.layout, self.compute, unit.job.method.needs)
            self._made[key] = jax.jit(measured(view, self.wanted, measure))
        return self._made[key]


class Measuring:
    """A survey's measure of a unit: `(experts, ...)`, or of all experts at once `(...)`; by tensor `(stack, ...)`."""

    def __init__(self, unit: Unit, measures: Measures) -> None:
        self.unit, self.measures, self.wanted = unit, measures, measures.wanted
        self.experts = range(len(measures.each))

    def start(self, base: jax.Array) -> Any:
        self._check(base, base, None)
        return {}

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        self._check(base, expert, number)
        if self.wanted.joint:
            return {**state, number: (expert, inputs)}
        function = self.measures.function(self.measures.each[number], self.unit)
        return {**state, number: _on_host(function([base, expert], [inputs]))}

    def finish(self, state: Any, base: jax.Array) -> Any:
        if self.wanted.joint:
            experts, inputs = [list(column) for column in zip(*state.values(), strict=True)]
            return _on_host(self.measures.function(self.wanted.of, self.unit)([base, *experts], inputs))
        return jax.tree.map(
            lambda *leaves: xp_of(*leaves).stack(leaves, 1 if self.wanted.by_tensor else 0), *state.values()
        )

    def _check(self, base: jax.Array, array: jax.Array, number: int | None) -> None:
        """A NaN would go from a survey into every tensor."""
        if not self.unit.work.traced:
            check_finite(self.unit, base, number, finite_flags(self.unit, array))


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = np.asarray(leaf)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(host, values)
