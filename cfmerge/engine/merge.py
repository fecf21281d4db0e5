"""`merge`: checkpoints in, one checkpoint out."""

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cfmerge import recipe as recipes
from cfmerge.engine.batches import check_memory
from cfmerge.engine.card import model_card, versions
from cfmerge.engine.pipeline import Progress, execute, same_content
from cfmerge.engine.plan import Plan, make_plan
from cfmerge.engine.statistics import Statistics
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.formats import Sink, Totals, open_sink
from cfmerge.parameters import is_float
from cfmerge.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        output: the directory, or the file, of the merged model.
        plan: the plan that was carried out.
        notes: what the user should know: of the plan, and of the methods while they ran.
        reports: `{tensor: {name: value}}`, what the method tells of each tensor (ACE: gate, ridge ratio, ...).
        digests: SHA-256 of every input file.
        seconds: wall time.
    """

    output: Path
    plan: Plan
    notes: tuple[str, ...]
    reports: Mapping[str, Mapping[str, float]]
    digests: Mapping[Path, str]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "output": str(self.output),
            "method": self.plan.method.name,
            "experts": [spec.name for spec in self.plan.expert_specs],
            "counts": [
                {"kind": kind, "what": what, "tensors": count}
                for (kind, what), count in sorted(self.plan.counts().items())
            ],
            "bytes_read": self.plan.bytes_to_read,
            "bytes_written": self.plan.bytes_to_write,
            "sha256": {str(file): digest for file, digest in self.digests.items()},
            "notes": list(self.notes),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
        }


def merge(
    base: str | Path,
    experts: Sequence[str | Path | recipes.Expert] | Mapping[str, str | Path],
    method: str = "ace",
    *,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    rules: Sequence[recipes.Rule | Mapping[str, Any]] = (),
    overwrite: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> MergeResult:
    """Merges checkpoints on disk into one, streaming.

    Args:
        base: a Hugging Face directory (safetensors) or a `.safetensors` file.
        experts: the same of each expert; a mapping gives them names, `Expert` weights too.
        method: a registered method's name; `parameters` are its arguments.
        output: the directory to make, or the `.safetensors` file. It appears when it is complete.
        rules: `Rule`s, or mappings with their fields; the first whose pattern matches a tensor's name wins.
        overwrite: replace a model directory that is there.
        memory: bound of the working set, bytes or `"4GB"`; none: a quarter of what is free.
        progress: called with (tensor name, bytes read since the last call), from the working threads, one at a time.
        **options: the other fields of `Recipe`: heads, on_nonfinite, allow, dtype, precision, shard_size,
            side_files.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    recipe = as_recipe(base, experts, method, parameters or {}, {"rules": rules, **options})
    return merge_recipe(recipe, output, overwrite=overwrite, memory=memory, progress=progress)


def as_recipe(
    base: str | Path,
    experts: Sequence[str | Path | recipes.Expert] | Mapping[str, str | Path],
    method: str,
    parameters: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Recipe:
    """The arguments of `merge` as a recipe."""
    if isinstance(experts, Mapping):
        experts = [recipes.Expert(path=str(path), name=name) for name, path in experts.items()]
    content = {
        "base": str(base),
        "experts": [msgspec.to_builtins(e) if isinstance(e, recipes.Expert) else str(e) for e in experts],
        "method": method,
        "parameters": dict(parameters),
        **options,
        "rules": [msgspec.to_builtins(r) if isinstance(r, recipes.Rule) else dict(r) for r in options.get("rules", ())],
    }
    return recipes.parse(content, "cfmerge.merge")


def merge_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
) -> MergeResult:
    """Carries out a recipe; see `merge`. `statistics` are what was kept of other experts, instead of a file of them."""
    started = time.monotonic()
    limit = free_memory() // 4 if memory is None else recipes.parse_size(str(memory))
    dropped: list[str] = []
    while True:
        plan = make_plan(recipe, statistics)
        for job in plan.jobs:
            check_memory(job, limit)
        try:
            result = carry_out(plan, [plan], [Path(output)], overwrite, limit, progress, dropped)[0]
        except NonFiniteError as error:
            recipe = without_expert(plan, error, dropped)
            continue
        return dataclasses.replace(result, seconds=time.monotonic() - started)


