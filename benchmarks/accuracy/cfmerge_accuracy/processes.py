"""Processes of this machine, each held to cores of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.cache import keep_compiled

THREADS = "OPENBLAS_NUM_THREADS"  # LAPACK's, read when it is loaded


def cores() -> list[int]:
    """Those that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def shared(own: list[int], jobs: int) -> list[list[int]]:
    """So many parts, in order, of equal length or one more."""
    return [own[number * len(own) // jobs : (number + 1) * len(own) // jobs] for number in range(jobs)]


@contextlib.contextmanager
def sharing(jobs: int, own: list[int], begin: Callable[..., None], *args: Any) -> Iterator[ProcessPoolExecutor]:
    """An executor of so many processes that start when there is work for them; each has its share of the cores.

    Args:
        jobs: processes.
        own: cores to share out; none where the system does not tell.
        begin: is called with `args` in every process, once it has its cores.

    Raises:
        CfmergeError: a process ended before its time.
    """
    context = multiprocessing.get_context("spawn")
    shares = context.Queue()
    for share in shared(own, jobs):
        shares.put(share)
    with _environment(THREADS, str(max(1, len(own) // jobs))):
        executor = ProcessPoolExecutor(jobs, context, _start, (shares, begin, *args))
        try:
            yield executor
        except BrokenProcessPool as error:
            raise CfmergeError(
                "a process ended before its time, for want of memory perhaps; use fewer of them: --jobs 1"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def _start(shares: Any, begin: Callable[..., None], *args: Any) -> None:
    share = shares.get()
    if share:
        os.sched_setaffinity(0, share)
    begin(*args)


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


class Trainers(NamedTuple):
    """Where models are trained.

    Attributes:
        call: `call(function, *args)` returns `function(*args)`; threads may call at once.
        at_once: calls that go on at the same time.
    """

    call: Callable[..., Any]
    at_once: int


HERE = Trainers(lambda function, *args: function(*args), 1)


@contextlib.contextmanager
def one_core_each(most: int) -> Iterator[Trainers]:
    """Trainers in processes that have one core each, at most so many; with an accelerator, in this process.

    XLA and LAPACK add up in an order that depends on how many cores they have, and training makes other models of the
    difference. So it comes to the same models on any number of cores.
    """
    import jax

    if jax.default_backend() != "cpu":
        yield HERE
        return
    own = cores()
    jobs = max(1, min(len(own), most))
    with sharing(jobs, own[:jobs], keep_compiled) as executor:
        yield Trainers(lambda *call: executor.submit(*call).result(), jobs)
