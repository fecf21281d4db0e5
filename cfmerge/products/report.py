"""`make_report`: one page of HTML about a merged model, or about a recipe that is yet to be merged.

The card of a merged model says by which recipe it was made, and of which files. Where these are still there and the
same, base, experts and merged model are diagnosed in one pass, in which the merged model is one more expert.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cfmerge import methods
from cfmerge import recipe as recipes
from cfmerge.diagnosis.findings import findings_of
from cfmerge.diagnosis.recommending import recommended
from cfmerge.diagnosis.result import Diagnosis
from cfmerge.engine.placement import Devices, placement_of
from cfmerge.errors import CfmergeError
from cfmerge.formats.composed import is_composed
from cfmerge.planning.work import Progress, silent
from cfmerge.products.diagnose import LARGEST, diagnose_recipe, diagnosed, planned_to_diagnose
from cfmerge.products.plan import Plan, make_plan
from cfmerge.products.report_files import CARD, GONE, SAME, compared, files_of, size, size_of, tensors_of, unreadable
from cfmerge.recipe import Expert, Recipe
from cfmerge.recipe.recipe import FILES
from cfmerge.report.card import versions
from cfmerge.report.card_reading import Card, read_card
from cfmerge.report.page.layers import OURS, without_last
from cfmerge.report.page.merge import Input, Merge, Tensor, page
from cfmerge.report.page.rendering import html


@dataclasses.dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        html: the page, as one text that needs no other file.
        lacking: why the page has no pictures, or not all of them; none if it has.
    """

    html: str
    lacking: tuple[str, ...]


def make_report(
    asked: str | Path | Recipe,
    *,
    name: str = "",
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
) -> Report:
    """A page of HTML about a merge: its recipe, notes and inputs, a diagnosis, and pictures layer by layer.

        >>> report = cfmerge.make_report(cfmerge.Recipe("base", ["math", "code"], "average"))
        >>> "2 experts to be merged by average" in report.html, report.lacking
        (True, ())

    Args:
        asked: a merged model with its card (a directory or a file), a recipe's file, or a `Recipe`.
        name: of the recipe, on the page.
        memory, devices, progress: of the diagnosis, as in `diagnose`.

    Raises:
        CfmergeError: a model has no card of cfmerge, or a recipe cannot be planned.
    """
    how = {"memory": memory, "devices": devices, "progress": progress}
    if isinstance(asked, Recipe):
        told = _to_merge(asked, name or "recipe", how)
    else:
        path = Path(asked).expanduser()
        model = is_merged(path)
        told = _merged(model, how) if model else _to_merge(recipes.load(path), name or path.name, how)
    return Report(html(page(told)), tuple(told.lacking))


def is_merged(path: Path) -> Path | None:
    """The merged model that a path stands for: itself, or the directory of its card; None: it is a recipe's file."""
    if path.is_dir() or path.suffix in FILES:
        return path
    return path.parent if path.name == CARD else None


def _to_merge(recipe: Recipe, name: str, how: dict[str, Any]) -> Merge:
    """A recipe, with the diagnosis of its models."""
    plan = _settled(make_plan(recipe), how)
    lacking, found = _diagnosed(recipe, how)
    sizes = [
        Input(role, weight, file.name, "", size(file.stat().st_size))
        for role, weight, file in files_of(plan)
        if file.exists()
    ]
    facts = {"Reads": size(plan.bytes_to_read), "Writes": size(plan.bytes_to_write)}
    return Merge(
        name, False, plan.method.name, _about(plan.method.name), [spec.name for spec in plan.expert_specs],
        _brief(recipe), recipe.to_yaml().strip(), _counts(plan), notes=plan.notes, lacking=lacking,
        facts={**_of_tensors(_tensors(plan)), **facts}, inputs=sizes, versions=_used(), tensors=_tensors(plan),
        diagnosis=_without_notes(found, plan.notes),
    )  # fmt: skip


def _merged(path: Path, how: dict[str, Any]) -> Merge:
    """A merged model: what its card tells, and what is measured if its inputs are still there and the same."""
    card, recipe = _card(path)
    plan, found, lacking, merged = None, None, list[str](), None
    files = [Input(*row) for row in card.inputs]
    try:
        plan = make_plan(recipe)
    except CfmergeError as error:
        gone = unreadable(recipe)
        files = [dataclasses.replace(one, state=GONE if one.role.partition(" (")[0] in gone else "") for one in files]
        why = "\n".join(gone.values()) or str(error)
        lacking.append(
            f"The inputs of the merge cannot be read, so this page tells what the card says.\n{why}\nPaths are "
            "relative to the directory that the merge was run in: `cfmerge report` finds them there."
        )
    if plan is not None:
        files = compared(files, plan)
        other = [f"{one.role}: {one.file}" for one in files if one.state not in {"", SAME}]
        if other:
            lacking.append(
                "Inputs are no longer those of the merge, by their SHA-256, so this page tells what the card says.\n"
                f"{_list(other)}"
            )
        else:
            plan = _settled(plan, how)
            lacking, found, merged = _with_merged(recipe, path, how)
    tensors = _tensors(plan) if plan else tensors_of(path)
    names = [spec.name for spec in plan.expert_specs] if plan else [one.name for one in recipe.resolved_experts(0)]
    method = plan.method.name if plan else recipe.method
    return Merge(
        path.name or str(path), True, method, card.about or _about(method), list(found.experts) if found else names,
        _brief(recipe), recipe.to_yaml().strip(), card.counts or (_counts(plan) if plan else ()),
        warnings=card.warnings, notes=card.notes, lacking=lacking,
        facts={**_of_tensors(tensors), "Size": size_of(path)}, inputs=files, versions=card.versions, tensors=tensors,
        diagnosis=_without_notes(found, card.notes), measured=merged,
    )  # fmt: skip


