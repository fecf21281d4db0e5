"""Processes of this machine, each held to cores of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import LifoQueue
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.cache import keep_compiled

THREADS = "OPENBLAS_NUM_THREADS"  # LAPACK's, read when it is loaded


def cores() -> list[int]:
    """Those that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@functools.cache
def vectors() -> str:
    """The best that the processor has for matrices, such as "amx_bf16"; nothing where the system does not tell.

    Experts are the same on one class of processors.
    """
    told = Path("/proc/cpuinfo")
    flags = told.read_text().split() if told.exists() else []
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if flag in flags), "")


def machine(*packages: str) -> dict[str, str]:
    """What numbers depend on besides code and data: the processor's kind, the device, versions of packages."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"processor": vectors(), "device": jax.devices()[0].device_kind, **versions}


def shared(own: list[int], jobs: int) -> list[list[int]]:
    """So many parts, in order, of equal length or one more."""
    return [own[number * len(own) // jobs : (number + 1) * len(own) // jobs] for number in range(jobs)]


class Processes(NamedTuple):
    """Processes to work in.

    Attributes:
        call: `call(function, *args)` returns `function(*args)`, from a process that is free; threads may call at once.
        at_once: calls that go on at the same time; more wait.
    """

    call: Callable[..., Any]
    at_once: int

    def map(self, function: Callable[..., Any], *args: Iterable[Any]) -> Iterator[Any]:
        """As the builtin; the results come in the order of the arguments."""
        with ThreadPoolExecutor(self.at_once) as threads:
            yield from threads.map(lambda *each: self.call(function, *each), *args)


HERE = Processes(lambda function, *args: function(*args), 1)


@contextlib.contextmanager
def sharing(jobs: int, own: list[int], begin: Callable[..., None], *args: Any) -> Iterator[Processes]:
    """So many processes that start when there is work for them; each has its share of the cores.

    Every process has an executor of its own: one executor of several processes can miss the end of one that it has
    just started (Python 3.11's submits first and starts then), and wait for ever.

    Args:
        jobs: processes.
        own: cores to share out; none where the system does not tell.
        begin: is called with `args` in every process, once it has its cores.

    Raises:
        CfmergeError: a process ended before its time.
    """
    context, free = multiprocessing.get_context("spawn"), LifoQueue[ProcessPoolExecutor]()

    def call(function: Callable[..., Any], *args: Any) -> Any:
        executor = free.get()
        try:
            return executor.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise CfmergeError(
                "a process ended before its time, for want of memory perhaps; use fewer of them: --jobs 1"
            ) from error
        finally:
            free.put(executor)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(THREADS, str(max(1, len(own) // jobs))))
        for share in shared(own, jobs):
            executor = ProcessPoolExecutor(1, context, _start, (share, begin, *args))
            free.put(stack.enter_context(executor))
        yield Processes(call, jobs)


def _start(share: list[int], begin: Callable[..., None], *args: Any) -> None:
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


@contextlib.contextmanager
def one_core_each(most: int) -> Iterator[Processes]:
    """Processes that have one core each, at most so many; with an accelerator, this process.

    XLA and LAPACK add up in an order that depends on how many cores they have, and training makes other models of the
    difference. So it comes to the same models on any number of cores.
    """
    import jax

    if jax.default_backend() != "cpu":
        yield HERE
        return
    own = cores()
    jobs = max(1, min(len(own), most))
    with sharing(jobs, own[:jobs], keep_compiled) as found:
        yield found
