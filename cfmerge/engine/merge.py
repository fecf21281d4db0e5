"""`merge`: checkpoints in, one checkpoint out."""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from cfmerge import recipe as recipes
from cfmerge.core.expressions import expression
from cfmerge.engine import run
from cfmerge.engine.account import SAFER, Account
from cfmerge.engine.card import model_card, versions
from cfmerge.engine.checks import same_content
from cfmerge.engine.plan import Resolved, resolve
from cfmerge.engine.statistics import Statistics
from cfmerge.engine.units import check_memory
from cfmerge.engine.work import Progress
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.formats import Sink, Totals, check_directory_name, open_sink
from cfmerge.methods import Method
from cfmerge.models import is_float
from cfmerge.recipe import Recipe

T = TypeVar("T")
Experts = Sequence[str | Path | recipes.Expert] | Mapping[str, str | Path]


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        output: the directory, or the file, of the merged model; None where a sink took it.
        plan: the plan that was carried out.
        warnings: what speaks against using the model at all.
        notes: what the user should know: of the plan, and of the methods while they ran.
        reports: `{tensor: {name: value}}`, what the method tells of each tensor (ACE: gate, ridge ratio, ...).
        digests: SHA-256 of every input file.
        seconds: wall time.
    """

    output: Path | None
    plan: "Plan"
    notes: tuple[str, ...]
    reports: Mapping[str, Mapping[str, float]]
    digests: Mapping[Path, str]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

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
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "versions": versions(),
            "seconds": round(self.seconds, 3),
        }


class Plan(Resolved):
    """What a merge would do, and what it needs; `run` does it.

    plan = cfmerge.plan(base, experts, "ace")
    plan.counts(), plan.bytes_to_read, plan.notes
    plan.run("merged")
    """

    def run(
        self,
        output: str | Path | Sink | Mapping[str, Sink],
        *,
        overwrite: bool = False,
        memory: str | int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Does what the plan says.

        Args:
            output: the directory to make (of a sweep: one that gets a model directory for each label); or a sink
                (of a sweep: one for each label), whose `write(name, values, first)` is called with every tensor.
            overwrite, memory, progress: as in `merge`.

        Returns:
            A `MergeResult`; of a sweep `{label: MergeResult}`.

        Raises:
            CfmergeError: bad input; nothing is written then.
        """
        started = time.monotonic()
        done = self.attempted(memory, lambda plan, limit, dropped: _carried_out(
            plan, output, overwrite, limit, progress or _silent, dropped
        ))  # fmt: skip
        seconds = time.monotonic() - started
        results = {label: dataclasses.replace(result, seconds=seconds) for label, result in done.items()}
        return results.get("", results)

    def attempted(self, memory: str | int | None, do: "Callable[[Plan, int, list[str]], T]") -> T:
        """`do(plan, bound of memory, notes)`; again without an expert that is not finite, if it may be left out."""
        limit = free_memory() // 4 if memory is None else recipes.parse_size(str(memory))
        dropped: list[str] = []
        plan = self
        while True:
            for job in plan.jobs:
                check_memory(job, limit)
            try:
                return do(plan, limit, dropped)
            except NonFiniteError as error:
                plan = plan._without(error, dropped)

    def _without(self, error: NonFiniteError, dropped: list[str]) -> "Plan":
        """The plan without the expert that is not finite, if it may be left out; otherwise raises the error."""
        recipe = self.recipe
        if recipe.on_nonfinite == "error" or not error.source:
            raise error
        dropped.append(f"expert {error.source!r} was left out: tensor {error.tensor!r} is not finite")
        kept = [spec for spec in self.expert_specs if spec.name != error.source]
        least = 0 if self.statistics else 1 if self.sums else 2
        if len(kept) < least and ("one-expert" not in recipe.allow or not kept):
            raise CfmergeError(f"{error}\nwithout it {len(kept)} expert is left to merge") from None
        opened = {spec.path: expert for spec, expert in zip(self.expert_specs, self.experts, strict=True)}
        asked = {label: msgspec.structs.replace(one.recipe, experts=kept) for label, one in self.results.items()}
        return planned(asked, self.statistics, sums=self.sums, opened={**opened, recipe.base: self.base})


def planned(asked: Mapping[str, Recipe], statistics: Statistics | None = None, **how: Any) -> Plan:
    """The plan of recipes by label; see `cfmerge.engine.plan.resolve`."""
    resolved = resolve(asked, statistics, **how)
    return Plan(**{field.name: getattr(resolved, field.name) for field in dataclasses.fields(resolved)})