def without_expert(plan: Plan, error: NonFiniteError, dropped: list[str]) -> Recipe:
    """The recipe without the expert that is not finite, if it may be left out; otherwise raises the error."""
    if plan.recipe.on_nonfinite == "error" or not error.source:
        raise error
    dropped.append(f"expert {error.source!r} was left out: tensor {error.tensor!r} is not finite")
    kept = [spec for spec in plan.expert_specs if spec.name != error.source]
    if len(kept) < 2 and "one-expert" not in plan.recipe.allow:
        raise CfmergeError(f"{error}\nwithout it {len(kept)} expert is left to merge") from None
    return msgspec.structs.replace(plan.recipe, experts=kept)


def carry_out(
    plan: Plan,
    shown: Sequence[Plan],
    outputs: Sequence[Path],
    overwrite: bool,
    memory: int,
    progress: Progress | None,
    dropped: Sequence[str] = (),
) -> list[MergeResult]:
    """Executes a plan whose methods give one result for each of `shown`, the plans that the outputs tell of."""
    checkpoints = (plan.base, *plan.experts)
    inputs = [file for checkpoint in checkpoints for file in checkpoint.files]
    places = [*inputs, *(checkpoint.path for checkpoint in checkpoints)]
    with contextlib.ExitStack() as stack:
        sinks = [
            stack.enter_context(_sink(plan, told, output, overwrite, places))
            for output, told in zip(outputs, shown, strict=True)
        ]
        notes = [*dropped, *_check_contents(plan)]
        for sink in sinks:
            sink.declare(plan.output)
        stop = threading.Event()
        with ThreadPoolExecutor(1, "hash") as hasher:
            digests = hasher.submit(lambda: {file: _sha256(file, stop) for file in dict.fromkeys(inputs)})
            try:
                account = execute(plan, sinks, memory, progress or (lambda *_: None), stop)
            except BaseException:
                stop.set()
                raise
        notes += [*account.lines(), *sinks[0].notes]
        for sink, told in zip(sinks, shown, strict=True):
            sink.finish(Totals(model_card(told, digests.result(), notes), _exported_heads(plan)))
        for sink in sinks:
            sink.commit()
        return [
            MergeResult(sink.target, told, (*plan.notes, *notes), reports, digests.result(), 0.0)
            for sink, told, reports in zip(sinks, shown, account.by_result(len(shown)), strict=True)
        ]


def _sink(plan: Plan, told: Plan, output: Path, overwrite: bool, inputs: Sequence[Path]) -> Sink:
    """Where the merged model goes; `told` is the plan that it tells of."""
    return open_sink(
        output, plan.folders, shard_bytes=plan.shard_bytes, side_files=plan.side_files, edits=_new_dtype(plan),
        heads=bool(plan.exported), recipe=told.explicit_recipe.to_yaml(), overwrite=overwrite, inputs=inputs,
    )  # fmt: skip


def _new_dtype(plan: Plan) -> dict[str, dict[str, str]]:
    """`{config.json: {key: dtype}}` of every folder with weights, where the output's dtype is chosen."""
    edits = {}
    for name in (f"{folder.name}/config.json".lstrip("/") for folder in plan.folders if plan.recipe.dtype):
        if name in plan.side_files:
            config = json.loads(plan.side_files[name].read_text())
            keys = {"dtype", "torch_dtype"} & set(config) or {"dtype"}
            edits[name] = dict.fromkeys(sorted(keys), str(plan.recipe.dtype))
    return edits


def _check_contents(plan: Plan) -> list[str]:
    """Models that are the same byte by byte though their files are others."""
    notes = []
    models = [("the base", plan.base, {job.name: job.name for job in plan.jobs})]
    for number, (spec, expert) in enumerate(zip(plan.expert_specs, plan.experts, strict=True)):
        sources = {job.name: job.sources[number] for job in plan.jobs}
        for who, other, theirs in models:
            names = {theirs[name]: source for name, source in sources.items() if source and theirs.get(name)}
            allowed = "base-as-expert" if other is plan.base else "duplicate-experts"
            if other is expert or not names or not same_content(other, expert, names):
                continue
            if allowed not in plan.recipe.allow:
                raise CfmergeError(
                    f"expert {spec.name!r} ({spec.path}) holds the same weights as {who} ({other.path}). Leave it "
                    f"out, or allow it: --allow {allowed} (recipe: 'allow: [{allowed}]')"
                )
            notes.append(f"expert {spec.name!r} holds the same weights as {who}")
        models.append((f"expert {spec.name!r}", expert, {n: s for n, s in sources.items() if s}))
    return notes


def _exported_heads(plan: Plan) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
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


def _sha256(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            if stop.is_set():
                return ""
            digest.update(block)
    return digest.hexdigest()


def free_memory() -> int:
    """Bytes of memory that are available."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(row for row in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in row)
        return int(line.split()[1]) * 1024
    return 4 << 30
