"""The loop: every unit of a pass, its base, then its experts one by one, then the result. There is no other.

    merge(work, sinks)        surveys first, then the pass that writes
    accumulate(work, write)   the statistics of every tensor, unsolved

Units are worked on by a few threads, and their results are taken in the order of the units, so that no result
depends on which thread was first. Where values are traced by JAX there are no threads, and no value is looked at.
"""

import contextlib
import functools
import importlib
import operator
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import ThreadpoolController

from cfmerge.engine.account import Account
from cfmerge.engine.checks import check_finite, check_ties, kept_tensor
from cfmerge.engine.precision import Attempt, Outcome, compute_dtype, ways
from cfmerge.engine.steps import Inputs, Settings, Steps, compiled, steps
from cfmerge.engine.surveys import by_member, found_for, kind_of, own_rows
from cfmerge.engine.units import Unit, units_of
from cfmerge.engine.work import Job, Progress, Work
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method, Survey
from cfmerge.methods._base import measure_jointly, xp_of
from cfmerge.methods._registry import listed, of_expert

WORKERS = 2  # units in work at once: one computes while another reads, or factorises on one core
WRITE_BEHIND = 8  # finished tensors
TRACED = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip


class Sink(Protocol):
    """Where named arrays go; pieces of a tensor come in any order, `first` being a piece's first entry."""

    def write(self, name: str, values: Any, first: int = 0) -> None: ...


def _silent(name: str, count: int) -> None:
    pass


# --- what is asked of the loop --------------------------------------------------------------------------------------


def merge(
    work: Work,
    sinks: Sequence[Sink],
    *,
    memory: int | None = None,
    progress: Progress = _silent,
    stop: threading.Event | None = None,
) -> Account:
    """Merges every job into the sinks, one for each result of its method.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
        CfmergeError: integers that do not agree, or tensors said to be tied that are not.
    """
    account, loop = Account(), _Loop(work, memory, progress, stop)

    def take(unit: Unit, outcome: Outcome) -> None:
        if not work.traced:
            account.add(unit, outcome)
        for number, job in enumerate(unit.jobs):
            results = [outcome.tensors[number]] if len(sinks) == 1 else outcome.tensors[number]
            for sink, result in zip(sinks, results, strict=True):
                loop.behind(functools.partial(_write, sink, job, result, unit.first))

    with loop:
        for job in work.jobs:
            loop.check_stop()
            if work.from_files:
                check_ties(work, job)
            if job.assignment.action == "keep-base":
                kept = kept_tensor(work, job)
                for sink in sinks:
                    _write(sink, job, kept, 0)
                loop.tell(job.name, job.bytes_read * (1 + len(job.sources)))
        found = loop.surveys(work.merged)
        loop.over(work.merged, lambda unit: loop.merged(unit, found.get(kind_of(unit.job.method))), take)
    return account


def accumulate(
    work: Work,
    take: Callable[[Unit, Any], None],
    *,
    compute: str | None = None,
    memory: int | None = None,
    progress: Progress = _silent,
) -> None:
    """Hands every unit, in order, with the statistics of its tensors to `take`.

    Raises:
        NonFiniteError: a NaN or infinity in a model.
    """
    loop = _Loop(work, memory, progress, None)
    with loop:
        loop.over(work.merged, lambda unit: loop.accumulated(unit, compute or compute_dtype(unit)), take)


def _write(sink: Sink, job: Job, values: Any, first: int) -> None:
    for name in job.writes:
        sink.write(name, values, first)


# --- the loop -------------------------------------------------------------------------------------------------------