def make_plan(recipe: Recipe, statistics: Statistics | None = None, *, sums: bool = False) -> Plan:
    """The plan of a recipe: checkpoints opened, headers checked, no tensor read; `sums` to accumulate statistics.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    return planned({"": recipe}, statistics, sums=sums)


def plan(
    base: str | Path | Recipe | Mapping[str, Recipe],
    experts: Experts = (),
    method: str | Method = "ace",
    *,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What `merge` with these arguments would do; `.run(output)` does it. Headers are read, tensors are not.

    Args:
        base: as in `merge`; or a `Recipe`, which says everything; or `{label: Recipe}` of several that differ in
            method and parameters alone, which are merged in one pass.
        experts, method, parameters: as in `merge`.
        **options: the other fields of `Recipe`.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    if isinstance(base, Mapping):
        return planned(base)
    return make_plan(base if isinstance(base, Recipe) else as_recipe(base, experts, method, parameters, options))


def merge(
    base: str | Path,
    experts: Experts,
    method: str | Method = "ace",
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
        method: a registered method: its name, a chain as text, or the method itself; `parameters` are the
            arguments of one that is named.
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
    recipe = as_recipe(base, experts, method, parameters, {"rules": rules, **options})
    return merge_recipe(recipe, output, overwrite=overwrite, memory=memory, progress=progress)


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
    return make_plan(recipe, statistics).run(output, overwrite=overwrite, memory=memory, progress=progress)


def as_recipe(
    base: str | Path,
    experts: Experts,
    method: str | Method,
    parameters: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Recipe:
    """The arguments of `merge` as a recipe."""
    if isinstance(experts, Mapping):
        experts = [recipes.Expert(path=str(path), name=name) for name, path in experts.items()]
    if isinstance(method, Method):
        if method.call is None:
            raise CfmergeError(
                f"method {method.name!r} is not registered, and a merge of files must be able to name it: put "
                "@cfmerge.methods.register on the function that makes it"
            )
        if parameters:
            raise CfmergeError(f"parameters {dict(parameters)}: method {method.name!r} has its own already")
        method = expression(method)
    content = {
        "base": str(base),
        "experts": [msgspec.to_builtins(e) if isinstance(e, recipes.Expert) else str(e) for e in experts],
        "method": method,
        "parameters": dict(parameters or {}),
        **options,
        "rules": [msgspec.to_builtins(r) if isinstance(r, recipes.Rule) else dict(r) for r in options.get("rules", ())],
    }
    return recipes.parse(content, "cfmerge.merge")


def directory_name(label: str) -> str:
    """The label as the name of a directory: what is not a letter, digit or one of `._-=,` becomes `_`."""
    return re.sub(r"[^\w.=,-]+", "_", label).strip("_.") or "_"


def _carried_out(
    plan: Plan,
    output: Any,
    overwrite: bool,
    memory: int,
    progress: Progress,
    dropped: Sequence[str],
) -> dict[str, MergeResult]:
    """The results by label, written into directories or handed to sinks."""
    if not isinstance(output, str | Path):
        sinks = output if isinstance(output, Mapping) else {"": output}
        if set(sinks) != set(plan.results):
            raise CfmergeError(f"run: the plan's results are {list(plan.results)}, the sinks are for {list(sinks)}")
        notes = [*dropped, *_check_contents(plan)]
        account = run.merge(plan.work, list(sinks.values()), memory=memory, progress=progress)
        told = (*plan.notes, *notes, *account.lines())
        return {
            label: MergeResult(None, plan.of(label), told, account.reports_of(n), {}, warnings=_warned(account, n))
            for n, label in enumerate(plan.results)
        }
    if "" not in plan.results:
        check_directory_name(Path(output))
    outputs = [Path(output) / directory_name(label) if label else Path(output) for label in plan.results]
    if len(set(outputs)) < len(outputs):
        raise CfmergeError(f"sweep: two labels give the same directory; the labels are {list(plan.results)}")
    checkpoints = (plan.base, *plan.experts)
    inputs = [file for checkpoint in checkpoints for file in checkpoint.files]
    places = [*inputs, *(checkpoint.path for checkpoint in checkpoints)]
    with contextlib.ExitStack() as stack:
        sinks = {
            label: stack.enter_context(_sink(plan.of(label), target, overwrite, places))
            for label, target in zip(plan.results, outputs, strict=True)
        }
        notes = [*dropped, *_check_contents(plan)]
        for sink in sinks.values():
            sink.declare(plan.output)
        stop = threading.Event()
        with ThreadPoolExecutor(1, "hash") as hasher:
            digests = hasher.submit(lambda: {file: _sha256(file, stop) for file in dict.fromkeys(inputs)})
            try:
                account = run.merge(plan.work, list(sinks.values()), memory=memory, progress=progress, stop=stop)
            except BaseException:
                stop.set()
                raise
        notes += account.lines()
        results = {}
        for number, (label, sink) in enumerate(sinks.items()):
            warned, shown = _warned(account, number, outputs[number]), [*notes, *sink.notes]
            card = model_card(plan.of(label), digests.result(), shown, warned)
            sink.finish(Totals(card, _exported_heads(plan)))
            reports = account.reports_of(number)
            results[label] = MergeResult(
                sink.target, plan.of(label), (*plan.notes, *shown), reports, digests.result(), warnings=warned
            )
        for sink in sinks.values():
            sink.commit()
        return results


def _sink(plan: Plan, output: Path, overwrite: bool, inputs: Sequence[Path]) -> Sink:
    """The sink of a plan with one result."""
    return open_sink(
        output, plan.folders, shard_bytes=plan.shard_bytes, side_files=plan.side_files, edits=_new_dtype(plan),
        heads=bool(plan.exported), recipe=plan.explicit_recipe.to_yaml(), overwrite=overwrite, inputs=inputs,
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


def _warned(account: Account, result: int, output: Path | None = None) -> tuple[str, ...]:
    """The warning about a whole model, with the command that makes another."""
    text = account.warning(result)
    if text and output is not None:
        text += f":\n  cfmerge merge {output / 'README.md'} -m {SAFER} -o {output}-{SAFER}"
    return (text,) if text else ()


def _silent(name: str, count: int) -> None:
    pass


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
