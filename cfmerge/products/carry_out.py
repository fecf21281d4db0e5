"""A plan carried out: sinks for its results, the run, model cards."""

import contextlib
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cfmerge import hub
from cfmerge.align.source import alignment_of
from cfmerge.engine import run
from cfmerge.engine.account import SAFER, Account
from cfmerge.engine.checks import same_content
from cfmerge.engine.placement import Placement
from cfmerge.engine.processes import by_the_first
from cfmerge.errors import CfmergeError, NonFiniteError, StoppedError
from cfmerge.formats import DirectorySink, Source, Totals, check_directory_name, open_sink
from cfmerge.formats.adapter_sink import AdapterSink, Rank
from cfmerge.formats.dequantised import KEYS
from cfmerge.formats.journal import FileJournal
from cfmerge.formats.layout import read_json
from cfmerge.formats.naming import format_by_name
from cfmerge.models import is_float
from cfmerge.planning.resolved import Resolved
from cfmerge.planning.work import Progress
from cfmerge.products.hashes import sha256
from cfmerge.products.processes import all_digests, check_same_plan, my_files, ranges_of_others
from cfmerge.products.resume import LeftOut, joined, kept_where_it_can_go_on, recall_left_out, resumed
from cfmerge.report.card import model_card
from cfmerge.report.result import MergeResult

BEGINNING = 1024  # entries of a tensor by which most models that differ are told apart


def directory_name(label: str) -> str:
    """The label as the name of a directory: `_` stands for all but letters, digits and `._-=,`."""
    return re.sub(r"[^\w.=,-]+", "_", label).strip("_.") or "_"


class Writes(Protocol):
    """What becomes of a plan's result on disk."""

    def sink(self, plan: Resolved, output: Path, **how: Any) -> DirectorySink:
        """The sink of a plan with one result; `how`: overwrite, inputs, digest, resume and join of `DirectorySink`."""
        ...

    def totals(
        self, plan: Resolved, account: Account, digests: Mapping[Path, str], notes: Sequence[str], warned: Sequence[str]
    ) -> Totals:
        """All that is written when the tensors are."""
        ...


class Models:
    """A model, or an adapter, with its card."""

    def sink(self, plan: Resolved, output: Path, **how: Any) -> DirectorySink:
        if plan.recipe.adapter_out is not None:
            return _adapter_sink(plan, output, plan.recipe.adapter_out, **how)
        return open_sink(
            output, plan.folders, shard_bytes=plan.shard_bytes, side_files=plan.side_files, edits=_edits(plan),
            format=plan.recipe.format, heads=bool(plan.exported), recipe=plan.explicit_recipe.to_yaml(), **how,
        )  # fmt: skip

    def totals(
        self, plan: Resolved, account: Account, digests: Mapping[Path, str], notes: Sequence[str], warned: Sequence[str]
    ) -> Totals:
        return Totals(model_card(plan, digests, notes, warned), exported_heads(plan))


