"""The plan: a recipe resolved against the checkpoints' headers. No tensor is read."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgspec
import numpy as np

from cfmerge import methods
from cfmerge.engine.assign import Assignment, assign
from cfmerge.engine.configs import config_notes
from cfmerge.engine.cost import statistic_size
from cfmerge.engine.match import match_experts
from cfmerge.engine.plugins import load_plugins
from cfmerge.engine.resolve import depths, place, same_for_stacked_layers, settle, weight_at
from cfmerge.engine.statistics import Statistics, fingerprint, full_form
from cfmerge.errors import CfmergeError
from cfmerge.formats import Checkpoint, Folder, open_checkpoint, quantised
from cfmerge.formats.folders import check_folders, same_folders
from cfmerge.formats.side_files import check_whole, side_files
from cfmerge.methods import Method
from cfmerge.methods._base import Part, is_chain
from cfmerge.methods._random import check_seed
from cfmerge.methods._registry import expression, plain_number
from cfmerge.parameters import Parameter, classify, is_float
from cfmerge.recipe import Expert, Recipe, parse_size

OUTPUT_DTYPES = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the output.

    Attributes:
        writes: the names that it is written under: its own and those tied to it.
        sources: its name in each expert, or None where the expert does not have it.
        dtype: of the output.
        weights: of the experts, for this tensor.
    """

    name: str
    assignment: Assignment
    writes: tuple[str, ...]
    sources: tuple[str | None, ...]
    dtype: np.dtype
    weights: tuple[float, ...]

    @property
    def parameter(self) -> Parameter:
        return self.assignment.parameter

    @property
    def bytes_read(self) -> int:
        return self.parameter.size * np.dtype(_dtype(self.parameter.dtype)).itemsize

    @property
    def layout(self) -> str:
        """That the method sees it in: none if it takes entries one by one, or where there is no matrix."""
        return "" if self.assignment.method.scope == "entry" else self.parameter.layout

    @property
    def matrices(self) -> int:
        """How many canonical matrices it holds: layers may be stacked."""
        return self.parameter.canonical[0] if self.layout else 1

    @property
    def flops(self) -> int:
        """Of the merge, about: for a matrix method the Gram and cross term of each expert, and one solve."""
        if self.assignment.action != "merge":
            return 0
        experts = len(self.sources)
        if self.assignment.method.scope != "matrix":
            return 3 * experts * self.parameter.size
        b, m, n = self.parameter.canonical
        return b * (experts * (2 * m * n * n + 2 * m * n * min(n, 2 * m)) + n**3 // 3 + 2 * m * n * n)

    @property
    def working_bytes(self) -> int:
        """What merging it may need at once: the statistic of all experts, the experts, and room to solve.

        In float32 for an output of 16 bits; in float64 otherwise, to which an ill-conditioned one is driven.
        """
        method = self.assignment.method
        if self.assignment.action != "merge" or method.scope == "entry":
            return 0
        if self.layout:
            _, m, n = self.parameter.canonical
        else:
            m, n = 1, self.parameter.size
        shape = (m, n) if self.layout else self.parameter.shape
        floats = statistic_size(method, shape, len(self.sources)) + (5 + method.results) * m * n
        if method.scope == "matrix":
            floats += 3 * n * n
        if not method.additive:
            floats += len(self.sources) * m * n
        return (4 if self.dtype.itemsize == 2 else 8) * floats


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a merge would do, and what it needs."""

    recipe: Recipe
    method: Method
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    expert_specs: tuple[Expert, ...]
    jobs: tuple[Job, ...]
    exported: Mapping[str, tuple[str, ...]]  # expert name: the head tensors that are written beside the model
    notes: tuple[str, ...]
    shard_bytes: int
    side_files: Mapping[str, Path]
    moments: tuple[Checkpoint | None, ...] = ()  # what was measured of each expert
    statistics: Statistics | None = None  # what was kept of experts before these

    @property
    def before(self) -> int:
        """How many experts are in the statistics: those of the plan are numbered after them."""
        return len(self.statistics.experts) if self.statistics else 0

    @property
    def output(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Headers of the output's tensors, in the base's order."""
        headers = {
            name: (job.parameter.shape, job.dtype)
            for job in self.jobs if job.assignment.action != "skip" for name in job.writes
        }  # fmt: skip
        return {name: headers[name] for name in self.base.tensors if name in headers}

    @property
    def folders(self) -> tuple[Folder, ...]:
        """How the weights of the output lie: as the base's, without folders that have no tensor left."""
        names = self.output
        return tuple(f for f in self.base.folders if any(name.startswith(f.prefix) for name in names))

    @property
    def bytes_to_read(self) -> int:
        return sum(job.bytes_read * (1 + len(job.sources)) for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.output.values())

    @property
    def flops(self) -> int:
        return sum(job.flops for job in self.jobs)

    @property
    def largest(self) -> Job | None:
        """The job that needs most memory at once."""
        return max(self.jobs, key=lambda job: job.working_bytes, default=None)

    @property
    def explicit_recipe(self) -> Recipe:
        """The recipe with every parameter of the method and every expert's name and weight written out."""
        method, known = self.method.name, self.method.parameters
        if is_chain(self.method):
            method, known = self.recipe.method, {}
        parameters = {k: expression(v) if isinstance(v, Part) else plain_number(v) for k, v in known.items()}
        return msgspec.structs.replace(
            self.recipe, method=method, parameters=parameters, experts=list(self.expert_specs)
        )  # fmt: skip

    def counts(self) -> Counter[tuple[str, str]]:
        """How many tensors of each (kind, what is done)."""
        return Counter((str(job.parameter.kind), job.assignment.label) for job in self.jobs)


def make_plan(recipe: Recipe, statistics: Statistics | None = None, *, sums: bool = False) -> Plan:
    """Opens all checkpoints, reads their headers, and settles everything that can be settled from them.

    Args:
        recipe: what is asked for.
        statistics: what was kept of other experts; none: what the recipe names, if it does.
        sums: methods in the form whose statistic is a sum of fixed size, as accumulating needs it.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    check_seed(recipe.seed)
    load_plugins(recipe.plugins)
    method = methods.make(recipe.method, recipe.parameters)
    if statistics is None and recipe.statistics is not None:
        statistics = Statistics.load(recipe.statistics)
    sums = sums or statistics is not None
    if statistics is not None:
        recipe = statistics.recipe(recipe)
    specs = recipe.resolved_experts(least=0 if statistics else 1 if sums or method.experts[1] == 1 else 2)
    shard_bytes = parse_size(recipe.shard_size)
    base = open_checkpoint(recipe.base)
    experts = [open_checkpoint(spec.path) for spec in specs]
    for expert in experts:
        if not expert.config:  # a bare file: tied as the base is
            told = {alias: name for alias, name in base.ties.items() if name in expert.tensors}
            expert.ties = {**told, **expert.ties}
    earlier = list(statistics.experts) if statistics else []
    twice = [spec.name for spec in specs if spec.name in earlier]
    if twice:
        raise CfmergeError(
            f"expert {twice[0]!r} is in the statistics already, and would count twice; leave it out, or, if it is "
            "another one, give it another name"
        )
    check_count(method, len(earlier) + len(specs))
    notes = _check_same_files(recipe, base, specs, experts)
    named = {spec.name: expert for spec, expert in zip(specs, experts, strict=True)}
    notes += _of_files(recipe, base, named)
    base, experts, of_folders = same_folders(base, named)
    notes += of_folders

    parameters = _parameters(base)
    tied = {alias: name for alias, name in base.ties.items() if alias in parameters and alias != name}
    own = {name: parameter for name, parameter in parameters.items() if name not in tied}
    assignments = assign(own, method, recipe.rules, {name for expert in experts for name in expert.tensors})
    matched = match_experts(recipe, base, experts, specs, assignments)
    if matched.problems:
        shown = matched.problems[:20]
        more = len(matched.problems) - len(shown)
        raise CfmergeError("\n".join([*shown, *([f"... and {more} more problems"] if more else [])]))

    aliases: dict[str, list[str]] = {}
    for alias, name in tied.items():
        aliases.setdefault(name, []).append(alias)
    depth_of = depths(matched.assignments)
    experts_named = [*earlier, *(spec.name for spec in specs)]
    notes += same_for_stacked_layers(matched.assignments, depth_of, [spec.weight for spec in specs], experts_named)
    jobs = []
    for name, assignment in matched.assignments.items():
        stored = base.tensors[name].dtype
        floating = is_float(assignment.parameter.dtype)
        dtype = OUTPUT_DTYPES[recipe.dtype] if recipe.dtype and floating else stored
        sources = tuple(names.get(name) for names in matched.sources)
        weights: tuple[float, ...] = ()
        if assignment.action == "merge":
            where = place(name, depth_of[name], experts_named)
            settled = settle(assignment.method, where)
            assignment = dataclasses.replace(assignment, method=full_form(settled) if sums else settled)
            weights = tuple(float(weight_at(spec.weight, where, spec.name)) for spec in specs)
            check_weights(assignment.method, dict(zip([spec.name for spec in specs], weights, strict=True)), name)
            if statistics:
                statistics.check(assignment.method, name)
        jobs.append(Job(name, assignment, (name, *aliases.get(name, ())), sources, dtype, weights))
    moments = _moments(specs, jobs)
    plan = Plan(
        recipe, method, base, tuple(experts), tuple(specs), tuple(jobs), matched.exported,
        tuple(notes + matched.notes), shard_bytes, _side_files(recipe, base), moments, statistics,
    )  # fmt: skip
    merged = [job.name for job in jobs if job.assignment.action == "merge"]
    if statistics and fingerprint(base, list(statistics.kinds)) != statistics.base:
        raise CfmergeError(f"base {recipe.base}: the statistics were accumulated over another base")
    if not merged:
        raise CfmergeError("nothing to merge: every tensor is kept from the base or left out")
    return plan


def _parameters(checkpoint: Checkpoint) -> dict[str, Parameter]:
    headers = {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}
    return classify(headers, checkpoint.config)


def _of_files(recipe: Recipe, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """What has to be said of the models' files and configs.

    Raises:
        CfmergeError: a model is quantised, or one is a pipeline and another a component.
    """
    problems = quantised.problems(base, experts)
    if problems:
        raise CfmergeError("\n".join(problems))
    check_folders(base, experts)
    read = [*base.notes, *(f"expert {name!r}: {note}" for name, expert in experts.items() for note in expert.notes)]
    left_out = base.left_out if recipe.side_files is None else ()
    return [*read, *left_out, *quantised.notes(base, experts), *config_notes(base, experts)]


def check_count(method: Method, count: int) -> None:
    """Raises `CfmergeError` unless the method takes that many experts."""
    least, most = method.experts
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise CfmergeError(f"{method.name} takes {wanted} expert{'s' if wanted != '1' else ''}, found {count}")


def check_weights(method: Method, weights: Mapping[str, float], tensor: str) -> None:
    """Raises `CfmergeError` unless the weights `{expert: weight}` have a meaning for the method."""
    if any(isinstance(weight, jax.core.Tracer) for weight in weights.values()):
        return
    for name, weight in weights.items():
        if method.weights == "positive" and weight <= 0:
            raise CfmergeError(
                f"expert {name!r}: {method.name} needs positive weights, found {weight} for {tensor!r}; "
                "leave the expert out, or use task_arithmetic"
            )
        if method.weights == "none" and weight != 1:
            raise CfmergeError(
                f"expert {name!r}: {method.name} knows no weights, found {weight}; leave the weight out, or choose "
                "another method"
            )
    if method.normalises and weights and abs(sum(weights.values())) <= 1e-9 * sum(map(abs, weights.values())):
        raise CfmergeError(
            f"the experts' weights sum to 0, so that {method.name} of {tensor!r} is not defined: "
            + ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        )


def _moments(specs: Sequence[Expert], jobs: Sequence[Job]) -> tuple[Checkpoint | None, ...]:
    """The files of what was measured of the experts, checked against what the methods need."""
    files = tuple(open_checkpoint(spec.moments) if spec.moments else None for spec in specs)
    for job in jobs:
        needed = job.assignment.method.moments if job.assignment.action == "merge" else ""
        if not needed:
            continue
        for spec, file in zip(specs, files, strict=True):
            check_moment(needed, job.parameter, file and file.tensors.get(job.name), job.assignment.method.name,
                         f"expert {spec.name!r}" + (f" ({spec.moments})" if file else ""))  # fmt: skip
    return files


def check_moment(needed: str, parameter: Parameter, found: Any, method: str, who: str) -> None:
    """Raises `CfmergeError` unless what was `found` of a tensor (an array, or its header) is what is needed."""
    shape: tuple[int, ...] = parameter.shape
    what = "a diagonal Fisher"
    if needed == "input_gram":
        b, _, n = parameter.canonical
        shape, what = ((b, n, n) if b > 1 else (n, n)), "an input Gram"
    if found is None:
        raise CfmergeError(
            f"{who}: {method} needs {what} of {parameter.name!r}, of shape {shape}: give it (on disk 'moments: "
            "FILE' beside the expert's path, of trees moments=[...]; cfmerge.activations collects Grams), or another "
            "method for this tensor by a rule"
        )
    if tuple(found.shape) != shape:
        raise CfmergeError(f"{who}: {what} of {parameter.name!r} has shape {tuple(found.shape)}, expected {shape}")


def _check_same_files(
    recipe: Recipe, base: Checkpoint, specs: Sequence[Expert], experts: Sequence[Checkpoint]
) -> list[str]:
    """The same files named twice: an error unless the recipe allows it."""
    notes = []
    seen: dict[tuple[Path, ...], str] = {}
    base_files = tuple(file.resolve() for file in base.files)
    for spec, expert in zip(specs, experts, strict=True):
        files = tuple(file.resolve() for file in expert.files)
        if files == base_files and "base-as-expert" not in recipe.allow:
            raise CfmergeError(
                f"expert {spec.name!r} is the base itself ({spec.path}): its delta is zero. Leave it out, or "
                "allow it: --allow base-as-expert (recipe: 'allow: [base-as-expert]')"
            )
        if files in seen:
            if "duplicate-experts" not in recipe.allow:
                raise CfmergeError(
                    f"experts {seen[files]!r} and {spec.name!r} are the same files ({spec.path}). Give one of them "
                    "more weight, or count it twice: --allow duplicate-experts "
                    "(recipe: 'allow: [duplicate-experts]')"
                )
            notes.append(f"expert {spec.name!r} is {seen[files]!r} once more, and counts again")
        seen.setdefault(files, spec.name)
    return notes


def _side_files(recipe: Recipe, base: Checkpoint) -> Mapping[str, Path]:
    if recipe.side_files is None:
        check_whole(base.side_files)
        return base.side_files
    directory = Path(recipe.side_files).expanduser()
    if not directory.is_dir():
        raise CfmergeError(f"side_files: {directory} is not a directory")
    files = side_files(directory)
    check_whole(files)
    return files
