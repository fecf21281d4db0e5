"""`diagnose`: what a base and its experts tell before they are merged, in one pass over the files."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cfmerge import methods
from cfmerge.diagnosis.collecting import collected
from cfmerge.diagnosis.findings import findings_of
from cfmerge.diagnosis.measuring import entry_sums, matrix_numbers
from cfmerge.diagnosis.recommending import recommended
from cfmerge.diagnosis.result import Diagnosis, Measured
from cfmerge.engine import run
from cfmerge.engine.placement import Devices, Placement, placement_of
from cfmerge.engine.units import layer_name
from cfmerge.errors import CfmergeError
from cfmerge.methods import Measure, Method
from cfmerge.models import Kind, is_buffer, is_float
from cfmerge.models.patterns import tell as named
from cfmerge.planning.work import Job, Progress, Work, silent
from cfmerge.products.plan import Experts, Plan, as_recipe, make_plan
from cfmerge.recipe import Recipe, Rule

LARGEST = 4096  # the shorter side of a matrix, up to which it is decomposed
ALLOWED = ["duplicate-experts", "one-expert", "base-as-expert", "other-base", "batch-norm"]  # findings, not errors
MATRICES = {Kind.MATRIX, Kind.CONVOLUTION}


def diagnose(
    base: str | Path | Recipe,
    experts: Experts = (),
    *,
    largest: int = LARGEST,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    **options: Any,
) -> Diagnosis:
    """What a base and its experts tell before they are merged: numbers, findings, a recommendation.

        >>> found = cfmerge.diagnose("base", ["math", "code"])
        >>> found.experts, list(found.tensors)
        (('math', 'code'), ['layer.bias', 'layer.weight'])
        >>> found.tensors["layer.bias"].norms.tolist()
        [2.0, 6.0]

    Each tensor is read once, and nothing is written. See docs/diagnose.md for every number and finding.

    Args:
        base, experts: as in `cfmerge.merge`; or a `Recipe`, whose method does not matter, in place of the base.
        largest: the shorter side of a matrix up to which it is decomposed; of larger ones there are norms, cosines
            and conflicts, but neither ranks nor spectra. 0: of none.
        memory, devices, progress: as in `cfmerge.merge`.
        **options: the other fields of `Recipe`.

    Raises:
        CfmergeError: bad input; NaN or infinity in a model.
    """
    asked = base if isinstance(base, Recipe) else as_recipe(base, experts, "average", None, options)
    return diagnose_recipe(asked, largest=largest, memory=memory, devices=devices, progress=progress)


def diagnose_recipe(
    recipe: Recipe,
    *,
    largest: int = LARGEST,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """The diagnosis of the models that a recipe names, whatever its method; see `diagnose`.

        >>> recipe = cfmerge.Recipe(base="base", experts=["math", "code"], method="ties")
        >>> found = cfmerge.diagnose_recipe(recipe, largest=0)  # no matrix is decomposed
        >>> found.tensors["layer.weight"].ranks is None
        True

    Args:
        recipe: base, experts and options.
        largest, memory, devices, progress: as in `diagnose`.

    Raises:
        CfmergeError: bad input; NaN or infinity in a model.
    """
    where = placement_of(devices)  # before JAX is used: a processor's devices are counted then
    return diagnosed(planned_to_diagnose(recipe), largest, memory, where, progress or silent)


def planned_to_diagnose(recipe: Recipe) -> Plan:
    """The plan whose models are diagnosed: that of the recipe, without its method and with all oddities allowed."""
    if recipe.statistics is not None:
        raise CfmergeError("diagnose: statistics hold sums over experts; a diagnosis needs the experts themselves")
    rules = [_plain(rule) for rule in recipe.rules]
    return make_plan(msgspec.structs.replace(
        recipe, method="average", parameters={}, rules=[rule for rule in rules if rule is not None],
        allow=ALLOWED, adapter_out=None, dtype=None,
    ))  # fmt: skip


def _plain(rule: Rule) -> Rule | None:
    """The rule without its method; None where nothing is left of it."""
    if rule.method in {"keep-base", "skip"}:
        return rule
    left = msgspec.structs.replace(rule, method="", parameters={})
    return left if rule.kind or rule.layout else None


def to_measure(plan: Plan) -> list[Job]:
    """The jobs of the tensors that are measured."""
    return [job for job in plan.jobs if job.assignment.action == "merge" or _is_untouched(job)]


def bytes_measured(plan: Plan) -> int:
    """The bytes that a diagnosis reads."""
    return sum(job.bytes_read * (1 + len(job.sources)) for job in to_measure(plan))


def _is_untouched(job: Job) -> bool:
    """Whether a tensor is kept because no adapter changes it."""
    parameter = job.parameter
    kept = job.assignment.action == "keep-base" and job.assignment.rule is None and any(job.sources)
    return kept and is_float(parameter.dtype) and not is_buffer(parameter.name, parameter.shape)


def diagnosed(
    plan: Plan,
    largest: int,
    memory: str | int | None,
    where: Placement,
    progress: Progress = silent,
    beside: int = 0,
) -> Diagnosis:
    """The diagnosis of a plan's models, of which so many of the last are measured `beside` those that are merged."""

    def do(plan: Plan, limit: int, left_out: Sequence[Any]) -> Diagnosis:
        jobs = to_measure(plan)
        spectral = [job for job in jobs if _has_spectra(job, largest)]
        names = {job.name for job in spectral}
        others = [job for job in jobs if job.name not in names]
        how = {"memory": limit, "placement": where, "progress": progress}
        by_name = dict(_of_matrices(plan.work, spectral, beside, how)) | dict(_of_others(plan.work, others, how))
        place = {name: number for number, name in enumerate(plan.base.tensors)}
        found = dict(
            sorted(by_name.items(), key=lambda item: place.get(item[0], place.get(item[0].rpartition("[")[0], 0)))
        )
        experts = tuple(spec.name for spec in plan.expert_specs)
        findings = findings_of(experts, found)
        notes = (*plan.notes, *(one.note for one in left_out), *_not_decomposed(others, largest))
        told = plan.work.base.told
        weights = next((tuple(map(float, job.weights)) for job in jobs if job.weights), ())
        return Diagnosis(told, experts, found, findings, recommended(experts, found, findings, weights), notes, weights)

    return plan.attempted(memory, do, where)


