"""Jobs cut into batches: tensors solved in one compiled call, or pieces of one too large for that."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cfmerge.engine.plan import Job, Plan
from cfmerge.engine.statistics import stacked
from cfmerge.engine.steps import Inputs
from cfmerge.engine.survey import Place, Stack, kind_of
from cfmerge.errors import CfmergeError
from cfmerge.formats import Checkpoint
from cfmerge.methods import Method
from cfmerge.methods._random import digest_of

ENTRIES = 1 << 22  # of an entrywise batch or piece
STACKED = 1 << 18  # of a stack of matrices: larger ones keep a processor busy alone, and stacking copies them


@dataclasses.dataclass(frozen=True)
class Batch:
    """Jobs of one shape, dtype, layout and method (but for its numbers); or a flat piece of one job, with `count`."""

    jobs: tuple[Job, ...]
    first: int = 0
    count: int | None = None

    @property
    def layout(self) -> str:
        return self.jobs[0].layout

    @property
    def places(self) -> tuple[Place, ...]:
        job = self.jobs[0]
        if self.count is not None:
            return ((job.name, self.first),)
        return tuple((job.name, number) for job in self.jobs for number in range(job.matrices))

    def read(self, checkpoint: Checkpoint, names: tuple[str, ...]) -> np.ndarray:
        """`(jobs, *stored shape)`, or `(1, count)` for a piece."""
        arrays = [checkpoint.read(name) for name in names]
        if self.count is not None:
            return arrays[0].reshape(-1)[self.first : self.first + self.count][None]
        if len({array.dtype for array in arrays}) > 1:  # NumPy has no common dtype for float16 and bfloat16
            wide = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
            arrays = [array.astype(wide) for array in arrays]
        return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)

    def base(self, plan: Plan) -> np.ndarray:
        return self.read(plan.base, tuple(job.name for job in self.jobs))

    def expert(self, plan: Plan, number: int) -> np.ndarray:
        return self.read(plan.experts[number], tuple(str(job.sources[number]) for job in self.jobs))

    def inputs(self, plan: Plan, number: int) -> Inputs:
        """What comes with an expert's tensors."""
        job, expert = self.jobs[0], plan.expert_specs[number].name
        method = job.assignment.method
        weight = np.repeat([job.weights[number] for job in self.jobs], job.matrices)
        inputs = Inputs(weight, plan.before + number, seed=plan.recipe.seed, start=self.first)
        names = tuple(job.name for job in self.jobs)
        measured = plan.moments[number] if method.moments else None
        moment = None if measured is None else self.read(measured, names)
        return complete(inputs, method, names, job.matrices, expert, moment)

    def kept(self, plan: Plan, method: Method, compute: str) -> Any:
        """What the plan's statistics hold of the batch, as the method's statistics."""
        if plan.statistics is None:
            return None
        job = self.jobs[0]
        shape = job.parameter.canonical[1:] if self.layout else job.parameter.shape
        piece = None if self.count is None else slice(self.first, self.first + self.count)
        return stacked([plan.statistics.tensors[job.name] for job in self.jobs], method, shape, compute, piece)

    def stack(self, plan: Plan) -> Stack:
        """For a survey."""
        return Stack(
            self.jobs[0].assignment.method, self.places, self.layout, self.base(plan),
            lambda number: self.expert(plan, number), lambda number: self.inputs(plan, number),
        )  # fmt: skip


def complete(inputs: Inputs, method: Method, names: Sequence[str], matrices: int, expert: str, moment: Any) -> Inputs:
    """The inputs with what a method needs besides: digests for its draws, and moments `(stack, ...)`."""
    if method.random:
        layers = [layer_name(name, layer, matrices) for name in names for layer in range(matrices)]
        inputs = inputs._replace(digest=np.stack([digest_of(layer, expert) for layer in layers]))
    if moment is not None and method.moments == "input_gram":
        moment = moment.reshape(-1, *moment.shape[-2:])
    return inputs._replace(moment=moment)


def layer_name(name: str, layer: int, layers: int) -> str:
    """What the keys of a random method are made of: the tensor's name, and which of its stacked layers."""
    return name if layers == 1 else f"{name}[{layer}]"


def make_batches(jobs: tuple[Job, ...], memory: int) -> Iterator[Batch]:
    """All merge jobs, in about the order of the plan; stacks whose working set fits half of `memory`.

    Raises:
        CfmergeError: one tensor alone does not fit.
    """
    waiting: dict[Any, list[Job]] = {}
    for job in jobs:
        if job.assignment.action != "merge" or job.parameter.size == 0:
            continue
        if job.assignment.method.scope == "entry" and job.parameter.size > ENTRIES:
            for first in range(0, job.parameter.size, ENTRIES):
                yield Batch((job,), first, min(ENTRIES, job.parameter.size - first))
            continue
        p = job.parameter
        key = (p.shape, p.dtype, str(job.dtype), job.layout, kind_of(job.assignment.method))
        bucket = waiting.setdefault(key, [])
        bucket.append(job)
        if len(bucket) >= _stack(job, memory):
            yield Batch(tuple(waiting.pop(key)))
    for bucket in waiting.values():
        yield Batch(tuple(bucket))


def _stack(job: Job, memory: int) -> int:
    check_memory(job, memory)
    by_size = (ENTRIES if job.assignment.method.scope == "entry" else STACKED) // job.parameter.size
    by_memory = memory // 2 // max(job.working_bytes, 1)
    return max(1, min(by_size, by_memory))


def check_memory(job: Job, memory: int) -> None:
    """Raises `CfmergeError` if one job alone needs more than `memory` bytes."""
    if job.working_bytes > memory:
        raise CfmergeError(
            f"tensor {job.name!r} {job.parameter.shape} needs {job.working_bytes / 2**20:.1f} MiB with "
            f"{job.assignment.label}, but the working set may be {memory / 2**20:.1f} MiB; raise --memory, or "
            f'give it a rule: match: "{job.name}", method: average'
        )
