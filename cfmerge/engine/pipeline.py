"""The pipeline: read ahead in a thread, compute, write behind in a thread; memory bounded by the batches."""

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.checkpoints import Checkpoint
from cfmerge.checkpoints.safetensors import ShardWriter
from cfmerge.engine.batches import Batch, make_batches
from cfmerge.engine.plan import Job, Plan
from cfmerge.engine.steps import compiled
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.parameters import Kind, is_float

READ_AHEAD = 3  # loads of one model's part of a batch
WRITE_BEHIND = 2  # finished batches
LEAST_RIDGE_RATIO = 1e-4  # below it float32 sums lose about 1e-7 / ratio (specs: float64 then)

Progress = Callable[[str, int], None]  # (tensor name, bytes read since the last call)


@dataclasses.dataclass
class Account:
    """What happened: notes of the methods with the tensors that they are about, and reports by tensor."""

    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reports: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    float64: int = 0

    def add(self, job: Job, report: dict[str, np.ndarray]) -> None:
        self.reports[job.name] = {key: float(np.max(value)) for key, value in report.items()}
        for key, (condition, message) in job.assignment.method.notes.items():
            value = self.reports[job.name].get(key)
            if value is not None and condition(value):
                generic = message.split("{value")[0] if "{value" in message else message
                existing = next((note for note in self.notes if note.startswith(generic)), None)
                self.notes.setdefault(existing or message.format(value=value), []).append(job.name)

    def lines(self) -> list[str]:
        counts = Counter({note: len(names) for note, names in self.notes.items()})
        lines = [
            f"{names[0]}{f' and {counts[note] - 1} more' if counts[note] > 1 else ''}: {note}"
            for note, names in self.notes.items()
        ]
        if self.float64:
            lines.append(f"{self.float64} tensors were ill-conditioned and computed in float64")
        return lines


def execute(
    plan: Plan, writer: ShardWriter, memory: int, progress: Progress, stop: threading.Event
) -> Account:
    """Merges every job of the plan into the writer.

    Raises:
        NonFiniteError: a NaN or infinity in a model, or a result that does not fit its dtype.
        CfmergeError: integers that do not agree, or tensors said to be tied that are not.
    """
    account = Account()
    readers, writers = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
    pending: deque[Future[None]] = deque()

    def write(names: tuple[str, ...], values: np.ndarray, first: int) -> None:
        for name in names:
            writer.write(name, values, first)

    try:
        for job in plan.jobs:
            _check_stop(stop)
            _check_ties(plan, job)
            if job.assignment.action == "keep-base":
                write(job.writes, _kept(plan, job).astype(job.dtype), 0)
                progress(job.name, job.bytes_read * (1 + len(job.sources)))
        loads = _loads(plan, list(make_batches(plan.jobs, memory)), readers)
        for batch in make_batches(plan.jobs, memory):
            _check_stop(stop)
            merged = _merge(plan, batch, loads, account, progress)
            for job, values in zip(batch.jobs, merged, strict=True):
                pending.append(writers.submit(write, job.writes, values, batch.first))
            while len(pending) > WRITE_BEHIND * len(batch.jobs):
                pending.popleft().result()
        while pending:
            pending.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)
    return account


def _loads(plan: Plan, batches: list[Batch], readers: ThreadPoolExecutor) -> Iterator[jax.Array]:
    """For every batch the base's part and then each expert's, read ahead."""
    requests = (
        (batch, checkpoint, names)
        for batch in batches
        for checkpoint, names in _sources(plan, batch)
    )
    ahead: deque[Future[jax.Array]] = deque()
    for batch, checkpoint, names in requests:
        ahead.append(readers.submit(lambda b, c, n: jnp.asarray(b.read(c, n)), batch, checkpoint, names))
        if len(ahead) > READ_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _sources(plan: Plan, batch: Batch) -> Iterator[tuple[Checkpoint, tuple[str, ...]]]:
    yield plan.base, tuple(job.name for job in batch.jobs)
    for number, expert in enumerate(plan.experts):
        yield expert, tuple(str(job.sources[number]) for job in batch.jobs)


