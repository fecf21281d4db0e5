"""How a unit is done, and done again where the first way was not precise enough.

    attempts = ways(unit, found)            a generator: yields an attempt, is sent its outcome, returns the last one

Everything that is decided while a merge runs, but for an expert that is left out, is decided here.
"""

import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.call import form_of
from cfmerge.core.part import Composer
from cfmerge.core.several import reported
from cfmerge.engine.low_rank import CUT, LEAST_INPUTS, rank_bound
from cfmerge.engine.sampling import Sample
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
        joint: the experts' factors are read, and merged in their joint basis.
    """

    unit: Unit
    methods: Sequence[Method]
    found: Found | None
    compute: str
    statistics: Any = None
    silent: bool = False
    joint: bool = False


class Outcome(NamedTuple):
    """The outcome of an attempt: `tensors (segments, *stored)`, or `(segments, results, *stored)` of a sweep.

    Of a merge in a joint basis whose factors are wanted, `(left, right)` instead.
    """

    tensors: Any
    reports: Reports
    statistics: Any = None  # of an additive method
    float64: tuple[int, ...] = ()  # numbers of the segments that float64 was needed for
    sample: Sample | None = None  # of what was read


def together(unit: Unit, groups: Sequence[Unit], outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a unit whose layers were solved some at a time, in groups of its pieces."""
    parts, reports = dict[int, Any](), dict[int, Any]()
    for group, outcome in zip(groups, outcomes, strict=True):
        for number, segment in enumerate(group.segments):
            one = slice(number, number + 1)
            parts[segment.first] = jax.tree.map(lambda leaf, one=one: leaf[one], outcome.tensors)
            reports[segment.first] = jax.tree.map(lambda leaf, one=one: leaf[one], outcome.reports)
    first = [parts[start] for start in sorted(parts)]
    axis = 1 if isinstance(unit.job.method, Composer) else -len(unit.job.shape)

    def joined(*leaves: Any) -> Any:
        return (jnp if isinstance(leaves[0], jax.Array) else np).concatenate(leaves, axis=axis)

    tensors = jax.tree.map(joined, *first)
    in_order = [reports[start] for start in sorted(reports)]
    double = (0,) if any(outcome.float64 for outcome in outcomes) else ()
    samples = [outcome.sample for outcome in outcomes if outcome.sample]
    sample = functools.reduce(Sample.plus, samples) if samples else None
    return Outcome(tensors, jax.tree.map(lambda *own: np.concatenate(own, 1), *in_order), None, double, sample)


def ways(unit: Unit, found: Found | None) -> Generator[Attempt, Outcome, Outcome]:
    """The attempts at a unit; returns the outcome that holds."""
    work, methods = unit.work, unit.methods
    usual = Attempt(unit, methods, found, "float32")
    if unit.job.joint is not None:  # cores are small: float64 from the start
        return (yield usual._replace(compute="float64", joint=True))
    if compute_dtype(work, unit.jobs) == "float64":
        return (yield usual._replace(compute="float64"))
    if work.traced:
        return (yield usual)
    rank = low_rank(unit)
    if rank is not None:
        forms = [form for method in methods if (form := form_of(method, rank)) is not None]
        narrow = usual._replace(methods=forms, found=None)
        outcome = yield narrow
        missed = [n for n, error in enumerate(_largest(outcome.reports, "factor_error")) if error > CUT]
        if len(missed) < len(unit.segments):
            outcome = yield from _solved_again(narrow, outcome)
            for number in missed:  # joined with others, whose deltas have a low rank
                single = usual._replace(unit=unit.only(number), methods=[methods[number]], silent=True)
                alone = yield from _in_full(single)
                outcome = _replaced(outcome, number, alone)
            return outcome._replace(statistics=None)
    return (yield from _in_full(usual._replace(silent=rank is not None)))


def _in_full(usual: Attempt) -> Generator[Attempt, Outcome, Outcome]:
    """The outcome of the usual form, in float64 where that is needed."""
    unit, methods, work = usual.unit, usual.methods, usual.unit.work
    outcome = yield from _solved_again(usual, (yield usual))
    if work.statistics is not None:  # their float32 sums are all there is
        return outcome
    additive = methods[0].additive
    weak = _weak(unit, outcome.reports, LOSS_OF_SUMS if additive else LOSS_OF_SOLVE)
    tensors = outcome.tensors
    for number in weak:
        single = Attempt(unit.only(number), [methods[number]], usual.found, "float64", silent=True)
        tensors = _with(tensors, [number], (yield single).tensors, [0])
    double = outcome.float64 if additive else tuple(weak.tolist())
    return outcome._replace(tensors=tensors, float64=double, statistics=None)


def _solved_again(attempt: Attempt, outcome: Outcome) -> Generator[Attempt, Outcome, Outcome]:
    """The outcome, with the sums of ill-conditioned tensors solved in float64."""
    if outcome.statistics is None:
        return outcome
    weak = _weak(attempt.unit, outcome.reports, LOSS_OF_SOLVE)
    if len(weak) == 0:
        return outcome
    again = yield attempt._replace(compute="float64", statistics=outcome.statistics)
    tensors = _with(outcome.tensors, weak, again.tensors)
    return outcome._replace(tensors=tensors, float64=tuple(weak.tolist()))


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


def low_rank(unit: Unit) -> int | None:
    """The rank to take dense deltas of, if the method has a form for it and all of them look like it.

    Units that were joined have one rank, or none: see `placement`.
    """
    method, work = unit.methods[0], unit.work
    wide = work.traced or work.statistics is not None or compute_dtype(work, unit.jobs) == "float64"
    wide = wide or unit.job.joint is not None
    if wide or method.form is None or sorted(unit.job.layout) != ["i", "o"]:
        return None
    several = len(unit.segments) > 1
    if form_of(method, 1) is None or (several and min(unit.job.seen_shape) < LEAST_INPUTS):
        return None
    ranks = {_rank_of(unit.only(number)) for number in range(len(unit.segments))}
    return ranks.pop() if len(ranks) == 1 else None


def _rank_of(unit: Unit) -> int | None:
    """The rank that one matrix's deltas look like, if taking them of it pays."""
    base = unit.base()[0]
    return rank_bound(base, (_tensor(base, *unit.expert(t)) for t in unit.experts), len(unit.experts))


def _tensor(base: Any, stack: Any, minus: Any) -> Any:
    """The expert's tensor; or base and delta, where the delta came instead."""
    return stack[0] if minus is None else stack[0] + (1 - minus[0]) * base


def _replaced(outcome: Outcome, number: int, alone: Outcome) -> Outcome:
    """The outcome with one tensor done again, alone."""

    def put(array: Any, own: Any) -> Any:
        return _with(array, [number], own, [0])

    reports = jax.tree.map(put, outcome.reports, alone.reports)
    return Outcome(put(outcome.tensors, alone.tensors), reports, None, outcome.float64 + alone.float64)


def _largest(reports: Reports, name: str) -> np.ndarray:
    """The largest value of a report for each tensor, of all results."""
    return np.max([np.asarray(values).max(axis=1) for values in reported(reports, name)], axis=0)


def _weak(unit: Unit, reports: Reports, loss: float) -> np.ndarray:
    """Numbers of the tensors that would miss the tolerance at this loss, if precision is left to us."""
    ratios = reported(reports, "ridge_ratio")
    if not ratios or unit.work.precision != "auto":
        return np.zeros(0, int)
    least = np.min([np.asarray(ratio).min(axis=1) for ratio in ratios], axis=0)
    return np.flatnonzero(least < loss / TOLERANCE[unit.job.dtype.itemsize])
