"""`method: auto` settled: the method of each tensor, chosen by `diagnosis/choice.py` after one look at the deltas."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge import methods
from cfmerge.core.survey import Measure
from cfmerge.diagnosis import choice
from cfmerge.diagnosis.words import span
from cfmerge.engine import run
from cfmerge.engine.cutting import check_memory
from cfmerge.engine.placement import Placement
from cfmerge.errors import CfmergeError, and_more
from cfmerge.methods import Method
from cfmerge.models import Kind
from cfmerge.planning.work import Job, Work

Numbers = Mapping[str, Any]  # of one tensor: "ranks" of the experts' deltas, and "growth"
LOOK = Measure(choice.look, joint=True, by_tensor=True)


def settled(work: Work, memory: int | None = None, placement: Placement = run.ANYWHERE) -> tuple[Work, list[str]]:
    """The work with a method for every tensor, and a note for each method that was chosen, with the reason.

    Raises:
        NonFiniteError: an expert holds NaN or infinity.
        CfmergeError: values that only a transformation of JAX knows.
    """
    asked = [job for job in work.merged if job.method.chooses]
    if not asked:
        return work, []
    if work.traced:
        raise CfmergeError(
            "auto looks at the deltas before it chooses, which cannot be done under jit; call it outside, or name a "
            "method"
        )
    numbers = _measured(work, asked, memory, placement)
    branches = {job.name: _branch(job, numbers[job.name]) for job in asked}
    made = {branch: methods.make(branch.method) for branch in set(branches.values())}
    jobs = [_settled(job, made, branches.get(job.name)) for job in work.jobs]
    notes = [
        _note(branch, {job.name: (job, numbers[job.name]) for job in asked if branches[job.name] == branch})
        for branch in choice.BRANCHES if branch in made
    ]  # fmt: skip
    return dataclasses.replace(work, jobs=tuple(jobs)), notes


def _measured(work: Work, jobs: Sequence[Job], memory: int | None, placement: Placement) -> dict[str, Numbers]:
    """The numbers of each tensor; of one that stacks layers the largest of them."""
    found = {job.name: known for job in jobs if (known := _by_header(job))}
    looked = tuple(dataclasses.replace(job, ranks=()) for job in jobs if job.name not in found)
    for job in looked if memory is not None else ():
        check_memory(job, memory)  # type: ignore[arg-type]
    told = (
        run.measure(dataclasses.replace(work, jobs=looked), LOOK, memory=memory, placement=placement) if looked else {}
    )
    for (name, _), each in told.items():
        before = found.get(name, each)
        found[name] = {key: np.maximum(value, before[key]) for key, value in each.items()}
    return found


def _by_header(job: Job) -> Numbers | None:
    """The numbers of convolutions, which do not count, and of adapters of low rank; None where it takes a look."""
    if job.parameter.kind is Kind.CONVOLUTION:
        return {"ranks": np.zeros(0, int), "growth": 0.0}
    own = [job.ranks[number] for number in job.experts] if job.ranks else []
    ranks = [rank for rank in own if rank is not None]
    known = ranks and len(ranks) == len(own) and 0 < max(ranks) <= choice.LOW * min(job.sides)
    return {"ranks": np.array(ranks), "growth": 0.0} if known else None


def _branch(job: Job, numbers: Numbers) -> choice.Branch:
    return choice.chosen(job.parameter.kind, job.sides, numbers["ranks"], float(numbers["growth"]), job.weights)


def _settled(job: Job, made: Mapping[choice.Branch, Method], branch: choice.Branch | None) -> Job:
    """The job with its method; a tensor without entries, at which nobody has looked, is averaged."""
    if job.assignment.action != "merge" or not job.method.chooses:
        return job
    method = made[branch] if branch else methods.make(choice.UNCHANGED.method)
    return dataclasses.replace(job, assignment=dataclasses.replace(job.assignment, method=method))


def _note(branch: choice.Branch, tensors: Mapping[str, tuple[Job, Numbers]]) -> str:
    """The note on a branch and the tensors that took it, with the numbers behind it."""
    ranks = [int(np.max(numbers["ranks"], initial=0)) for _, numbers in tensors.values()]
    grown = [float(numbers["growth"]) for _, numbers in tensors.values()]
    number = {
        choice.LOW_RANK: f" (up to {max(ranks)})",
        choice.LOW_RANK_WEIGHTED: f" (up to {max(ranks)})",
        choice.GROWING: f" ({span(grown, '.2f')} times)",
    }.get(branch, "")
    return f"auto: {branch.method} for {and_more(list(tensors))}: {branch.why}{number}"
