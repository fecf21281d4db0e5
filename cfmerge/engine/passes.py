"""The steps of a pass for one unit: they start from the base, see the experts one by one, and finish.

Additive     a statistic of a fixed size, then its solution
Unsolved     the statistic itself
Together     all experts at once, for methods that are not sums
Joint        all experts at once, by the factors of their deltas
Measuring    a survey's measure
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from cfmerge.core.call import of_expert
from cfmerge.core.survey import Measure, Order, xp_of
from cfmerge.engine.checks import check_finite
from cfmerge.engine.compiling import is_quick, options
from cfmerge.engine.inputs import SETTINGS, Inputs, Settings
from cfmerge.engine.joint import compiled
from cfmerge.engine.precision import Attempt, Outcome, compute_dtype
from cfmerge.engine.spread import Spread
from cfmerge.engine.steps import Steps, Views, finite, measured, measured_shares, steps
from cfmerge.engine.units import Unit

_finite = jax.jit(finite)


class UnitSteps(Protocol):
    """The steps of a pass for one unit; `experts` are the numbers of the experts that they see."""

    @property
    def experts(self) -> Sequence[int]: ...

    @property
    def spread(self) -> Spread: ...

    def start(self, base: jax.Array) -> Any: ...

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any: ...

    def finish(self, state: Any, base: jax.Array) -> Any: ...


class _Merging:
    """The common part of all steps that merge: the compiled code, the numbers, and the checks of values."""

    def __init__(self, attempt: Attempt, spread: Spread) -> None:
        self.unit, self.attempt, self.spread = attempt.unit, attempt, spread
        self.traced = self.unit.work.traced
        settings = self.unit.settings(attempt.methods, attempt.found)
        self.settings: list[Settings] = [spread.put(one, SETTINGS) for one in settings]
        self.experts = self.unit.experts
        self.order = {number: place for place, number in enumerate(self.unit.experts, 1)}

    @functools.cached_property
    def by(self) -> Steps:
        """The compiled steps."""
        layout, compute = self.unit.job.layout, self.attempt.compute
        if self.traced:
            return steps(layout, compute, True)
        return self.spread.steps(layout, compute, is_quick(self.unit.work))

    def checked(self, base: jax.Array, number: int | None, flags: Any) -> None:
        """Raises `NonFiniteError` unless the flags of an expert (of the result: None) are all set."""
        if not self.traced:  # looking at them waits: steps that are only queued would hold all experts' buffers
            check_finite(self.unit, base, number, np.asarray(flags)[: self.unit.stack])

    def outcome(self, merged: Any, reports: Any, statistics: Any = None) -> Outcome:
        reports = reports if self.traced else jax.tree.map(np.asarray, reports)
        return Outcome(self.spread.own(merged), self.spread.own(reports), statistics)


class Additive(_Merging):
    """A statistic of a fixed size, that each expert is added to."""

    _added: tuple[int, Any] | None = None  # an expert that is not checked yet, and its flags

    def start(self, base: jax.Array) -> Any:
        kept = self.unit.kept(of_expert(self.attempt.methods[0], 0), self.attempt.compute)
        return self.by.start(self.settings[0], base) if kept is None else self.spread.whole(kept)

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        self._settle(base)  # the expert before: it was added while this one was read
        state, finite = self.by.step(self.settings[self.order[number]], state, base, expert, inputs)
        self._added = (number, finite)
        if not self.spread.ahead:
            self._settle(base)
        return state

    def _settle(self, base: jax.Array) -> None:
        """Waits until the expert that was added last is, and checks it."""
        if self._added is not None:
            self.checked(base, *self._added)
            self._added = None

    def finish(self, state: Any, base: jax.Array) -> Any:
        self._settle(base)
        merged, reports, finite = self.by.finish(self.settings[0], state, base, self.unit.job.dtype.name)
        self.checked(base, None, finite)
        return self.outcome(merged, reports, state)


class Unsolved(Additive):
    """The statistic itself."""

    def finish(self, state: Any, base: jax.Array) -> Any:
        self._settle(base)
        return self.spread.own(state)


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
        each: Any = finite if self.traced else np.asarray(finite)  # taken apart by JAX it would be one more program
        for flags, number in zip(each, (*self.unit.experts, None), strict=True):
            self.checked(base, number, flags)
        return self.outcome(merged, reports)


class Joint(_Merging):
    """All experts at once, by the factors of their deltas.

    Args:
        as_factors: the outcome's tensors are the merged delta's factors, `(left, right)`.
    """

    def __init__(self, attempt: Attempt, spread: Spread, as_factors: bool = False) -> None:
        super().__init__(attempt, spread)
        work, compute = self.unit.work, compute_dtype(self.unit.work, self.unit.jobs)
        self.merge = compiled(self.unit.job.factor_layout, compute, as_factors, is_quick(work), spread.mesh)

    def start(self, base: jax.Array) -> Any:
        return ()

    def update(self, state: Any, base: jax.Array, number: int, expert: Any, inputs: Inputs) -> Any:
        return (*state, (expert, inputs))

    def finish(self, state: Any, base: jax.Array) -> Any:
        experts, inputs = [list(column) for column in zip(*state, strict=True)]
        merged, reports, finite = self.merge(self.settings[1:], base, experts, inputs, self.unit.job.dtype.name)
        for flags, number in zip(np.asarray(finite), (*self.unit.experts, None), strict=True):
            self.checked(base, number, flags)
        return self.outcome(merged, reports)


class Measures:
    """A survey's measure, compiled for every shape that it meets."""

    def __init__(self, wanted: Measure | Order, experts: int, compute: str) -> None:
        self.wanted, self.compute, self.each = wanted, compute, wanted.each(experts)
        self._made: dict[Any, Any] = {}

    def join(self, total: Any, values: Any) -> Any:
        """The total with the values of another unit."""
        if isinstance(self.wanted, Measure) and self.wanted.total == "max":
            return xp_of(total, values).maximum(total, values)
        return total + values

    def function(self, measure: Any, spread: Spread) -> Any:
        """`f([base, *experts], [inputs])` of stacks that lie so."""
        unit, mesh = spread.unit, spread.mesh
        key = (measure, unit.job.layout, unit.job.method.needs, mesh)
        if key not in self._made:
            view, how = Views(unit.job.layout, self.compute, unit.job.method.needs), options(is_quick(unit.work))
            plain = measured(view, self.wanted, measure)
            plain = plain if mesh is None else measured_shares(plain, mesh, self.wanted.by_tensor)
            self._made[key] = jax.jit(plain, compiler_options=how)
        function = self._made[key]
        return function if mesh is None else self._of_shares(function, spread)

    def _of_shares(self, function: Any, spread: Spread) -> Any:
        def of_all(stored: Any, inputs: Any) -> Any:
            found = function(stored, inputs, spread.counts)
            if self.wanted.by_tensor:
                return spread.own(found)
            return jax.tree.map(lambda leaf: functools.reduce(self.join, leaf), _on_host(found))

        return of_all


