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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import ThreadpoolController

from cfmerge.core.call import of_expert
from cfmerge.core.survey import looked
from cfmerge.engine.account import Account
from cfmerge.engine.checks import kept_tensor
from cfmerge.engine.cutting import units_of
from cfmerge.engine.passes import Additive, Measures, Measuring, Together, UnitSteps, Unsolved
from cfmerge.engine.precision import Attempt, Outcome, compute_dtype, ways
from cfmerge.engine.surveys import Place, by_member, found_for, kind_of
from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Method
from cfmerge.planning.work import Job, Progress, Work, Writable, silent

WORKERS = 2  # units in work at once: one computes while another reads, or factorises on one core
WRITE_BEHIND = 8  # finished tensors
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
) -> Account:
    """Merges every job into the sinks, one for each result of its method.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
        CfmergeError: integers that do not agree.
    """
    account, loop = Account(), _Loop(work, memory, progress, stop)

    def take(unit: Unit, outcome: Outcome) -> None:
        if not work.traced:
            account.add(unit, outcome)
        tensors = np.asarray(outcome.tensors) if work.from_files else outcome.tensors
        for number, sink in enumerate(sinks):
            own = tensors if len(sinks) == 1 else tensors[:, number]
            for job, first, values in unit.parts(own):
                loop.behind(functools.partial(_write, sink, job, values, first))

    with loop:
        for job in work.jobs:
            loop.check_stop()
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
    progress: Progress = silent,
) -> None:
    """Hands every unit, in order, with the statistics of its tensors to `take`.

    Raises:
        NonFiniteError: a NaN or infinity in a model.
    """
    loop = _Loop(work, memory, progress, None)
    with loop:
        loop.over(work.merged, lambda unit: loop.accumulated(unit, compute or compute_dtype(work, unit.jobs)), take)


def _write(sink: Writable, job: Job, values: Any, first: int) -> None:
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
        if self.work.from_files:
            for model in (self.work.base, *self.work.experts):
                model.tensors.prepare()
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
        # Traced, the statistics of a whole stack would be kept: so each tensor sees all its experts at once.
        streamed = attempt.methods[0].additive and (self.work.statistics is not None or not self.work.traced)
        each = (Additive if streamed else Together)(attempt)
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
            kind: self._survey(method, [jobs[number] for number in numbers])
            for kind, (method, numbers) in by_member(methods).items()
        }
        surveying = {kind_of(method): method for method in methods if method.survey is not None}
        return {kind: found_for(method, found) for kind, method in surveying.items()}

    def _survey(self, method: Method, jobs: Sequence[Job]) -> Found:
        """The findings of one method: its look at the jobs, a pass for everything that it wants measured."""
        compute = compute_dtype(self.work, jobs)
        experts = len(self.work.experts)
        entries = sum(job.parameter.size for job in jobs)
        look, totals = looked(method, [of_expert(method, t) for t in range(experts)], entries), None
        with self._precision(compute):
            while True:
                try:
                    totals = self._measured(Measures(look.send(totals), experts, compute), jobs)
                except StopIteration as done:
                    return done.value
                except TRACED:
                    raise CfmergeError(
                        f"{method.name} surveys the whole model before it merges, which cannot be done under jit; "
                        "call it outside"
                    ) from None

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
