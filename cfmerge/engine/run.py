"""The loop: every unit of a pass, its base, then its experts one by one, then the result. There is no other.

    merge(work, sinks)        surveys first, then the pass that writes
    accumulate(work, write)   the statistics of every tensor, unsolved

Units are worked on by a few threads, and their results are taken in the order of the units, so that no result
depends on which thread was first. Where values are traced by JAX there are no threads, and no value is looked at.
"""

import contextlib
import functools
import importlib
import itertools
import operator
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import ThreadpoolController

from cfmerge.core.call import of_expert
from cfmerge.core.survey import looked
from cfmerge.engine.account import Account, Told, told_of
from cfmerge.engine.checks import kept_tensor
from cfmerge.engine.cutting import units_of
from cfmerge.engine.journal import Forgetful, Journal, bytes_of, ranges_of, remembered, whole
from cfmerge.engine.passes import Additive, Measures, Measuring, Together, UnitSteps, Unsolved
from cfmerge.engine.precision import Attempt, Outcome, compute_dtype, ways
from cfmerge.engine.surveys import Place, by_member, found_for, kind_of
from cfmerge.engine.units import Unit
from cfmerge.engine.writing import Writer, written
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method
from cfmerge.planning.work import Job, Progress, Work, Writable, silent

WORKERS = 2  # units in work at once: one computes while another reads, or factorises on one core
TRACED = (
    jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip


# --- what is asked of the loop --------------------------------------------------------------------------------------


def merge(
    work: Work,
    sinks: Sequence[Writable],
    *,
    memory: int | None = None,
    progress: Progress = silent,
    stop: threading.Event | None = None,
    journal: Journal | None = None,
) -> Account:
    """Merges every job into the sinks, one for each result of its method; passes over what the journal has done.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
        CfmergeError: integers that do not agree.
    """
    journal = journal or Forgetful()
    account, loop = Account(), _Loop(work, memory, progress, stop, journal)
    by_name = {job.name: job for job in work.jobs}
    for earlier in journal.told():
        account.add(Told(*earlier), by_name)

    def take(unit: Unit, outcome: Outcome) -> None:
        told = Told() if work.traced else told_of(unit, outcome)
        account.add(told, by_name)
        tensors = np.asarray(outcome.tensors) if work.from_files else outcome.tensors
        each = [tensors] if len(sinks) == 1 else [tensors[:, number] for number in range(len(sinks))]
        loop.writer.take(sinks, [unit.parts(own) for own in each], ranges_of(unit), told)

    with loop:
        for job in work.jobs:
            loop.check_stop()
            if job.assignment.action == "keep-base":
                if not journal.done(whole(job)):
                    kept = kept_tensor(work, job)
                    for sink in sinks:
                        written(sink, job, 0, kept)
                    journal.mark(whole(job), Told())
                loop.tell(job.name, job.bytes_read * (1 + len(job.sources)))
        found = loop.surveys(work.merged)
        loop.over(work.merged, lambda unit: loop.merged(unit, found.get(kind_of(unit.job.method))), take, loop.to_do)
    return account


def accumulate(
    work: Work,
    take: Callable[[Unit, Any], None],
    *,
    compute: str | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> None:
    """Hands every unit, in order, with the statistics of its tensors to `take`.

    Raises:
        NonFiniteError: a NaN or infinity in a model.
    """
    loop = _Loop(work, memory, progress, None, Forgetful())
    with loop:
        loop.over(work.merged, lambda unit: loop.accumulated(unit, compute or compute_dtype(work, unit.jobs)), take)


# --- the loop -------------------------------------------------------------------------------------------------------


class _Loop:
    """One run's threads, progress and interruption; a context in which libraries behave."""

    def __init__(
        self, work: Work, memory: int | None, progress: Progress, stop: threading.Event | None, journal: Journal
    ) -> None:
        self.work, self.memory, self._progress, self._stop, self._journal = work, memory, progress, stop, journal
        self._lock, self._context = threading.Lock(), contextlib.ExitStack()
        largest = max((job.working_bytes for job in work.merged), default=0) if memory is not None else 0
        self._workers = WORKERS if memory is None or largest * WORKERS <= memory else 1
        if not work.from_files:
            self._workers = 0
        self.writer = Writer(journal, threaded=self._workers > 0)

    def __enter__(self) -> "_Loop":
        if self.work.from_files:
            for model in (self.work.base, *self.work.experts):
                model.tensors.prepare()
        if not self.work.traced:
            self._context.enter_context(_blas().limit(limits=1, user_api="blas"))
        self._context.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # where rows become a Gram
        self._pool = ThreadPoolExecutor(self._workers, "merge") if self._workers else None
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.writer.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self.writer.close()
            self._context.close()

    def over(
        self,
        jobs: Sequence[Job],
        do: Callable[[Unit], Any],
        take: Callable[[Unit, Any], None],
        wanted: Callable[[Unit], bool] = lambda unit: True,
    ) -> None:
        """`take(unit, do(unit))` for every wanted unit of the jobs, in order; `do` runs in the threads."""
        waiting: deque[tuple[Unit, Future[Any]]] = deque()
        for unit in filter(wanted, units_of(self.work, jobs, self.memory)):
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

    def to_do(self, unit: Unit) -> bool:
        """Whether a unit is still to be merged; the progress of one that is done is told."""
        if not self._journal.done(ranges_of(unit)):
            return True
        for name, count in bytes_of(unit).items():
            self.tell(name, count)
        return False

    def tell(self, name: str, count: int) -> None:
        with self._lock:
            self._progress(name, count)

    def check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise KeyboardInterrupt

    # --- one unit -----------------------------------------------------------------------------------------------------

    def passed_over(self, unit: Unit, each: UnitSteps, compute: str, tell: Progress) -> Any:
        """The base of a unit, then its experts one by one, through the steps."""
        with self._precision(compute):
            base = jnp.asarray(unit.base())
            tell(unit.job.name, unit.entries * base.dtype.itemsize)
            state = each.start(base)
            for t in each.experts:
                array, minus = unit.expert(t)
                expert = jnp.asarray(array)
                state = each.update(state, base, t, expert, unit.inputs(t)._replace(minus=minus))
                tell(unit.job.name, unit.entries * expert.dtype.itemsize)
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
        each = (Additive if attempt.methods[0].additive else Together)(attempt)
        if attempt.statistics is not None:
            with self._precision(attempt.compute):
                base = jnp.asarray(attempt.unit.base())
                return each.finish(jax.tree.map(_doubled, attempt.statistics), base)
        return self.passed_over(attempt.unit, each, attempt.compute, silent if attempt.silent else self.tell)

    def accumulated(self, unit: Unit, compute: str) -> Any:
        """The statistics of a unit's tensors when all experts were seen."""
        each = Unsolved(Attempt(unit, unit.methods, None, compute))
        return self.passed_over(unit, each, compute, self.tell)

    def _precision(self, compute: str) -> Any:
        return contextlib.nullcontext() if self.work.traced else jax.enable_x64(compute == "float64")

    # --- surveys ------------------------------------------------------------------------------------------------------

    def surveys(self, jobs: Sequence[Job]) -> dict[Any, Found | None]:
        """The findings of the methods that survey the whole model, each of the tensors that it merges."""
        methods = [job.method for job in jobs]
        found = {
            kind: self._survey(place, method, [jobs[number] for number in numbers])
            for place, (kind, (method, numbers)) in enumerate(by_member(methods).items())
        }
        surveying = {kind_of(method): method for method in methods if method.survey is not None}
        return {kind: found_for(method, found) for kind, method in surveying.items()}

    def _survey(self, place: int, method: Method, jobs: Sequence[Job]) -> Found:
        """The findings of one method: its look at the jobs, a pass for everything that it wants measured.

        A pass that an earlier run has made is not made again: the look is sent the totals that it was sent then.
        """
        compute = compute_dtype(self.work, jobs)
        experts = len(self.work.experts)
        entries = sum(job.parameter.size for job in jobs)
        look, totals = looked(method, [of_expert(method, t) for t in range(experts)], entries), None
        numbers = itertools.count()
        with self._precision(compute):
            while True:
                try:
                    wanted = look.send(totals)
                    measure = functools.partial(self._measured, Measures(wanted, experts, compute), jobs)
                    places = functools.partial(self._places, jobs) if wanted.by_tensor else None
                    totals = remembered(self._journal, f"survey {place}, pass {next(numbers)}", measure, places)
                except StopIteration as done:
                    return done.value
                except TRACED:
                    raise CfmergeError(
                        f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                        "call it outside"
                    ) from None

    def _places(self, jobs: Sequence[Job]) -> list[Place]:
        return [place for unit in units_of(self.work, jobs, self.memory) for place in unit.places]

    def _measured(self, measures: Measures, jobs: Sequence[Job]) -> Any:
        """The totals of a measure over the jobs' tensors."""
        by_place: dict[Place, Any] = {}
        total: Any = None

        def take(unit: Unit, values: Any) -> None:
            nonlocal total
            if not measures.wanted.by_tensor:
                total = values if total is None else jax.tree.map(operator.add, total, values)
                return
            for number, place in enumerate(unit.places):
                by_place[place] = jax.tree.map(operator.itemgetter(number), values)

        steps_of = functools.partial(Measuring, measures=measures)
        self.over(jobs, lambda unit: self.passed_over(unit, steps_of(unit), measures.compute, silent), take)
        return dict(sorted(by_place.items())) if measures.wanted.by_tensor else total


@functools.cache
def _blas() -> ThreadpoolController:
    """LAPACK on a processor is OpenBLAS, whose threads fight with XLA's: 0.17 s of Cholesky have become 2 s.

    jaxlib takes it from SciPy when it first needs it, and what is not loaded is not limited.
    """
    importlib.import_module("scipy.linalg")
    return ThreadpoolController()


def _doubled(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
