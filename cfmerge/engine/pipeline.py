"""The pipeline: workers read and merge batches, a thread writes behind them; memory is bounded by the batches."""

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from cfmerge.checkpoints import Checkpoint
from cfmerge.checkpoints.safetensors import ShardWriter
from cfmerge.engine.batches import Batch, make_batches
from cfmerge.engine.low_rank import CUT, rank_bound
from cfmerge.engine.plan import Job, Plan
from cfmerge.engine.steps import compiled
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.methods import Method
from cfmerge.parameters import Kind, is_float

WORKERS = 2  # batches in work at once: one computes while another reads, or factorises on one core
WRITE_BEHIND = 8  # finished tensors
LEAST_RIDGE_RATIO = 1e-4  # below it float32 sums lose about 1e-7 / ratio (specs: float64 then)

Progress = Callable[[str, int], None]  # (tensor name, bytes read since the last call)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch's result `(jobs, ...)`, what the method reports `{name: (jobs, stacked)}`, how many were done again."""

    tensors: np.ndarray
    reports: dict[str, np.ndarray]
    float64: int


@dataclasses.dataclass
class Account:
    """What happened: notes of the methods with the tensors that they are about, and reports by tensor."""

    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reports: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    float64: int = 0

    def add(self, batch: Batch, merged: "Merged") -> None:
        self.float64 += merged.float64
        for number, job in enumerate(batch.jobs):
            if merged.reports:
                self._add(job, {key: value[number] for key, value in merged.reports.items()})

    def _add(self, job: Job, report: dict[str, np.ndarray]) -> None:
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
    lock = threading.Lock()

    def tell(name: str, count: int) -> None:
        with lock:
            progress(name, count)

    largest = plan.largest
    workers = WORKERS if largest is None or largest.working_bytes * WORKERS <= memory else 1
    mergers, writers = ThreadPoolExecutor(workers, "merge"), ThreadPoolExecutor(1, "write")
    merging: deque[tuple[Batch, Future[Merged]]] = deque()
    writing: deque[Future[None]] = deque()

    def finish() -> None:
        batch, future = merging.popleft()
        merged = future.result()
        account.add(batch, merged)
        for job, values in zip(batch.jobs, merged.tensors, strict=True):
            writing.append(writers.submit(_write, writer, job, values, batch.first))
        while len(writing) > WRITE_BEHIND:
            writing.popleft().result()

    # LAPACK on the CPU is OpenBLAS, whose threads fight with XLA's: 0.17 s of Cholesky have become 2 s
    limit = threadpool_limits(1, user_api="blas")
    try:
        for job in plan.jobs:
            _check_stop(stop)
            _check_ties(plan, job)
            if job.assignment.action == "keep-base":
                _write(writer, job, _kept(plan, job), 0)
                tell(job.name, job.bytes_read * (1 + len(job.sources)))
        for batch in make_batches(plan.jobs, memory):
            _check_stop(stop)
            merging.append((batch, mergers.submit(_merge, plan, batch, tell)))
            if len(merging) > workers:
                finish()
        while merging:
            finish()
        while writing:
            writing.popleft().result()
    finally:
        mergers.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)
        limit.restore_original_limits()
    return account


def _write(writer: ShardWriter, job: Job, values: np.ndarray, first: int) -> None:
    for name in job.writes:
        writer.write(name, values, first)


def _sources(plan: Plan, batch: Batch) -> Iterator[tuple[Checkpoint, tuple[str, ...]]]:
    yield plan.base, tuple(job.name for job in batch.jobs)
    for number, expert in enumerate(plan.experts):
        yield expert, tuple(str(job.sources[number]) for job in batch.jobs)


