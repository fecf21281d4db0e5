"""How a unit is done, and done again where the first way was not precise enough.

    attempts = ways(unit, found)            a generator: yields an attempt, is sent its outcome, returns the last one

Everything that is decided while a merge runs, but for an expert that is left out, is decided here.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cfmerge.core.call import form_of
from cfmerge.core.several import reported
from cfmerge.engine.low_rank import CUT, rank_bound
from cfmerge.engine.units import Unit
from cfmerge.methods import Found, Method
from cfmerge.planning.work import Job, Work

# Relative error of a merged delta, measured, times the smallest eigenvalue of the system over the largest (what a
# method reports as `ridge_ratio`): when all is float32, and when float32 sums are solved in float64. For deltas that
# have full rank together; where they do not, and are not solved as such, about five times as much.
LOSS_OF_SOLVE = 7e-8
LOSS_OF_SUMS = 2e-8
TOLERANCE = {2: 1e-3, 4: 1e-4, 8: 1e-4}  # by the bytes of the output's dtype: bfloat16 rounds far more coarsely

Reports = Any  # {name: (segments, matrices)}; of a sweep a tuple of them


class Attempt(NamedTuple):
    """One way to do a unit.

    Attributes:
        statistics: solve these, from an earlier attempt, and read nothing.
        silent: it reads again what was counted as read before.
    """

    unit: Unit
    methods: Sequence[Method]
    found: Found | None
    compute: str
    statistics: Any = None
    silent: bool = False


class Outcome(NamedTuple):
    """The outcome of an attempt: `tensors (segments, *stored)`, or `(segments, results, *stored)` of a sweep."""

    tensors: Any
    reports: Reports
    statistics: Any = None  # of an additive method
    float64: int = 0  # tensors that float64 was needed for


def ways(unit: Unit, found: Found | None) -> Generator[Attempt, Outcome, Outcome]:
    """The attempts at a unit; returns the outcome that holds."""
    work, methods = unit.work, unit.methods
    usual = Attempt(unit, methods, found, "float32")
    if compute_dtype(work, unit.jobs) == "float64":
        return (yield usual._replace(compute="float64"))
    if work.traced:
        return (yield usual)
    low = _low_rank_form(unit) if work.statistics is None else None
    if low is not None:
        narrow = usual._replace(methods=[low], found=None)
        outcome = yield narrow
        if max(np.max(error) for error in reported(outcome.reports, "factor_error")) <= CUT:
            return (yield from _solved_again(narrow, outcome))
        usual = usual._replace(silent=True)
    outcome = yield from _solved_again(usual, (yield usual))
    if work.statistics is not None:  # their float32 sums are all there is
        return outcome
    additive = methods[0].additive
    weak = _weak(unit, outcome.reports, LOSS_OF_SUMS if additive else LOSS_OF_SOLVE)
    tensors = outcome.tensors
    for number in weak:
        single = Attempt(unit.only(number), [methods[number]], found, "float64", silent=True)
        tensors = _with(tensors, [number], (yield single).tensors, [0])
    return outcome._replace(tensors=tensors, float64=outcome.float64 if additive else len(weak), statistics=None)


def _solved_again(attempt: Attempt, outcome: Outcome) -> Generator[Attempt, Outcome, Outcome]:
    """The outcome, with the sums of ill-conditioned tensors solved in float64."""
    if outcome.statistics is None:
        return outcome
    weak = _weak(attempt.unit, outcome.reports, LOSS_OF_SOLVE)
    if len(weak) == 0:
        return outcome
    again = yield attempt._replace(compute="float64", statistics=outcome.statistics)
    return outcome._replace(tensors=_with(outcome.tensors, weak, again.tensors), float64=len(weak))


def _with(tensors: Any, numbers: Any, others: Any, places: Any = None) -> Any:
    """The tensors of a unit, those of these numbers replaced by others; if all are, these stay where they lie.

    Args:
        places: where they stand among the others; none: at the same numbers.
    """
    if len(tensors) == len(numbers):
        return others
    replaced = np.array(tensors)
    replaced[numbers] = np.asarray(others)[numbers if places is None else places]
    return replaced


def compute_dtype(work: Work, jobs: Sequence[Job]) -> str:
    """The dtype that jobs are computed in from the start: float64 where it is asked for, or comes in."""
    wide = work.precision == "float64" or any(job.parameter.dtype == "float64" for job in jobs)
    there = not work.traced or jax.config.read("jax_enable_x64")
    return "float64" if wide and there else "float32"


def _low_rank_form(unit: Unit) -> Method | None:
    """The method in its form for deltas of low rank, if it has one and all deltas look like it."""
    method = unit.methods[0]
    if method.form is None or len(unit.segments) > 1 or sorted(unit.job.layout) != ["i", "o"]:
        return None
    if form_of(method, 1) is None:
        return None
    rank, count = unit.rank(), len(unit.experts)
    if rank is None:
        rank = rank_bound(unit.base()[0], (unit.expert(t)[0][0] for t in unit.experts), count)
    elif 2 * rank * count > min(unit.job.seen_shape):  # no gain
        return None
    return None if rank is None else form_of(method, rank)


def _weak(unit: Unit, reports: Reports, loss: float) -> np.ndarray:
    """Numbers of the tensors that would miss the tolerance at this loss, if precision is left to us."""
    ratios = reported(reports, "ridge_ratio")
    if not ratios or unit.work.precision != "auto":
        return np.zeros(0, int)
    least = np.min([np.asarray(ratio).min(axis=1) for ratio in ratios], axis=0)
    return np.flatnonzero(least < loss / TOLERANCE[unit.job.dtype.itemsize])
