"""Surveys of the whole model on the loop: a pass over all units for everything that a look asks."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cfmerge.core.call import of_expert
from cfmerge.core.survey import Order, Ordered, looked
from cfmerge.engine.journal import remembered
from cfmerge.engine.loop import Loop
from cfmerge.engine.orders import SMALL, ends_at, on_host, sample_of, traced
from cfmerge.engine.passes import Keying, Measures, Measuring
from cfmerge.engine.precision import compute_dtype
from cfmerge.engine.surveys import Place, by_member, found_for, kind_of
from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method
from cfmerge.planning.work import Job, Progress, silent

TRACED = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip


def surveys(loop: Loop, jobs: Sequence[Job]) -> dict[Any, Found | None]:
    """The findings of the methods that survey the whole model, each of the tensors that it merges."""
    methods = [job.method for job in jobs]
    found = {
        kind: _survey(loop, place, method, [jobs[number] for number in numbers])
        for place, (kind, (method, numbers)) in enumerate(by_member(methods).items())
    }
    surveying = {kind_of(method): method for method in methods if method.survey is not None}
    return {kind: found_for(method, found) for kind, method in surveying.items()}


def _survey(loop: Loop, place: int, method: Method, jobs: Sequence[Job]) -> Found:
    """The findings of one method: its look at the jobs, a pass for everything that it wants measured.

    A pass that an earlier run has made is not made again: the look is sent the totals that it was sent then.
    """
    compute = compute_dtype(loop.work, jobs)
    experts = len(loop.work.experts)
    entries = sum(job.parameter.size for job in jobs)
    look, totals = looked(method, [of_expert(method, t) for t in range(experts)], entries), None
    numbers = itertools.count()
    with loop.precision(compute):
        while True:
            try:
                wanted = look.send(totals)
                measures, key = Measures(wanted, experts, compute), f"survey {place}, pass {next(numbers)}"
                if isinstance(wanted, Order):
                    totals = _ordered(loop, measures, jobs, key)
                    continue
                fits = functools.partial(_fits, loop, jobs) if wanted.by_tensor else None
                totals = remembered(loop.journal, key, functools.partial(measured, loop, measures, jobs), fits)
            except StopIteration as done:
                return done.value
            except TRACED:
                raise CfmergeError(
                    f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                    "call it outside"
                ) from None


def _fits(loop: Loop, jobs: Sequence[Job], totals: Any) -> bool:
    """Whether the totals by tensor are of the places that there are now."""
    return set(totals) == {place for unit in loop.pieces(jobs) for place in unit.places}


def measured(loop: Loop, measures: Measures, jobs: Sequence[Job], tell: Progress = silent) -> Any:
    """The totals of a measure over the jobs' tensors."""
    by_place: dict[Place, Any] = {}
    total: Any = None

    def take(unit: Unit, values: Any) -> None:
        nonlocal total
        if not measures.wanted.by_tensor:
            total = values if total is None else jax.tree.map(measures.join, total, values)
            return
        for number, place in enumerate(unit.places):
            by_place[place] = jax.tree.map(operator.itemgetter(number), values)

    _over_all(loop, measures, jobs, take, tell)
    return dict(sorted(by_place.items())) if measures.wanted.by_tensor else total


def summed(loop: Loop, measures: Measures, jobs: Sequence[Job], tell: Progress = silent) -> dict[str, Any]:
    """`{tensor: sum of a measure over all its pieces}`, of a measure by tensor."""
    found: dict[str, Any] = {}

    def take(unit: Unit, values: Any) -> None:
        matrices = len(unit.layers) if unit.row is None else 1
        for name, span in zip(unit.names, unit.spans, strict=True):
            at = slice(span.start * matrices, span.stop * matrices)
            own = jax.tree.map(lambda leaf, at=at: leaf[at].sum(axis=0), values)
            found[name] = jax.tree.map(operator.add, found[name], own) if name in found else own

    _over_all(loop, measures, jobs, take, tell)
    return found


def _over_all(
    loop: Loop, measures: Measures, jobs: Sequence[Job], take: Callable[[Unit, Any], None], tell: Progress
) -> None:
    def do(unit: Unit) -> Any:
        steps = Measuring(unit, measures, loop.placement.spread(unit))
        return loop.passed_over(unit, steps, measures.compute, tell)

    loop.over_all(loop.pieces(jobs), do, take)


def _ordered(loop: Loop, measures: Measures, jobs: Sequence[Job], key: str) -> Ordered:
    """The order statistics of all the jobs' tensors together."""
    units = list(loop.pieces(jobs))

    def keys_of(unit: Unit) -> Any:
        return loop.passed_over(unit, Keying(unit, measures, loop.placement.alone(unit)), measures.compute)

    order = measures.wanted
    assert isinstance(order, Order)
    if loop.work.traced:
        return traced(order, units, keys_of)

    def measure() -> tuple[Any, Any]:
        entries = sum(job.parameter.size for job in jobs)
        cut = units[0].row is not None and entries > SMALL
        sample = sample_of(loop.work, jobs) if cut else None
        return tuple(on_host(order, units, entries, keys_of, loop.over_all, sample, agreed=loop.as_the_first))

    def fits(totals: Any) -> bool:
        with contextlib.suppress(KeyError):
            return totals[1] is None or bool(ends_at(totals[1], units))
        return False

    keys, ends = remembered(loop.journal, key, measure, fits)
    return Ordered(keys, None if ends is None else ends_at(ends, units))
