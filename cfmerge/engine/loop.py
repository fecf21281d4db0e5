"""The loop: every unit of a pass, its base, then its experts one by one, then the result. There is no other.

Units are worked on by a few threads, and their results are taken in the order of the units, so that no result
depends on which thread was first. Where values are traced by JAX there are no threads, and no value is looked at.
"""

import contextlib
import dataclasses
import functools
import importlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from threadpoolctl import ThreadpoolController

from cfmerge.engine.compiling import cached
from cfmerge.engine.cutting import units_of
from cfmerge.engine.inputs import INPUTS
from cfmerge.engine.journal import Journal, bytes_of, ranges_of
from cfmerge.engine.passes import Additive, Joint, Together, UnitSteps, Unsolved
from cfmerge.engine.placement import Placement
from cfmerge.engine.precision import Attempt, Outcome, compute_dtype, together, ways
from cfmerge.engine.processes import joined, mine
from cfmerge.engine.room import Room
from cfmerge.engine.sampling import Sampler, sampler_of
from cfmerge.engine.surveys import looks_within
from cfmerge.engine.units import Unit
from cfmerge.engine.within import found_within
from cfmerge.engine.writing import Writer
from cfmerge.methods import Found
from cfmerge.planning.work import Job, Progress, Work, silent

WORKERS = 2  # units in work at once: one computes while another reads, or factorises on one core