def _merge(
    plan: Plan, batch: Batch, loads: Iterator[jax.Array], account: Account, progress: Progress
) -> np.ndarray:
    """The merged tensors of a batch, `(jobs, ...)`; those that float32 cannot do are done again in float64."""
    if plan.recipe.precision == "float64":
        with jax.enable_x64(True):
            return _solve(plan, batch, loads, account, progress, "float64")[0]
    merged, ratios = _solve(plan, batch, loads, account, progress, "float32")
    weak = [n for n, ratio in enumerate(ratios) if ratio < LEAST_RIDGE_RATIO]
    if plan.recipe.precision == "auto" and weak:
        merged = merged.copy()
        for number in weak:
            single = dataclasses.replace(batch, jobs=(batch.jobs[number],))
            with jax.enable_x64(True):
                again = (jnp.asarray(single.read(c, n)) for c, n in _sources(plan, single))
                merged[number] = _solve(plan, single, again, account, lambda *_: None, "float64")[0][0]
            account.float64 += 1
    return merged


def _solve(
    plan: Plan, batch: Batch, loads: Iterator[jax.Array], account: Account, progress: Progress, compute: str
) -> tuple[np.ndarray, list[float]]:
    start, step, finish = compiled(batch.jobs[0].assignment.method, batch.layout, compute)
    base = next(loads)
    progress(batch.jobs[0].name, base.nbytes)
    statistics, finite = start(base), []
    for spec in plan.expert_specs:
        expert = next(loads)
        statistics, fine = step(statistics, base, expert, np.asarray(spec.weight, compute))
        finite.append(fine)
        progress(batch.jobs[0].name, expert.nbytes)
    merged, reports, fine = finish(statistics, base, batch.jobs[0].dtype.name)
    for spec, flags in zip(plan.expert_specs, finite, strict=True):
        _check_finite(plan, batch, base, np.asarray(flags), f"expert {spec.name!r} ({spec.path})", spec.name)
    _check_finite(plan, batch, base, np.asarray(fine), None, "")
    told = {name: np.asarray(value) for name, value in reports.items()}
    for number, job in enumerate(batch.jobs):
        if told:
            account.add(job, {name: value[number] for name, value in told.items()})
    ratios = told["ridge_ratio"].min(axis=1).tolist() if "ridge_ratio" in told else []
    return np.asarray(merged), ratios


def _check_finite(
    plan: Plan, batch: Batch, base: jax.Array, flags: np.ndarray, who: str | None, source: str
) -> None:
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


def _kept(plan: Plan, job: Job) -> np.ndarray:
    """The base's tensor, after the checks that a kept tensor needs."""
    base = plan.base.read(job.name)
    if is_float(base.dtype.name) and job.parameter.kind is not Kind.OTHER:
        for piece in np.array_split(base.reshape(-1), max(1, base.size >> 22)):
            if not np.isfinite(piece.astype(np.float32)).all():
                raise NonFiniteError(
                    f"base ({plan.base.path}): tensor {job.name!r} holds NaN or infinity",
                    source="", tensor=job.name,
                )  # fmt: skip
    if job.assignment.agree:
        for spec, expert, source in zip(plan.expert_specs, plan.experts, job.sources, strict=True):
            if source is not None and not np.array_equal(expert.read(source), base):
                raise CfmergeError(
                    f"expert {spec.name!r} ({spec.path}): integers {source!r} ({base.dtype.name}) differ from the "
                    f"base's, and integers are not merged; a rule 'match: \"{job.name}\", method: keep-base' keeps "
                    "the base's"
                )
    return base


def _check_ties(plan: Plan, job: Job) -> None:
    """Tensors that the config ties must be the same where they are stored twice."""
    models = [("base", plan.base, job.name)]
    models += [
        (f"expert {spec.name!r}", expert, source)
        for spec, expert, source in zip(plan.expert_specs, plan.experts, job.sources, strict=True)
        if source is not None
    ]
    for who, checkpoint, name in models:
        for alias, target in checkpoint.ties.items():
            stored = alias in checkpoint.tensors and target == name
            if stored and not np.array_equal(_bits(checkpoint.read(alias)), _bits(checkpoint.read(name))):
                raise CfmergeError(
                    f"{who} ({checkpoint.path}): {alias!r} and {name!r} are tied by its config.json, but differ; "
                    "set tie_word_embeddings to false there, in the base and all experts alike"
                )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


def same_content(a: Checkpoint, b: Checkpoint, names: dict[str, str]) -> bool:
    """Whether two models are the same in every tensor; stops at the first difference, embeddings last.

    Args:
        names: `{name in a: name in b}`.
    """
    return all(
        np.array_equal(_bits(a.read(name)), _bits(b.read(names[name])))
        for name in sorted(names, key=lambda name: "embed" in name)
    )
