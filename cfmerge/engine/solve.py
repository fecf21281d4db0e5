"""One batch: its statistic from the models one by one, its solution in as much precision as it needs."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.checkpoints import Checkpoint
from cfmerge.engine.batches import Batch
from cfmerge.engine.low_rank import CUT, rank_bound
from cfmerge.engine.plan import Plan
from cfmerge.engine.steps import compiled
from cfmerge.errors import NonFiniteError
from cfmerge.methods import Method

# Relative error of a merged delta, measured, times the smallest eigenvalue of the system over the largest (what a
# method reports as `ridge_ratio`): when all is float32, and when float32 sums are solved in float64. For deltas that
# have full rank together; where they do not, and are not solved as such, about five times as much.
LOSS_OF_SOLVE = 7e-8
LOSS_OF_SUMS = 2e-8
TOLERANCE = {2: 1e-3, 4: 1e-4, 8: 1e-4}  # by the bytes of the output's dtype: bfloat16 rounds far more coarsely

Progress = Callable[[str, int], None]  # (tensor name, bytes read since the last call)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch's result `(jobs, ...)`, what the method reports `{name: (jobs, stacked)}`, how many needed float64."""

    tensors: np.ndarray
    reports: dict[str, np.ndarray]
    float64: int = 0


def merge_batch(plan: Plan, batch: Batch, progress: Progress) -> Merged:
    """The merged tensors of a batch.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
    """
    method = batch.jobs[0].assignment.method
    if plan.recipe.precision == "float64" or batch.jobs[0].parameter.dtype == "float64":
        return _merge_in(plan, batch, method, progress, "float64")
    merged = _merge_low_rank(plan, batch, method, progress) or _merge_in(plan, batch, method, progress, "float32")
    weak = _weak(plan, batch, merged.reports, LOSS_OF_SUMS)
    for number in weak:
        single = dataclasses.replace(batch, jobs=(batch.jobs[number],))
        merged.tensors[number] = _merge_in(plan, single, method, _silent, "float64").tensors[0]
    return merged


def _merge_low_rank(plan: Plan, batch: Batch, method: Method, progress: Progress) -> Merged | None:
    """By the form for low-rank deltas, if all deltas turn out to be of low rank."""
    job = batch.jobs[0]
    if method.of_rank is None or len(batch.jobs) > 1 or sorted(batch.layout) != ["i", "o"]:
        return None
    (checkpoint, (name,)), *experts = _sources(plan, batch)
    rank = rank_bound(checkpoint.read(name), (c.read(names[0]) for c, names in experts), len(experts))
    if rank is None:
        return None
    merged = _merge_in(plan, batch, method.of_rank(rank), _silent, "float32")
    if merged.reports["factor_error"].max() > CUT:
        return None
    progress(job.name, job.bytes_read * (1 + len(experts)))
    return merged


def _merge_in(plan: Plan, batch: Batch, method: Method, progress: Progress, compute: str) -> Merged:
    """In one precision; the solve of a float32 statistic in float64 where that is enough."""
    job = batch.jobs[0]
    with jax.enable_x64(compute == "float64"):
        start, step, finish = compiled(method, batch.layout, compute)
        (checkpoint, names), *experts = _sources(plan, batch)
        base = jnp.asarray(batch.read(checkpoint, names))
        progress(job.name, base.nbytes)
        statistics, finite = start(base), []
        for spec, (checkpoint, names) in zip(plan.expert_specs, experts, strict=True):
            expert = jnp.asarray(batch.read(checkpoint, names))
            statistics, fine = step(statistics, base, expert, np.asarray(spec.weight, compute))
            finite.append(np.asarray(fine))  # waits: steps that are only queued would hold all experts' buffers
            progress(job.name, expert.nbytes)
        merged, reports, fine = finish(statistics, base, job.dtype.name)
    for spec, flags in zip(plan.expert_specs, finite, strict=True):
        _check_finite(plan, batch, base, flags, f"expert {spec.name!r} ({spec.path})", spec.name)
    _check_finite(plan, batch, base, np.asarray(fine), None, "")
    told = {name: np.asarray(value) for name, value in reports.items()}
    weak = _weak(plan, batch, told, LOSS_OF_SOLVE if compute == "float32" else 0.0)
    if len(weak) == 0:
        return Merged(np.asarray(merged), told)
    tensors = np.array(merged)
    tensors[weak] = _finish_in_double(batch, method, statistics, base)[weak]
    return Merged(tensors, told, len(weak))


def _finish_in_double(batch: Batch, method: Method, statistics: Any, base: jax.Array) -> np.ndarray:
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), statistics)
        finish = compiled(method, batch.layout, "float64").finish
        return np.asarray(finish(double, base, batch.jobs[0].dtype.name)[0])


def _weak(plan: Plan, batch: Batch, reports: dict[str, np.ndarray], loss: float) -> np.ndarray:
    """The jobs that would miss the tolerance at this loss, if precision is left to us."""
    ratios = reports.get("ridge_ratio")
    if ratios is None or plan.recipe.precision != "auto":
        return np.zeros(0, int)
    return np.flatnonzero(ratios.min(axis=1) < loss / TOLERANCE[batch.jobs[0].dtype.itemsize])


def _silent(name: str, count: int) -> None:
    pass


def _sources(plan: Plan, batch: Batch) -> Iterator[tuple[Checkpoint, tuple[str, ...]]]:
    """The base and each expert, with the names of the batch's tensors in it."""
    yield plan.base, tuple(job.name for job in batch.jobs)
    for number, expert in enumerate(plan.experts):
        yield expert, tuple(str(job.sources[number]) for job in batch.jobs)


def _check_finite(plan: Plan, batch: Batch, base: jax.Array, flags: np.ndarray, who: str | None, source: str) -> None:
    if flags.all():
        return
    number = int(np.argmin(flags))
    name = batch.jobs[number].name
    if not np.isfinite(np.asarray(base[number], np.float32)).all():
        who, source = f"base ({plan.base.path})", ""
    if who is None:
        raise NonFiniteError(
            f"merged tensor {name!r} holds NaN or infinity in {batch.jobs[0].dtype.name}: nothing was written; "
            "a smaller scale, another method for it, or --dtype float32 may help",
            source="", tensor=name,
        )  # fmt: skip
    raise NonFiniteError(
        f"{who}: tensor {name!r} holds NaN or infinity. Repair or leave out that model"
        + (", or pass --on-nonfinite skip-expert" if source else ""),
        source=source, tensor=name,
    )  # fmt: skip