class Loop:
    """One run's threads, progress and interruption; a context in which libraries behave."""

    def __init__(
        self,
        work: Work,
        memory: int | None,
        placement: Placement,
        progress: Progress,
        stop: threading.Event | None,
        journal: Journal,
        as_factors: bool = False,
    ) -> None:
        self.work, self.memory, self._progress, self._stop, self.journal = work, memory, progress, stop, journal
        self.placement, self.processes = placement.within(memory), placement.processes
        self._as_factors = as_factors  # sinks take what is merged in a joint basis as factors
        self._lock, self._context = threading.Lock(), contextlib.ExitStack()
        self._looks: dict[str, Future[dict[Any, Any]]] = {}  # within tensors that come in pieces
        self._workers = WORKERS if work.from_files else 0
        self._room = Room(memory)
        self.writer = Writer(journal, threaded=self._workers > 0)

    def __enter__(self) -> "Loop":
        if self.work.from_files:
            self._context.enter_context(cached())
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

    def units(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """The jobs as units; see `units_of`."""
        return units_of(self.work, jobs, self.memory)

    def pieces(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """The same for passes that write no tensors: layers that do not lie in turn are units of their own."""
        return (piece for unit in self.units(jobs) for piece in unit.pieces)

    def over(self, units: Iterable[Unit], do: Callable[[Unit], Any], take: Callable[[Unit, Any], None]) -> None:
        """`take(unit, do(unit))` for every unit of this process, in order; `do` runs in the threads."""
        if self.processes.count > 1:
            units = mine(self.processes, list(units))
        waiting: deque[tuple[Unit, Future[Any]]] = deque()
        for unit in self.placement.grouped(units):
            self.check_stop()
            if self._pool is None:
                take(unit, do(unit))
                continue
            waiting.append((unit, self._pool.submit(self._in_room, do, unit)))
            if len(waiting) > self._workers:
                done, future = waiting.popleft()
                take(done, future.result())
        while waiting:
            done, future = waiting.popleft()
            take(done, future.result())

    def _in_room(self, do: Callable[[Unit], Any], unit: Unit) -> Any:
        with self._room.holding(unit.working_bytes):
            return do(unit)

    def over_all(self, units: Iterable[Unit], do: Callable[[Unit], Any], take: Callable[[Unit, Any], None]) -> None:
        """The same, and `take` sees the units of all processes, in order."""
        if self.processes.count == 1:
            return self.over(units, do, take)
        units, own = list(units), list[tuple[Unit, Any]]()
        self.over(units, do, lambda unit, value: own.append((unit, value)))
        for unit, value in joined(self.processes, "pass", units, own):
            take(unit, value)

    def as_the_first(self, value: Any) -> Any:
        """The value that the first process has here."""
        return self.processes.gathered("first", value)[0]

    def to_do(self, unit: Unit) -> bool:
        """Whether a unit is still to be merged; the progress of one that is done is told."""
        if not self.journal.done(ranges_of(unit)):
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
        self.processes.check()

    def precision(self, compute: str) -> Any:
        """The context in which arrays have the computing dtype."""
        return contextlib.nullcontext() if self.work.traced else jax.enable_x64(compute == "float64")

    # --- one unit -----------------------------------------------------------------------------------------------------

    def passed_over(
        self,
        unit: Unit,
        each: UnitSteps,
        compute: str,
        tell: Progress = silent,
        joint: bool = False,
        sampler: Sampler | None = None,
    ) -> Any:
        """The base of a unit, then its experts one by one, through the steps; in a joint basis, their factors."""
        with self.precision(compute):
            spread = each.spread
            read = unit.base()
            if sampler is not None:
                sampler.base(read)
            base = spread.stored(read)
            tell(unit.job.name, unit.entries * base.dtype.itemsize)
            state = each.start(base)
            for t in each.experts:
                array, minus = (unit.factors(t), None) if joint else unit.expert(t)
                if sampler is not None:
                    sampler.expert(t, array, minus)
                expert = jax.tree.map(spread.stored, array)
                inputs = spread.put(unit.inputs(t)._replace(minus=minus), INPUTS)
                state = each.update(state, base, t, expert, inputs)
                tell(unit.job.name, unit.entries * (base if joint else expert).dtype.itemsize)
            return each.finish(state, base)

    def merged(self, unit: Unit, found: Found | None) -> Outcome:
        """The merged tensors of a unit."""
        if unit.at_once:
            groups = list(self.placement.grouped(unit.pieces))
            return together(unit, groups, [self.merged(group, found) for group in groups])
        if looks_within(unit.job.method):
            found = self._within(unit)
        asking, sampler = ways(unit, found), sampler_of(unit)
        attempt = next(asking)
        while True:
            try:
                attempt = asking.send(self._tried(attempt, sampler))
            except StopIteration as done:
                return done.value._replace(sample=sampler and sampler.told())

    def _tried(self, attempt: Attempt, sampler: Sampler | None) -> Outcome:
        # Rows are read once by one program for all experts; traced, the statistics of a whole stack would be kept.
        at_once = self.work.statistics is None and (self.work.traced or attempt.unit.row is not None)
        streamed = attempt.methods[0].additive and not at_once
        with self.precision(attempt.compute):
            spread = self.placement.spread(attempt.unit)
            if attempt.joint:  # adapters that do not change a tensor leave the base, which is no product
                each: UnitSteps = Joint(attempt, spread, self._as_factors and any(attempt.unit.job.joint or ()))
            else:
                each = (Additive if streamed else Together)(attempt, spread)
            if attempt.statistics is not None:
                base = each.spread.stored(attempt.unit.base())
                return each.finish(jax.tree.map(_doubled, attempt.statistics), base)
        tell, sampler = (silent, None) if attempt.silent else (self.tell, sampler)
        return self.passed_over(attempt.unit, each, attempt.compute, tell, attempt.joint, sampler)

    def accumulated(self, unit: Unit, compute: str) -> Any:
        """The statistics of a unit's tensors when all experts were seen."""
        with self.precision(compute):
            each = Unsolved(Attempt(unit, unit.methods, None, compute), self.placement.spread(unit))
        return self.passed_over(unit, each, compute, self.tell)

    def _within(self, unit: Unit) -> Found:
        """The findings about the tensors of a unit."""
        whole = tuple(one for one in unit.segments if one.entries == one.job.parameter.size)
        found = {}
        if whole:
            found = self._looked([dataclasses.replace(unit, segments=whole)], _one_by_one)
        for job in {one.job.name: one.job for one in unit.segments if one not in whole}.values():
            found |= self._looked_once(job)
        return Found(None, found)

    def _looked(self, units: Sequence[Unit], over: Any) -> dict[Any, Any]:
        compute = compute_dtype(self.work, units[0].jobs)

        def pass_over(unit: Unit, each: UnitSteps) -> Any:
            return self.passed_over(unit, each, compute)

        return found_within(units, pass_over, over, compute, self.placement.alone)

    def _looked_once(self, job: Job) -> dict[Any, Any]:
        """The findings about a tensor that comes in pieces; whoever comes first finds them, with threads of its own."""
        with self._lock:
            comes_first = job.name not in self._looks
            future = self._looks.setdefault(job.name, Future())
        if comes_first:
            try:
                with ThreadPoolExecutor(WORKERS, "look") as pool:
                    future.set_result(self._looked(list(self.units([job])), functools.partial(_side_by_side, pool)))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _one_by_one(units: Sequence[Unit], do: Callable[[Unit], Any], take: Callable[[Unit, Any], None]) -> None:
    for unit in units:
        take(unit, do(unit))


def _side_by_side(
    pool: ThreadPoolExecutor, units: Sequence[Unit], do: Callable[[Unit], Any], take: Callable[[Unit, Any], None]
) -> None:
    for unit, done in zip(units, pool.map(do, units), strict=True):
        take(unit, done)


@functools.cache
def _blas() -> ThreadpoolController:
    """LAPACK on a processor is OpenBLAS, whose threads fight with XLA's: 0.17 s of Cholesky have become 2 s.

    jaxlib takes it from SciPy when it first needs it, and what is not loaded is not limited.
    """
    importlib.import_module("scipy.linalg")
    return ThreadpoolController()


def _doubled(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
