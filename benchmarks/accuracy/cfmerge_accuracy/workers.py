"""The parts of a comparison in processes of their own, which share the machine's cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from cfmerge_accuracy import processes
from cfmerge_accuracy.cache import keep_compiled
from cfmerge_accuracy.compare import Given, Part, Run
from cfmerge_accuracy.zoo import Zoo

Load = Callable[[], Zoo]
MOST = 4  # processes, of some 3 GB each, unless more are asked for

_given: Given  # of this process


@contextlib.contextmanager
def spread(jobs: int, load: Load) -> Iterator[Run]:
    """`run(parts)`, whose results come in the order of the parts, from so many processes.

    Args:
        jobs: processes; each has its share of the cores.
        load: returns the zoo, in every process again; to be pickled, so a function of a module, or a partial of one.

    Raises:
        CfmergeError: a process ended before its time.
    """
    with processes.sharing(jobs, processes.cores(), _load, load) as found:
        yield lambda parts: found.map(_do, parts)


def default_jobs() -> int:
    """Processes, where nobody says how many: one for each core, up to `MOST`; one where there is an accelerator."""
    import jax

    found = len(processes.cores()) or os.cpu_count() or 1
    return min(found, MOST) if jax.default_backend() == "cpu" else 1


def _load(load: Load) -> None:
    global _given
    keep_compiled()
    _given = Given(load())


def _do(part: Part) -> Any:
    return part(_given)