class Measuring:
    """A survey's measure of a unit: `(experts, ...)`, or of all experts at once `(...)`; by tensor `(stack, ...)`."""

    def __init__(self, unit: Unit, measures: Measures, spread: Spread) -> None:
        self.unit, self.measures, self.wanted, self.spread = unit, measures, measures.wanted, spread
        self.experts = range(len(measures.each))

    def start(self, base: jax.Array) -> Any:
        self._check(base, base, None)
        return {}

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        self._check(base, expert, number)
        if self.wanted.joint:
            return {**state, number: (expert, inputs)}
        function = self.measures.function(self.measures.each[number], self.spread)
        return {**state, number: _on_host(function([base, expert], [inputs]))}

    def finish(self, state: Any, base: jax.Array) -> Any:
        if self.wanted.joint:
            experts, inputs = [list(column) for column in zip(*state.values(), strict=True)]
            return _on_host(self.measures.function(self.wanted.of, self.spread)([base, *experts], inputs))
        return jax.tree.map(
            lambda *leaves: xp_of(*leaves).stack(leaves, 1 if self.wanted.by_tensor else 0), *state.values()
        )

    def _check(self, base: jax.Array, array: jax.Array, number: int | None) -> None:
        """A NaN would go from a survey into every tensor."""
        if not self.unit.work.traced:
            check_finite(self.unit, base, number, np.asarray(_finite(array))[: self.unit.stack])


class Keying(Measuring):
    """Every expert's keys of a unit, each `(stack, *shape)`, for order statistics."""

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        self._check(base, expert, number)
        return {**state, number: (expert, inputs)}

    def finish(self, state: Any, base: jax.Array) -> list[Any]:
        experts, inputs = [list(column) for column in zip(*state.values(), strict=True)]
        if self.wanted.joint:
            return list(self.measures.function(self.wanted.of, self.spread)([base, *experts], inputs))
        each = zip(self.measures.each, experts, inputs, strict=True)
        return [self.measures.function(one, self.spread)([base, expert], [own]) for one, expert, own in each]


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.core.Tracer) else wide(leaf), values)


def wide(leaf: Any) -> np.ndarray:
    """An array in 64 bits, on the host."""
    array = np.asarray(leaf)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)
