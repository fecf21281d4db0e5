"""One batch: its statistic from the models one by one, its solution in as much precision as it needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.engine.batches import Batch
from cfmerge.engine.low_rank import CUT, rank_bound
from cfmerge.engine.plan import Plan
from cfmerge.engine.steps import Settings, compiled, settings_of
from cfmerge.engine.survey import Stack, at_places
from cfmerge.errors import NonFiniteError
from cfmerge.methods import Found, Method
from cfmerge.methods._registry import of_expert

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


def merge_batch(plan: Plan, batch: Batch, found: Found | None, progress: Progress) -> Merged:
    """The merged tensors of a batch; `found` is what surveys of the whole model found for its method.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
    """
    methods = [job.assignment.method for job in batch.jobs]
    if plan.recipe.precision == "float64" or batch.jobs[0].parameter.dtype == "float64":
        return _merge_in(plan, batch, methods, found, progress, "float64")
    merged = None if plan.statistics else _merge_low_rank(plan, batch, methods[0], progress)
    merged = merged or _merge_in(plan, batch, methods, found, progress, "float32")
    if plan.statistics:  # their float32 sums are all there is
        return merged
    weak = _weak(plan, batch, merged.reports, LOSS_OF_SUMS if methods[0].additive else LOSS_OF_SOLVE)
    if len(weak):
        merged = dataclasses.replace(merged, tensors=np.array(merged.tensors))
    for number in weak:
        single = dataclasses.replace(batch, jobs=(batch.jobs[number],))
        merged.tensors[number] = _merge_in(plan, single, [methods[number]], found, _silent, "float64").tensors[0]
    return merged if methods[0].additive else dataclasses.replace(merged, float64=len(weak))


def _merge_low_rank(plan: Plan, batch: Batch, method: Method, progress: Progress) -> Merged | None:
    """By the form for low-rank deltas, if all deltas turn out to be of low rank."""
    job = batch.jobs[0]
    if method.of_rank is None or len(batch.jobs) > 1 or sorted(batch.layout) != ["i", "o"]:
        return None
    experts = batch.experts
    rank = rank_bound(batch.base(plan)[0], (batch.expert(plan, t)[0] for t in experts), len(experts))
    if rank is None:
        return None
    merged = _merge_in(plan, batch, [method.of_rank(rank)], None, _silent, "float32")
    if merged.reports["factor_error"].max() > CUT:
        return None
    progress(job.name, job.bytes_read * (1 + len(experts)))
    return merged


def _merge_in(
    plan: Plan, batch: Batch, methods: Sequence[Method], found: Found | None, progress: Progress, compute: str
) -> Merged:
    """In one precision; the solve of a float32 statistic in float64 where that is enough."""
    job, experts = batch.jobs[0], batch.experts
    found = at_places(found, batch.places)
    with jax.enable_x64(compute == "float64"):
        settings = settings_by_expert(plan, batch, methods, found)
        compiled_steps = compiled(of_expert(methods[0], 0), batch.layout, compute)
        base = jnp.asarray(batch.base(plan))
        progress(job.name, base.nbytes)
        if methods[0].additive:
            statistics, finite = see_all(plan, batch, methods[0], settings, base, compute, progress)
            merged, reports, fine = compiled_steps.finish(settings[0], statistics, base, job.dtype.name)
        else:
            stacks = [jnp.asarray(batch.expert(plan, t)) for t in experts]
            inputs = [batch.inputs(plan, t) for t in experts]
            merged, reports, flags = compiled_steps.together(
                [settings[t + 1] for t in experts], base, stacks, inputs, job.dtype.name
            )
            finite, fine = list(np.asarray(flags[:-1])), jnp.asarray(flags[-1])
            progress(job.name, sum(stack.nbytes for stack in stacks))
    check_experts(plan, batch, base, finite)
    _check_finite(plan, batch, base, np.asarray(fine), None, "")
    told = {name: np.asarray(value) for name, value in reports.items()}
    if not methods[0].additive:
        return Merged(np.array(merged), told)
    weak = _weak(plan, batch, told, LOSS_OF_SOLVE if compute == "float32" else 0.0)
    if len(weak) == 0:
        return Merged(np.asarray(merged), told)
    with jax.enable_x64(True):
        double = jax.tree.map(_doubled, statistics)
        finish = compiled(of_expert(methods[0], 0), batch.layout, "float64").finish
        again = np.asarray(finish(settings[0], double, base, job.dtype.name)[0])
    tensors = np.array(merged)
    tensors[weak] = again[weak]
    return Merged(tensors, told, len(weak))


def settings_by_expert(plan: Plan, batch: Batch, methods: Sequence[Method], found: Found | None) -> list[Settings]:
    """The settings of start and solve, and then of each expert."""
    numbers = [0, *range(plan.before, plan.before + len(plan.experts))]
    return [settings_of([of_expert(m, t) for m in methods], batch.jobs[0].matrices, found) for t in numbers]


def see_all(
    plan: Plan,
    batch: Batch,
    method: Method,
    settings: Sequence[Settings],
    base: jax.Array,
    compute: str,
    progress: Progress,
) -> tuple[Any, list[np.ndarray]]:
    """The statistics of a batch when all experts were seen, and for each expert which tensors were finite."""
    compiled_steps = compiled(of_expert(method, 0), batch.layout, compute)
    kept = batch.kept(plan, of_expert(method, 0), compute)
    statistics = compiled_steps.start(settings[0], base) if kept is None else kept
    finite = []
    for t in batch.experts:
        expert = jnp.asarray(batch.expert(plan, t))
        statistics, fine = compiled_steps.step(settings[t + 1], statistics, base, expert, batch.inputs(plan, t))
        finite.append(np.asarray(fine))  # waits: steps that are only queued would hold all experts' buffers
        progress(batch.jobs[0].name, expert.nbytes)
    return statistics, finite


def check_experts(plan: Plan, batch: Batch, base: jax.Array, finite: Sequence[np.ndarray]) -> None:
    for spec, flags in zip([plan.expert_specs[t] for t in batch.experts], finite, strict=True):
        _check_finite(plan, batch, base, flags, f"expert {spec.name!r} ({spec.path})", spec.name)


def check_stack(plan: Plan, batch: Batch, stack: Stack) -> Stack:
    """The stack, whose arrays are checked when they are taken: a NaN would go from a survey into every tensor."""

    def finite(array: Any) -> np.ndarray:
        return np.isfinite(np.asarray(array)).reshape(len(batch.jobs), -1).all(axis=1)

    def expert(number: int) -> Any:
        array, spec = stack.expert(number), plan.expert_specs[number]
        _check_finite(plan, batch, stack.base, finite(array), f"expert {spec.name!r} ({spec.path})", spec.name)
        return array

    _check_finite(plan, batch, stack.base, finite(stack.base), None, "")
    return stack._replace(expert=expert)


def _doubled(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _weak(plan: Plan, batch: Batch, reports: dict[str, np.ndarray], loss: float) -> np.ndarray:
    """The jobs that would miss the tolerance at this loss, if precision is left to us."""
    ratios = reports.get("ridge_ratio")
    if ratios is None or plan.recipe.precision != "auto":
        return np.zeros(0, int)
    return np.flatnonzero(ratios.min(axis=1) < loss / TOLERANCE[batch.jobs[0].dtype.itemsize])


def _silent(name: str, count: int) -> None:
    pass


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