def _merge(plan: Plan, batch: Batch, progress: Progress) -> Merged:
    """The merged tensors of a batch; those that float32 cannot do are done again in float64."""
    method = batch.jobs[0].assignment.method
    if plan.recipe.precision == "float64" or batch.jobs[0].parameter.dtype == "float64":
        return _solve(plan, batch, method, progress, "float64")
    merged = _merge_low_rank(plan, batch, method, progress) or _solve(plan, batch, method, progress, "float32")
    ratios = merged.reports.get("ridge_ratio")
    if plan.recipe.precision == "float32" or ratios is None:
        return merged
    weak = np.flatnonzero(ratios.min(axis=1) < LEAST_RIDGE_RATIO)
    tensors = merged.tensors.copy() if weak.size else merged.tensors
    for number in weak:
        single = dataclasses.replace(batch, jobs=(batch.jobs[number],))
        tensors[number] = _solve(plan, single, method, _silent, "float64").tensors[0]
    return Merged(tensors, merged.reports, len(weak))


def _merge_low_rank(plan: Plan, batch: Batch, method: Method, progress: Progress) -> Merged | None:
    """By the form for low-rank deltas, if all deltas turn out to be of low rank."""
    job = batch.jobs[0]
    if method.of_rank is None or len(batch.jobs) > 1 or sorted(batch.layout) != ["i", "o"]:
        return None
    (checkpoint, (name,)), *experts = _sources(plan, batch)
    rank = rank_bound(checkpoint.read(name), (c.read(names[0]) for c, names in experts), len(experts))
    if rank is None:
        return None
    merged = _solve(plan, batch, method.of_rank(rank), _silent, "float32")
    if merged.reports["factor_error"].max() > CUT:
        return None
    progress(job.name, job.bytes_read * (1 + len(experts)))
    return merged


def _silent(name: str, count: int) -> None:
    pass


def _solve(plan: Plan, batch: Batch, method: Method, progress: Progress, compute: str) -> Merged:
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
            finite.append(fine)
            progress(job.name, expert.nbytes)
        merged, reports, fine = finish(statistics, base, job.dtype.name)
    for spec, flags in zip(plan.expert_specs, finite, strict=True):
        _check_finite(plan, batch, base, np.asarray(flags), f"expert {spec.name!r} ({spec.path})", spec.name)
    _check_finite(plan, batch, base, np.asarray(fine), None, "")
    told = {name: np.asarray(value) for name, value in reports.items()}
    return Merged(np.asarray(merged), told, 0)


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
    """The base's tensor in the output's dtype, after the checks that a kept tensor needs."""
    base = plan.base.read(job.name)
    with np.errstate(over="ignore"):  # found below
        kept = base.astype(job.dtype, copy=False)
    if is_float(base.dtype.name):
        pieces = max(1, base.size >> 22)
        for stored, cast in zip(*(np.array_split(a.reshape(-1), pieces) for a in (base, kept)), strict=True):
            if job.parameter.kind is not Kind.OTHER and not np.isfinite(stored).all():
                raise NonFiniteError(
                    f"base ({plan.base.path}): tensor {job.name!r} holds NaN or infinity",
                    source="", tensor=job.name,
                )  # fmt: skip
            if not (np.isfinite(cast) | ~np.isfinite(stored)).all():
                raise NonFiniteError(
                    f"base ({plan.base.path}): tensor {job.name!r} does not fit {job.dtype.name}; use another --dtype",
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
    return kept


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
            if stored and not _same_bits(checkpoint.read(alias), checkpoint.read(name)):
                raise CfmergeError(
                    f"{who} ({checkpoint.path}): {alias!r} and {name!r} are tied by its config.json, but differ; "
                    "set tie_word_embeddings to false there, in the base and all experts alike"
                )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Piece by piece: a comparison makes an array of booleans."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    piece = 1 << 22
    return all(np.array_equal(a[i : i + piece], b[i : i + piece]) for i in range(0, a.size, piece))


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


def same_content(a: Checkpoint, b: Checkpoint, names: dict[str, str]) -> bool:
    """Whether two models are the same in every tensor; stops at the first difference, embeddings last.

    Args:
        names: `{name in a: name in b}`.
    """
    return all(
        _same_bits(a.read(name), b.read(names[name]))
        for name in sorted(names, key=lambda name: "embed" in name)
    )