class _Loop:
    """One run's threads, progress and interruption; a context in which libraries behave."""

    def __init__(self, work: Work, memory: int | None, progress: Progress, stop: threading.Event | None) -> None:
        self.work, self.memory, self._progress, self._stop = work, memory, progress, stop
        self._lock, self._context = threading.Lock(), contextlib.ExitStack()
        largest = max((job.working_bytes for job in work.merged), default=0) if memory is not None else 0
        self._workers = WORKERS if memory is None or largest * WORKERS <= memory else 1
        if not work.from_files:
            self._workers = 0
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> "_Loop":
        if not self.work.traced:
            self._context.enter_context(_blas().limit(limits=1, user_api="blas"))
        self._context.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # where rows become a Gram
        self._pool = ThreadPoolExecutor(self._workers, "merge") if self._workers else None
        self._writer = ThreadPoolExecutor(1, "write") if self._workers else None
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            while self._writing and error[0] is None:
                self._writing.popleft().result()
        finally:
            for pool in (self._pool, self._writer):
                if pool is not None:
                    pool.shutdown(cancel_futures=True)
            self._context.close()

    def over(self, jobs: Sequence[Job], do: Callable[[Unit], Any], take: Callable[[Unit, Any], None]) -> None:
        """`take(unit, do(unit))` for every unit of the jobs, in order; `do` runs in the threads."""
        waiting: deque[tuple[Unit, Future[Any]]] = deque()
        for unit in units_of(self.work, jobs, self.memory):
            self.check_stop()
            if self._pool is None:
                take(unit, do(unit))
                continue
            waiting.append((unit, self._pool.submit(do, unit)))
            if len(waiting) > self._workers:
                done, future = waiting.popleft()
                take(done, future.result())
        while waiting:
            done, future = waiting.popleft()
            take(done, future.result())

    def behind(self, write: Callable[[], None]) -> None:
        """Runs it in the writing thread; waits while too much is unwritten."""
        if self._writer is None:
            return write()
        self._writing.append(self._writer.submit(write))
        while len(self._writing) > WRITE_BEHIND:
            self._writing.popleft().result()

    def tell(self, name: str, count: int) -> None:
        with self._lock:
            self._progress(name, count)

    def check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise KeyboardInterrupt

    # --- one unit -----------------------------------------------------------------------------------------------------

    def passed_over(self, unit: Unit, each: "UnitSteps", compute: str, tell: Progress) -> Any:
        """The base of a unit, then its experts one by one, through the steps."""
        with self._precision(compute):
            base = jnp.asarray(unit.base())
            tell(unit.job.name, base.nbytes)
            state = each.start(base)
            for t in unit.experts:
                expert = jnp.asarray(unit.expert(t))
                state = each.update(state, base, t, expert, unit.inputs(t))
                tell(unit.job.name, expert.nbytes)
            return each.finish(state, base)

    def merged(self, unit: Unit, found: Found | None) -> Outcome:
        """The merged tensors of a unit."""
        asking = ways(unit, found)
        attempt = next(asking)
        while True:
            try:
                attempt = asking.send(self._tried(attempt))
            except StopIteration as done:
                return done.value

    def _tried(self, attempt: Attempt) -> Outcome:
        each = (_Additive if attempt.methods[0].additive else _Together)(attempt)
        if attempt.statistics is not None:
            with self._precision(attempt.compute):
                base = jnp.asarray(attempt.unit.base())
                return each.finish(jax.tree.map(_doubled, attempt.statistics), base)
        return self.passed_over(attempt.unit, each, attempt.compute, _silent if attempt.silent else self.tell)

    def accumulated(self, unit: Unit, compute: str) -> Any:
        """The statistics of a unit's tensors when all experts were seen."""
        each = _Unsolved(Attempt(unit, unit.methods, None, compute))
        return self.passed_over(unit, each, compute, self.tell)

    def _precision(self, compute: str) -> Any:
        return contextlib.nullcontext() if self.work.traced else jax.enable_x64(compute == "float64")

    # --- surveys ------------------------------------------------------------------------------------------------------

    def surveys(self, jobs: Sequence[Job]) -> dict[Any, Found | None]:
        """The findings of the methods that survey the whole model, each of the tensors that it merges."""
        methods = [job.method for job in jobs]
        found = {
            kind: self._survey(method, [jobs[number] for number in numbers])
            for kind, (method, numbers) in by_member(methods).items()
        }
        surveying = {kind_of(method): method for method in methods if method.survey is not None}
        return {kind: found_for(method, found) for kind, method in surveying.items()}

    def _survey(self, method: Method, jobs: Sequence[Job]) -> Found:
        double = self.work.precision == "float64" or any(job.parameter.dtype == "float64" for job in jobs)
        compute = "float64" if double and (not self.work.traced or jax.config.read("jax_enable_x64")) else "float32"
        found: Any = None
        with self._precision(compute):
            while (following := method.survey(found)) is not None:  # type: ignore[misc]
                try:
                    found = self._survey_pass(method, following, found, jobs, compute)
                except TRACED:
                    raise CfmergeError(
                        f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                        "call it outside"
                    ) from None
        return found if isinstance(found, Found) else Found(found)

    def _survey_pass(self, method: Method, following: Survey, found: Any, jobs: Sequence[Job], compute: str) -> Any:
        own = [following] * len(self.work.experts)
        if listed(method):
            own = [of_expert(method, t).survey(found) for t in range(len(own))]  # type: ignore[misc]
        measures = _Measures(own, compute)
        measured: dict[Any, Any] = {}
        total: Any = None
        entries = 0

        def take(unit: Unit, values: Any) -> None:
            nonlocal total, entries
            entries += sum(segment.count or segment.job.parameter.size for segment in unit.segments)
            if following.by_tensor:
                for number, place in enumerate(unit.places):
                    measured[place] = jax.tree.map(operator.itemgetter(number), values)
            else:
                total = values if total is None else jax.tree.map(lambda a, b: a + b, total, values)

        self.over(jobs, lambda unit: self.passed_over(unit, _Measuring(unit, measures), compute, _silent), take)
        totals = [dict(sorted(measured.items())) if following.by_tensor else total]
        totals += [entries] if following.sized else []
        if not listed(method) or following.joint:
            return following.combine(*totals)
        return jax.tree.map(own_rows, *(survey.combine(*totals) for survey in own))


