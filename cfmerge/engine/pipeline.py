"""The pipeline: workers read and merge batches, a thread writes behind them; memory is bounded by the batches."""

import contextlib
import dataclasses
import functools
import importlib
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from cfmerge.engine.batches import Batch, make_batches
from cfmerge.engine.plan import Job, Plan
from cfmerge.engine.solve import Merged, Progress, check_stack, merge_batch
from cfmerge.engine.survey import Stack, by_member, found_for, kind_of, survey
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.formats import Checkpoint, Sink
from cfmerge.methods import Found
from cfmerge.parameters import Kind, is_float

WORKERS = 2  # batches in work at once: one computes while another reads, or factorises on one core
WRITE_BEHIND = 8  # finished tensors


@dataclasses.dataclass
class Account:
    """What happened: notes of the methods with the tensors that they are about, and reports by tensor."""

    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reports: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    float64: int = 0

    def add(self, batch: Batch, merged: Merged) -> None:
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

    def by_result(self, results: int) -> list[dict[str, dict[str, float]]]:
        """The reports of each result of a sweep; there they are called `NUMBER:NAME`."""
        if results == 1:
            return [self.reports]
        return [
            {
                tensor: {key.split(":", 1)[1]: v for key, v in report.items() if key.startswith(f"{number}:")}
                for tensor, report in self.reports.items()
            }
            for number in range(results)
        ]

    def lines(self) -> list[str]:
        counts = Counter({note: len(names) for note, names in self.notes.items()})
        lines = [
            f"{names[0]}{f' and {counts[note] - 1} more' if counts[note] > 1 else ''}: {note}"
            for note, names in self.notes.items()
        ]
        if self.float64:
            lines.append(f"float64 was used for {self.float64} ill-conditioned tensors")
        return lines


def execute(plan: Plan, writers: Sequence[Sink], memory: int, progress: Progress, stop: threading.Event) -> Account:
    """Merges every job of the plan into the writers, one for each result of its methods.

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
    mergers, behind = ThreadPoolExecutor(workers, "merge"), ThreadPoolExecutor(1, "write")
    merging: deque[tuple[Batch, Future[Merged]]] = deque()
    writing: deque[Future[None]] = deque()

    def finish() -> None:
        batch, future = merging.popleft()
        merged = future.result()
        account.add(batch, merged)
        for job, values in zip(batch.jobs, merged.tensors, strict=True):
            results = values[None] if len(writers) == 1 else values
            for writer, result in zip(writers, results, strict=True):
                writing.append(behind.submit(_write, writer, job, result, batch.first))
        while len(writing) > WRITE_BEHIND:
            writing.popleft().result()

    settings = contextlib.ExitStack()
    # LAPACK on the CPU is OpenBLAS, whose threads fight with XLA's: 0.17 s of Cholesky have become 2 s. jaxlib takes it
    # from SciPy when it first needs it, and what is not loaded is not limited
    importlib.import_module("scipy.linalg")
    settings.enter_context(threadpool_limits(1, user_api="blas"))
    settings.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # where rows become a Gram
    try:
        for job in plan.jobs:
            _check_stop(stop)
            _check_ties(plan, job)
            if job.assignment.action == "keep-base":
                kept = _kept(plan, job)
                for writer in writers:
                    _write(writer, job, kept, 0)
                tell(job.name, job.bytes_read * (1 + len(job.sources)))
        found = _surveys(plan, memory, tell, stop)
        for batch in make_batches(plan.jobs, memory):
            _check_stop(stop)
            known = found.get(kind_of(batch.jobs[0].assignment.method))
            merging.append((batch, mergers.submit(merge_batch, plan, batch, known, tell)))
            if len(merging) > workers:
                finish()
        while merging:
            finish()
        while writing:
            writing.popleft().result()
    finally:
        mergers.shutdown(cancel_futures=True)
        behind.shutdown(cancel_futures=True)
        settings.close()
    return account


def _surveys(plan: Plan, memory: int, progress: Progress, stop: threading.Event) -> dict[Any, Found | None]:
    """What the methods that need to know the whole model found in it: each in the tensors that it merges."""
    merged = [job for job in plan.jobs if job.assignment.action == "merge"]
    methods = [job.assignment.method for job in merged]

    def stacks(jobs: list[Job]) -> Iterator[Stack]:
        for batch in make_batches(tuple(jobs), memory):
            _check_stop(stop)
            progress(batch.jobs[0].name, 0)
            yield check_stack(plan, batch, batch.stack(plan))

    found = {}
    for kind, (method, numbers) in by_member(methods).items():
        jobs = [merged[number] for number in numbers]
        double = plan.recipe.precision == "float64" or any(job.parameter.dtype == "float64" for job in jobs)
        with jax.enable_x64(double):
            compute = "float64" if double else "float32"
            found[kind] = survey(method, len(plan.experts), functools.partial(stacks, jobs), compute)
    surveyed = {kind_of(method): method for method in methods if method.survey is not None}
    return {kind: found_for(method, found) for kind, method in surveyed.items()}


def _write(writer: Sink, job: Job, values: np.ndarray, first: int) -> None:
    for name in job.writes:
        writer.write(name, values, first)


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
        _same_bits(a.read(name), b.read(names[name])) for name in sorted(names, key=lambda name: "embed" in name)
    )