def _has_spectra(job: Job, largest: int) -> bool:
    parameter = job.parameter
    return parameter.kind in MATRICES and bool(parameter.layout) and 0 < min(parameter.canonical[1:]) <= largest


def _not_decomposed(jobs: Sequence[Job], largest: int) -> list[str]:
    matrices = [job.parameter for job in jobs if job.parameter.kind in MATRICES and job.parameter.layout]
    left = [parameter.name for parameter in matrices if min(parameter.canonical[1:])]
    if not left or largest <= 0:
        return ["no matrix was decomposed: there are no ranks and spectra"] if left else []
    return [f"{named(left)}: not decomposed, the shorter side is over {largest}: no ranks and spectra"]


def _of_matrices(work: Work, jobs: Sequence[Job], beside: int, how: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """`(name, numbers)` of every canonical matrix."""
    ace = methods.make("ace")  # whose growth is told, so that it is its statistic that must fit the memory
    seeing = dataclasses.replace(ace, additive=False, by_rows=False, form=None, joint=False, call=None)
    numbers_of = functools.partial(matrix_numbers, beside=beside) if beside else matrix_numbers
    found = run.measure(_with(work, jobs, seeing), Measure(numbers_of, joint=True, by_tensor=True), **how)
    by_name = {job.name: job.parameter for job in jobs}
    for (name, place), numbers in found.items():
        parameter = by_name[name]
        count = parameter.canonical[0]
        yield layer_name(name, place, count), collected(parameter, numbers, place if count > 1 else None)


def _of_others(work: Work, jobs: Sequence[Job], how: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """`(name, numbers)` of every tensor that is no matrix, or is too large a one."""
    wanted = Measure(entry_sums, joint=True, by_tensor=True)
    by_name = {job.name: job for job in jobs}
    found = run.measure(_with(work, jobs, methods.make("average")), wanted, over="tensors", **how)
    for name, numbers in found.items():
        yield name, collected(by_name[name].parameter, numbers)


def _with(work: Work, jobs: Sequence[Job], method: Method) -> Work:
    """The work of some jobs, whose method says how their tensors are cut; weights of no meaning to ACE are 1."""

    def one(job: Job) -> Job:
        given = job.weights and all(weight > 0 for weight in job.weights)
        weights = job.weights if given else (1.0,) * len(job.sources)
        assignment = dataclasses.replace(job.assignment, action="merge", method=method)
        return dataclasses.replace(job, weights=weights, assignment=assignment)

    return dataclasses.replace(work, jobs=tuple(map(one, jobs)))