@functools.cache
def _blas() -> ThreadpoolController:
    """LAPACK on a processor is OpenBLAS, whose threads fight with XLA's: 0.17 s of Cholesky have become 2 s.

    jaxlib takes it from SciPy when it first needs it, and what is not loaded is not limited.
    """
    importlib.import_module("scipy.linalg")
    return ThreadpoolController()


def _doubled(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


# --- the steps of a pass, for one unit ------------------------------------------------------------------------------


class UnitSteps(Protocol):
    """What a pass does with one unit."""

    def start(self, base: jax.Array) -> Any: ...

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any: ...

    def finish(self, state: Any, base: jax.Array) -> Any: ...


class _Merging:
    """What all steps that merge share: the compiled code, the numbers, and the checks of values."""

    def __init__(self, attempt: Attempt) -> None:
        self.unit, self.attempt = attempt.unit, attempt
        self.traced = attempt.unit.work.traced
        make = steps if self.traced else compiled
        self.pattern = of_expert(attempt.methods[0], 0)
        self.by: Steps = make(self.pattern, self.unit.job.layout, attempt.compute)
        self.settings: list[Settings] = self.unit.settings(attempt.methods, attempt.found)
        self.order = {number: place for place, number in enumerate(self.unit.experts, 1)}

    def checked(self, base: jax.Array, number: int | None, flags: Any) -> None:
        """Raises `NonFiniteError` unless the flags of an expert (of the result: None) are all set."""
        if not self.traced:  # looking at them waits: steps that are only queued would hold all experts' buffers
            check_finite(self.unit, base, number, np.asarray(flags))

    def outcome(self, merged: Any, reports: Any, statistics: Any = None) -> Outcome:
        told = reports if isinstance(reports, tuple) else _by_result(reports, self.attempt.methods[0].results)
        if not self.traced:
            told = jax.tree.map(np.asarray, told)
        return Outcome(merged, told, statistics)


class _Additive(_Merging):
    """A statistic of a fixed size, that each expert is added to."""

    def start(self, base: jax.Array) -> Any:
        kept = self.unit.kept(self.pattern, self.attempt.compute)
        return self.by.start(self.settings[0], base) if kept is None else kept

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        state, finite = self.by.step(self.settings[self.order[number]], state, base, expert, inputs)
        self.checked(base, number, finite)
        return state

    def finish(self, state: Any, base: jax.Array) -> Any:
        merged, reports, finite = self.by.finish(self.settings[0], state, base, self.unit.job.dtype.name)
        self.checked(base, None, finite)
        return self.outcome(merged, reports, state)


class _Unsolved(_Additive):
    """The statistic itself."""

    def finish(self, state: Any, base: jax.Array) -> Any:
        return state


class _Together(_Merging):
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


def _by_result(reports: dict[str, Any], results: int) -> tuple[dict[str, Any], ...]:
    if results == 1:
        return (reports,)
    return tuple(
        {key.split(":", 1)[1]: value for key, value in reports.items() if key.startswith(f"{number}:")}
        for number in range(results)
    )


class _Measures:
    """The measures of one survey, one for each expert, compiled for every shape that they meet."""

    def __init__(self, surveys: Sequence[Survey], compute: str) -> None:
        self.surveys, self.compute = surveys, compute
        self.jointly = functools.partial(measure_jointly, surveys)
        self.made: dict[Any, Any] = {}

    def function(self, measure: Any, unit: Unit) -> Any:
        method, first = unit.job.method, self.surveys[0]
        key = (measure, unit.job.layout, method.scope, method.moments)
        if key not in self.made:
            plain = steps(method, unit.job.layout, self.compute)
            self.made[key] = jax.jit(plain.measured(measure, first.joint, summed=not first.by_tensor))
        return self.made[key]


class _Measuring:
    """A survey's measure of a unit: `(experts, ...)`, or of all experts at once `(...)`; by tensor `(stack, ...)`."""

    def __init__(self, unit: Unit, measures: _Measures) -> None:
        self.unit, self.measures, self.first = unit, measures, measures.surveys[0]

    def start(self, base: jax.Array) -> Any:
        self._check(base, base, None)
        return {}

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        self._check(base, expert, number)
        if self.first.joint:
            return {**state, number: (expert, inputs)}
        function = self.measures.function(self.measures.surveys[number].measure, self.unit)
        return {**state, number: _on_host(function([base, expert], [inputs]))}

    def finish(self, state: Any, base: jax.Array) -> Any:
        if self.first.joint:
            experts, inputs = [list(column) for column in zip(*state.values(), strict=True)]
            return _on_host(self.measures.function(self.measures.jointly, self.unit)([base, *experts], inputs))
        nothing = jax.tree.map(lambda leaf: 0 * leaf, next(iter(state.values())))  # of an expert that lacks the tensor
        values = [state.get(number, nothing) for number in range(len(self.measures.surveys))]
        return jax.tree.map(lambda *leaves: xp_of(*leaves).stack(leaves, 1 if self.first.by_tensor else 0), *values)

    def _check(self, base: jax.Array, array: jax.Array, number: int | None) -> None:
        """A NaN would go from a survey into every tensor."""
        if not self.unit.work.traced:
            finite = np.isfinite(np.asarray(array)).reshape(len(self.unit.segments), -1).all(axis=1)
            check_finite(self.unit, base, number, finite)


def _on_host(values: Any) -> Any:
    """Sums over a whole model are kept in 64 bits; traced values stay as they are."""

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = np.asarray(leaf)
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)

    return jax.tree.map(host, values)