def _card(path: Path) -> tuple[Card, Recipe]:
    """What the card of a model tells, and its recipe; of a model in one file its metadata have the recipe.

    Raises:
        CfmergeError: there is no model, or it has no card of cfmerge.
    """
    if not path.exists():
        raise CfmergeError(f"{path}: no such file or directory")
    if path.is_dir() and is_composed(path):
        raise CfmergeError(f"{path}: is a composed result, and a report is of one model: `cfmerge inspect` shows it")
    file = path / CARD if path.is_dir() else path
    way_out = "give the recipe that it was merged by: cfmerge report recipe.yaml"
    if path.is_dir() and not file.is_file():
        raise CfmergeError(f"{path}: has no card ({CARD}), so nothing tells how it was merged; {way_out}")
    if path.is_file() and path.suffix != ".safetensors":
        raise CfmergeError(f"{path}: a file of this format holds no recipe; {way_out}")
    try:
        recipe = recipes.load(file)
    except CfmergeError as error:
        raise CfmergeError(f"{error}; {way_out}") from None
    return read_card(file.read_text() if path.is_dir() else ""), recipe


def _settled(plan: Plan, how: dict[str, Any]) -> Plan:
    """The plan with the methods that `auto` chooses, which takes a look at the deltas."""
    if not plan.chooses:
        return plan
    return plan.attempted(how["memory"], lambda ready, limit, left_out: ready, placement_of(how["devices"]))


def _with_merged(recipe: Recipe, path: Path, how: dict[str, Any]) -> tuple[list[str], Diagnosis | None, Any]:
    """What is lacking, the diagnosis of the experts, and the numbers of experts and merged model."""
    reason = _apart(recipe)
    if not reason:
        merged = Expert(path=recipe.base, adapter=str(path)) if recipe.adapter_out is not None else Expert(str(path))
        experts = [
            msgspec.structs.replace(one, rename=[*one.rename, *recipe.rename]) for one in recipe.resolved_experts(0)
        ]
        ours = _no_name_of(experts)
        merged = msgspec.structs.replace(merged, name=ours)
        try:
            asked = msgspec.structs.replace(recipe, experts=[*experts, merged], rename=[])
            where, progress = placement_of(how["devices"]), how["progress"] or silent
            found = diagnosed(planned_to_diagnose(asked), LARGEST, how["memory"], where, progress, beside=1)
            if found.experts[-1:] == (ours,):
                return [], _split(found), found.tensors
            reason = "it holds NaN or infinity"
        except CfmergeError as error:
            reason = str(error)
    lacking, alone = _diagnosed(recipe, how)
    return [f"The merged model is not compared with its experts: {reason}", *lacking], alone, None


def _no_name_of(experts: Sequence[Expert]) -> str:
    """What the merged model is called: "merged model", unless an expert is called so."""
    name = OURS
    while name in {one.name for one in experts}:
        name = f"the {name}"
    return name


def _apart(recipe: Recipe) -> str:
    """Why a merged model cannot be compared with base and experts tensor by tensor; empty where it can."""
    if recipe.layers:
        return "its layers are a stack of others"
    return "its inputs were aligned first" if recipe.align else ""


def _diagnosed(recipe: Recipe, how: dict[str, Any]) -> tuple[list[str], Diagnosis | None]:
    try:
        return [], diagnose_recipe(recipe, **how)
    except CfmergeError as error:
        return [f"No diagnosis: {error}"], None


def _split(found: Diagnosis) -> Diagnosis:
    """The diagnosis of the experts alone, out of one in which the merged model is the last."""
    (*names, ours), tensors = found.experts, without_last(found.tensors)
    experts = tuple(names)
    findings = findings_of(experts, tensors)
    notes = tuple(note for note in found.notes if ours not in note)
    weights = found.weights[:-1]
    told = recommended(experts, tensors, findings, weights)
    return Diagnosis(found.base, experts, tensors, findings, told, notes, weights)


def _without_notes(found: Diagnosis | None, told: Sequence[str]) -> Diagnosis | None:
    """The diagnosis without notes that the page has elsewhere."""
    return found and dataclasses.replace(found, notes=tuple(note for note in found.notes if note not in told))


def _tensors(plan: Plan) -> list[Tensor]:
    return [
        Tensor(job.name, str(job.parameter.kind), job.parameter.shape, str(job.dtype), job.assignment.label)
        for job in plan.jobs
    ]


def _of_tensors(tensors: Sequence[Tensor]) -> dict[str, str]:
    """Their number and that of their entries."""
    sizes = [math.prod(one.shape) for one in tensors]
    return {"Tensors": f"{len(tensors):,}", "Parameters": f"{sum(sizes):,}"} if tensors else {}


def _counts(plan: Plan) -> list[tuple[str, str, int]]:
    return [(kind, what, count) for (kind, what), count in sorted(plan.counts().items())]


def _brief(recipe: Recipe) -> str:
    """The recipe's YAML without keys that have their defaults, but with the method, whose default may change."""
    plain, values = msgspec.to_builtins(Recipe("")), msgspec.to_builtins(recipe)
    said = {key: value for key, value in values.items() if value != plain[key] or key == "method"}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100).strip()


def _about(method: str) -> str:
    entry = methods.registry().get(method)
    return f"{entry.summary}{f' Source: {entry.source}' if entry.source else ''}" if entry else ""


def _used() -> str:
    return ", ".join(f"{package} {version}" for package, version in versions().items())


def _list(texts: Sequence[str], most: int = 8) -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "\n".join([*texts[:most], *more])