def carried_out(
    plan: Resolved,
    output: Any,
    overwrite: bool,
    memory: int,
    placement: Placement,
    progress: Progress,
    left_out: Sequence[LeftOut],
    fresh: bool,
    writes: Writes,
) -> dict[str, MergeResult]:
    """The results by label, written into directories or handed to sinks."""
    plans = {label: plan.of(label) for label in plan.results}
    dropped = [one.note for one in left_out]
    if not isinstance(output, str | Path):
        sinks = output if isinstance(output, Mapping) else {"": output}
        if set(sinks) != set(plan.results):
            raise CfmergeError(f"run: the plan's results are {list(plan.results)}, the sinks are for {list(sinks)}")
        notes = [*dropped, *_check_contents(plan)]
        account = run.merge(plan.work, list(sinks.values()), memory=memory, placement=placement, progress=progress)
        alignment = alignment_of((plan.base, *plan.experts))
        told = (*plan.notes, *notes, *(alignment.found().told if alignment else ()), *_noted(account, plan))
        return {
            label: MergeResult(None, own, told, account.reports_of(n), {}, warnings=_warned(account, plan, n))
            for n, (label, own) in enumerate(plans.items())
        }
    if "" not in plan.results:
        check_directory_name(Path(output))
    outputs = [Path(output) / directory_name(label) if label else Path(output) for label in plan.results]
    if len(set(outputs)) < len(outputs):
        raise CfmergeError(f"sweep: two labels give the same directory; the labels are {list(plan.results)}")
    checkpoints = (plan.base, *plan.experts)
    inputs = [file for checkpoint in checkpoints for file in checkpoint.files]
    places = [*inputs, *(checkpoint.path for checkpoint in checkpoints)]
    processes = placement.processes
    first = processes.number == 0
    processes.begin()
    with contextlib.ExitStack() as stack:
        with processes.telling():
            check_same_plan(processes, plan.digest)
            if first and not fresh:
                recall_left_out(plan, outputs)
            how = {
                "overwrite": overwrite,
                "inputs": places,
                "digest": plan.digest,
                "resume": not fresh,
                "join": not first,
            }
            sinks = {
                label: stack.enter_context(writes.sink(own, target, **how))
                for (label, own), target in zip(plans.items(), outputs, strict=True)
            }
        outs = list(sinks.values())
        journal = FileJournal(Path(output), [sink.path for sink in outs], processes.number)
        if first:
            stack.enter_context(kept_where_it_can_go_on(Path(output), outs, journal))
        stack.enter_context(processes.at_once())
        earlier = tuple(by_the_first(
            processes, "opened", lambda: resumed(plan, outs, journal, left_out, _check_contents)
        ))  # fmt: skip
        if not first:
            joined(plan, outs, journal)
        processes.gathered("joined", None)
        if alignment := alignment_of(checkpoints):
            alignment.recall(journal.header["alignment"])
        notes = [*dropped, *journal.header["contents"], *(alignment.found().told if alignment else ())]
        stop, files = threading.Event(), list(dict.fromkeys(inputs))
        with ThreadPoolExecutor(1, "hash") as hasher:
            hashing = hasher.submit(lambda: {file: sha256(file, stop, fresh) for file in my_files(processes, files)})
            try:
                account = run.merge(
                    plan.work, outs, memory=memory, placement=placement, progress=progress, stop=stop, journal=journal
                )  # fmt: skip
                hashed = hashing.result()
            except BaseException:
                stop.set()
                raise
        digests = all_digests(processes, hashed, files)
        if not first:
            for sink in outs:
                sink.sync()
        others = ranges_of_others(processes, journal.written.ranges())
        notes += _noted(account, plan)
        results = {}
        for number, (label, sink) in enumerate(sinks.items()):
            warned, shown = _warned(account, plan, number, outputs[number]), [*notes, *sink.notes]
            if first:
                sink.covers(others)
                sink.finish(writes.totals(plans[label], account, digests, shown, warned))
            reports = account.reports_of(number)
            results[label] = MergeResult(
                sink.target, plans[label], (*plan.notes, *shown), reports, digests, warnings=warned, resumed=earlier
            )
        if first:
            for sink in sinks.values():
                sink.commit()
        with contextlib.suppress(*[StoppedError] if first else []):  # the output is there, whoever is gone now
            processes.gathered("committed", None)
        return results


def _adapter_sink(plan: Resolved, output: Path, rank: Rank, **how: Any) -> DirectorySink:
    other = plan.recipe.format not in {None, "safetensors"}
    if plan.exported or plan.recipe.dtype or other:
        key = "heads: export" if plan.exported else f"dtype: {plan.recipe.dtype}"
        key = f"format: {plan.recipe.format}" if other else key
        raise CfmergeError(f"output {output}: `{key}` is of a model, and an adapter has none of it; leave it out")
    merged = {job.name: job.parameter for job in plan.jobs if job.assignment.action == "merge"}
    cached = hub.snapshot(plan.base.path)
    return AdapterSink(output, plan.base, merged, rank, cached.repository if cached else "", **how)


def _edits(plan: Resolved) -> dict[str, dict[str, Any]]:
    """`{file: {key: value}}`: what the output's copies of the side files say otherwise; None takes a key out."""
    of_configs = _config_edits(plan)
    return {name: {**plan.edits.get(name, {}), **of_configs.get(name, {})} for name in {**plan.edits, **of_configs}}


