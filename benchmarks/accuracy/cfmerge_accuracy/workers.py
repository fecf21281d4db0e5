"""The parts of a comparison in processes of their own, which share the machine's cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.compare import Given, Part, Run
from cfmerge_accuracy.zoo import Zoo

Load = Callable[[], Zoo]
THREADS = "OPENBLAS_NUM_THREADS"  # LAPACK's, read when it is loaded
MOST = 4  # processes, of some 3 GB each, unless more are asked for

_given: Given  # of this process


@contextlib.contextmanager
def spread(jobs: int, load: Load) -> Iterator[Run]:
    """`run(parts)`, whose results come in the order of the parts, from so many processes.

    Args:
        jobs: processes; each has its share of the cores.
        load: returns the zoo, in every process again; to be pickled, so a function of a module, or a partial of one.

    Raises:
        CfmergeError: while results are read: a process ended before its time.
    """
    context = multiprocessing.get_context("spawn")
    cores = _cores()
    shares = context.Queue()
    for number in range(jobs):
        shares.put(cores[number * len(cores) // jobs : (number + 1) * len(cores) // jobs])

    def run(parts: list[Part]) -> Iterator[Any]:
        try:
            yield from executor.map(_do, parts)
        except BrokenProcessPool as error:
            raise CfmergeError(
                f"one of {jobs} processes ended before its time, for want of memory perhaps; use fewer: --jobs 1"
            ) from error

    with _environment(THREADS, str(max(1, len(cores) // jobs))):
        executor = ProcessPoolExecutor(jobs, context, _start, (shares, load))
        try:
            yield run
        finally:
            executor.shutdown(cancel_futures=True)


def default_jobs() -> int:
    """Processes, where nobody says how many: one for each core, up to `MOST`; one where there is an accelerator."""
    import jax

    cores = len(_cores()) or os.cpu_count() or 1
    return min(cores, MOST) if jax.default_backend() == "cpu" else 1


def _cores() -> list[int]:
    """Those that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _start(shares: Any, load: Load) -> None:
    global _given
    cores = shares.get()
    if cores:
        os.sched_setaffinity(0, cores)
    from cfmerge_accuracy.suite import keep_compiled

    keep_compiled()
    _given = Given(load())


def _do(part: Part) -> Any:
    return part(_given)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for processes that are started, unless it is set."""
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
