"""All that is asked of the loop (`loop.py`):

merge(work, sinks)        surveys first, then the pass that writes
measure(work, wanted)     one look at every tensor
accumulate(work, write)   the statistics of every tensor, unsolved
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from cfmerge.core.survey import Measure
from cfmerge.engine.account import Account, Told, adds, told_of
from cfmerge.engine.checks import kept_tensor
from cfmerge.engine.journal import Forgetful, Journal, ranges_of, whole
from cfmerge.engine.looks import measured, summed, surveys
from cfmerge.engine.loop import Loop
from cfmerge.engine.passes import Measures
from cfmerge.engine.placement import Placement
from cfmerge.engine.precision import Outcome, compute_dtype
from cfmerge.engine.processes import dealt, joined
from cfmerge.engine.surveys import kind_of
from cfmerge.engine.units import Unit
from cfmerge.engine.writing import written
from cfmerge.planning.work import Progress, Work, Writable, silent

ANYWHERE = Placement()  # arrays go where JAX puts them


def merge(
    work: Work,
    sinks: Sequence[Writable],
    *,
    memory: int | None = None,
    placement: Placement = ANYWHERE,
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
    as_factors = all(hasattr(sink, "write_factors") for sink in sinks)
    account, loop = Account(), Loop(work, memory, placement, progress, stop, journal, as_factors)
    by_name, reports = {job.name: job for job in work.jobs}, list[tuple[Unit, Any]]()
    for earlier in journal.told():
        account.add(Told(*earlier), by_name)

    def take(unit: Unit, outcome: Outcome) -> None:
        told = Told() if work.traced and not adds(unit.job) else told_of(unit, outcome)
        reports.append((unit, tuple(told)))
        tensors = jax.tree.map(np.asarray, outcome.tensors) if work.from_files else outcome.tensors
        several = len(sinks) > 1
        each = [jax.tree.map(lambda leaf, n=n: leaf[:, n] if several else leaf, tensors) for n in range(len(sinks))]
        loop.writer.take(sinks, [unit.parts(own) for own in each], ranges_of(unit), told)

    with loop:
        kept_jobs = [job for job in work.jobs if job.assignment.action == "keep-base"]
        owners = dealt([job.bytes_read * (1 + len(job.sources)) for job in kept_jobs], loop.processes.count)
        for job, owner in zip(kept_jobs, owners, strict=True):
            loop.check_stop()
            if owner == loop.processes.number:
                if not journal.done(whole(job)):
                    kept = kept_tensor(work, job)
                    for sink in sinks:
                        written(sink, job, 0, kept)
                    journal.mark(whole(job), Told())
                loop.tell(job.name, job.bytes_read * (1 + len(job.sources)))
        found = surveys(loop, work.merged)
        units = list(filter(loop.to_do, loop.units(work.merged)))
        loop.over(units, lambda unit: loop.merged(unit, found.get(kind_of(unit.job.method))), take)
        loop.writer.finish()
        for _, told in joined(loop.processes, "account", units, reports):
            account.add(Told(*told), by_name)
    return account


def measure(
    work: Work,
    wanted: Measure,
    *,
    memory: int | None = None,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
    over: Literal["places", "tensors"] = "places",
) -> Any:
    """The totals of a measure over the tensors that are merged, as a look gets them.

    Args:
        over: "tensors": `{name: sum of the measure over all pieces of the tensor}`, of a measure by tensor.
    """
    loop = Loop(work, memory, placement, progress, None, Forgetful())
    compute = compute_dtype(work, work.merged)
    with loop, loop.precision(compute):
        measures = Measures(wanted, len(work.experts), compute)
        take = measured if over == "places" else summed
        return take(loop, measures, work.merged, loop.tell)


def accumulate(
    work: Work,
    take: Callable[[Unit, Any], None],
    *,
    compute: str | None = None,
    memory: int | None = None,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> None:
    """Hands every unit, in order, with the statistics of its tensors to `take`.

    Raises:
        NonFiniteError: a NaN or infinity in a model.
    """
    loop = Loop(work, memory, placement, progress, None, Forgetful())
    with loop:
        units = loop.pieces(work.merged)
        loop.over(units, lambda unit: loop.accumulated(unit, compute or compute_dtype(work, unit.jobs)), take)