def _config_edits(plan: Resolved) -> dict[str, dict[str, Any]]:
    """`{config.json: {key: value}}` of every folder with weights: the dtype that is chosen, no quantisation."""
    edits: dict[str, dict[str, Any]] = {}
    for name in (f"{folder.name}/config.json".lstrip("/") for folder in plan.folders):
        config = read_json(plan.side_files[name]) if name in plan.side_files else {}
        gone = [key for key in KEYS if key in config] if plan.recipe.dequantize else []
        dtype = plan.recipe.dtype or ("bfloat16" if gone else None)
        if config and dtype:
            keys = {"dtype", "torch_dtype"} & set(config) or {"dtype"}
            edits[name] = dict.fromkeys(sorted(keys), dtype) | dict.fromkeys(gone)
    return edits


def _noted(account: Account, plan: Resolved) -> list[str]:
    """The notes of the run."""
    quiet = plan.recipe.align is not None or "duplicate-experts" in plan.recipe.allow
    return [*(() if quiet else account.twins([expert.name for expert in plan.work.experts])), *account.lines()]


def _warned(account: Account, plan: Resolved, result: int, output: Path | None = None) -> tuple[str, ...]:
    """The warnings about experts and the whole model, with the command that makes another."""
    quiet = plan.recipe.align is not None or "other-base" in plan.recipe.allow
    foreign = () if quiet else account.foreign([expert.name for expert in plan.work.experts])
    text = account.warning(result)
    file = output is not None and format_by_name(output, None)
    if text and output is not None and file in {None, "safetensors"}:  # others hold no recipe to begin from
        single = file is not None  # it holds its recipe itself
        recipe = output if single else output / "README.md"
        other = output.with_stem(f"{output.stem}-safer") if single else f"{output}-safer"
        text += f":\n  {shlex.join(['cfmerge', 'merge', str(recipe), '-m', SAFER, '-o', str(other)])}"
    return (*foreign, text) if text else tuple(foreign)


def _check_contents(plan: Resolved) -> list[str]:
    """Models that are the same byte by byte though their files are others."""
    notes = []

    def beginning(model: Source, name: str) -> bytes:
        return model.read(name, 0, min(BEGINNING, model.tensors[name].size)).tobytes()

    models = [("the base", plan.base, {job.name: job.name for job in plan.jobs})]
    how = ", in one order" if plan.recipe.align else ""
    for number, (spec, expert) in enumerate(zip(plan.expert_specs, plan.experts, strict=True)):
        sources = {job.name: job.sources[number] for job in plan.jobs}
        for who, other, theirs in models:
            names = {theirs[name]: source for name, source in sources.items() if source and theirs.get(name)}
            allowed = "base-as-expert" if other is plan.base else "duplicate-experts"
            if other is expert or not names:
                continue
            first = min(names, key=lambda name: "embed" in name)
            if beginning(other, first) != beginning(expert, names[first]) or not same_content(other, expert, names):
                continue
            if allowed not in plan.recipe.allow and not (other is plan.base and plan.recipe.align):
                raise CfmergeError(
                    f"expert {spec.name!r} ({spec.path}) holds the same weights as {who} ({other.path}){how}. Leave it "
                    f"out, or allow it: --allow {allowed} (recipe: 'allow: [{allowed}]')"
                )
            notes.append(f"expert {spec.name!r} holds the same weights as {who}{how}")
        models.append((f"expert {spec.name!r}", expert, {n: s for n, s in sources.items() if s}))
    return notes


def exported_heads(plan: Resolved) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """`(expert, {name: tensor})` of the heads that are written beside the model."""
    for spec, expert in zip(plan.expert_specs, plan.experts, strict=True):
        tensors = {name: expert.read(name) for name in plan.exported.get(spec.name, ())}
        for name, tensor in tensors.items():
            if is_float(tensor.dtype.name) and not np.isfinite(tensor).all():
                raise NonFiniteError(
                    f"expert {spec.name!r} ({spec.path}): head {name!r} holds NaN or infinity",
                    source=spec.name, tensor=name,
                )  # fmt: skip
        if tensors:
            yield spec.name, tensors
