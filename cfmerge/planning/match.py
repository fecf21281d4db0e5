"""The fit of the experts' tensors to the base's, judged by headers alone: heads, buffers, and every problem."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from cfmerge.formats import Source, TensorInfo
from cfmerge.models import Kind, is_buffer, is_float
from cfmerge.models.buffers import is_optional
from cfmerge.models.heads import VOCABULARY, is_output_layer, may_be_head
from cfmerge.models.patterns import tell
from cfmerge.planning.assign import Action, Assignment
from cfmerge.planning.misfits import Misfit, less_than_the_base, more_than_the_base, other_headers, told
from cfmerge.planning.pair import Paired
from cfmerge.planning.ties import Ties
from cfmerge.recipe import Expert, Recipe, Rule


@dataclasses.dataclass
class Matched:
    """`sources[t]` maps the base's names to expert t's; `problems` are errors, one a line."""

    assignments: dict[str, Assignment]
    sources: list[dict[str, str]]
    exported: dict[str, tuple[str, ...]]
    notes: list[str]
    problems: list[str]
    told: set[str] = dataclasses.field(default_factory=set)  # heads that a problem speaks of already


def match_experts(
    recipe: Recipe,
    base: Source,
    specs: Sequence[Expert],
    paired: Paired,
    ties: Ties,
    assignments: Mapping[str, Assignment],
) -> Matched:
    """The match of base and experts: the choice about heads applied, every problem and note collected."""
    notes, problems = [*paired.notes, *ties.notes], [*paired.problems, *ties.problems]
    result = Matched(dict(assignments), paired.sources, {}, notes, problems)
    used = [{*sources.values(), *copies} for sources, copies in zip(paired.sources, ties.copies, strict=True)]
    extras = [
        [name for name in expert.tensors if name not in own]
        for expert, own in zip(paired.experts, used, strict=True)
    ]  # fmt: skip
    _settle_heads(recipe, base, paired.experts, specs, extras, result)
    _settle_buffers(base, paired.experts, specs, result)
    misfits: list[Misfit] = []
    for spec, expert, sources, extra in zip(specs, paired.experts, result.sources, extras, strict=True):
        misfits += _check_expert(base, spec, expert, sources, extra, result)
        misfits += _check_extra(recipe, spec, expert, sources, extra, result)
    result.problems += told(misfits)
    (result.problems if result.problems else result.notes).extend(paired.architectures)
    for name, assignment in result.assignments.items():  # tensors that only partial experts changed
        if assignment.action == "merge" and specs and not any(name in sources for sources in result.sources):
            result.assignments[name] = dataclasses.replace(assignment, action="keep-base")
    return result


# --- heads --------------------------------------------------------------------------------------------------------


def _settle_heads(
    recipe: Recipe,
    base: Source,
    experts: Sequence[Source],
    specs: Sequence[Expert],
    extras: Sequence[Sequence[str]],
    result: Matched,
) -> None:
    """Heads that not all models share in one shape need a choice; so do heads when a choice was made."""
    whole = [number for number, spec in enumerate(specs) if not spec.partial]
    base_heads = [
        name
        for name, assignment in result.assignments.items()
        if assignment.rule is None
        and not is_buffer(name, assignment.parameter.shape)
        and _is_base_head(name, assignment, base, [(experts[n], result.sources[n]) for n in whole])
    ]
    lines = []
    expert_heads: list[list[str]] = [[] for _ in specs]
    for number in whole:
        spec, expert, sources = specs[number], experts[number], result.sources[number]
        more = [
            name for name in extras[number] if may_be_head(name) and not is_buffer(name, expert.tensors[name].shape)
        ]
        ours = [sources[name] for name in base_heads if name in sources]
        expert_heads[number] = [*ours, *more]
        lines += [f"  {spec.name}: {name} {expert.tensors[name].shape} is not in the base" for name in more]
        for name in base_heads:
            shape = base.tensors[name].shape
            if name not in sources:
                lines.append(f"  base: {name} {shape} is not in expert {spec.name!r}")
            elif expert.tensors[sources[name]].shape != shape:
                lines.append(f"  {spec.name}: {name} {expert.tensors[sources[name]].shape}, in the base {shape}")
    if lines and recipe.heads is None:
        shown = [*lines[:12], *([f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else [])]
        result.problems.append(
            "heads that the models do not share:\n" + "\n".join(shown) + "\nchoose what happens to them: "
            "--heads keep-base (the base's heads, if any), drop (a trunk without heads), or export (the trunk, and "
            "each expert's heads beside it in heads/NAME.safetensors)"
        )
        everywhere = [name for name in base_heads if all(name in result.sources[number] for number in whole)]
        heads = {name for name in base_heads if result.assignments[name].parameter.kind is Kind.HEAD}
        result.told |= heads.union(everywhere)
    for name in base_heads if recipe.heads else ():
        action: Action = "skip" if recipe.heads == "drop" else "keep-base"
        result.assignments[name] = dataclasses.replace(result.assignments[name], action=action)
        for sources in result.sources:
            sources.pop(name, None)
    if recipe.heads == "export":
        named = zip(specs, expert_heads, strict=True)
        result.exported = {spec.name: tuple(heads) for spec, heads in named if heads}


def _is_base_head(
    name: str, assignment: Assignment, base: Source, models: Sequence[tuple[Source, Mapping[str, str]]]
) -> bool:
    """A head by its name; or what may be one, where some expert lacks it or has another number of outputs."""
    if assignment.parameter.kind is Kind.HEAD:
        return True
    ours = base.tensors[name].shape
    shapes = [expert.tensors[sources[name]].shape if name in sources else None for expert, sources in models]
    if may_be_head(name) and (None in shapes or (not VOCABULARY.search(name) and any(s != ours for s in shapes))):
        return True
    others = [shape for shape in shapes if shape is not None and shape != ours]
    return bool(others) and all(is_output_layer(name, ours, shape) for shape in others)


# --- buffers ------------------------------------------------------------------------------------------------------


def _settle_buffers(base: Source, experts: Sequence[Source], specs: Sequence[Expert], result: Matched) -> None:
    """Buffers are the base's, wherever they are missing or stored otherwise; a note says so."""
    kept = []
    for name, assignment in result.assignments.items():
        info = base.tensors[name]
        lacking = any(name not in n and not s.partial for s, n in zip(specs, result.sources, strict=True))
        optional = lacking and is_optional(name)
        if assignment.rule is not None or not (optional or is_buffer(name, info.shape)):
            continue
        if optional:
            result.assignments[name] = dataclasses.replace(assignment, action="keep-base")
            for names in result.sources:
                names.pop(name, None)
        alike = [
            names.get(name) in expert.tensors and _alike(info, expert.tensors[names[name]])
            for expert, names in zip(experts, result.sources, strict=True)
        ]
        for names, same in zip(result.sources, alike, strict=True):
            if not same:
                names.pop(name, None)
        if is_float(info.dtype.name) or not all(alike):
            kept.append(name)
    if kept:
        result.notes.append(f"{tell(kept)}: buffers, which are no parameters; the output has the base's")


def _alike(ours: TensorInfo, theirs: TensorInfo) -> bool:
    return ours.shape == theirs.shape and is_float(ours.dtype.name) == is_float(theirs.dtype.name)


# --- what does not fit: see `misfits` -----------------------------------------------------------------------------


def _missing(sources: Mapping[str, str], result: Matched) -> list[str]:
    return [
        name for name, a in result.assignments.items()
        if a.action == "merge" and name not in sources and name not in result.told
    ]  # fmt: skip


def skips(rule: Rule, name: str) -> bool:
    """Whether a rule leaves a tensor out that the base lacks."""
    return rule.method == "skip" and bool(rule.match) and fnmatch.fnmatchcase(name, rule.match)


def _check_extra(
    recipe: Recipe,
    spec: Expert,
    expert: Source,
    sources: Mapping[str, str],
    extra: Sequence[str],
    result: Matched,
) -> list[Misfit]:
    """Tensors that the base lacks: buffers, heads, parts of another model, a rule's to skip, or a problem."""
    left = [name for name in extra if spec.partial or not may_be_head(name)]
    skipped = [name for name in left if any(skips(rule, name) for rule in recipe.rules)]
    if skipped:
        result.notes.append(
            f"expert {spec.name!r}: {len(skipped)} tensors that the base lacks are left out by rule, such as "
            f"{skipped[0]!r}"
        )
    left = [name for name in left if name not in skipped]
    buffers = [
        name for name in left
        if not is_float(expert.tensors[name].dtype.name) or is_optional(name)
        or is_buffer(name, expert.tensors[name].shape)
    ]  # fmt: skip
    if buffers:
        result.notes.append(
            f"expert {spec.name!r} has {len(buffers)} buffers (integers or masks) that the base lacks, such as "
            f"{buffers[0]!r}; they are not in the output"
        )
    floats = [name for name in left if name not in buffers]
    among = list(sources.values())
    if spec.partial:
        if floats:
            result.notes.append(f"expert {spec.name!r}: {tell(floats, among)} are not in the base, and left out")
        return []
    shapes = {name: expert.tensors[name].shape for name in floats}
    return more_than_the_base(spec, shapes, among, _missing(sources, result))


def _check_expert(
    base: Source,
    spec: Expert,
    expert: Source,
    sources: Mapping[str, str],
    extra: Sequence[str],
    result: Matched,
) -> list[Misfit]:
    """Tensors of the base that an expert lacks, or has in another shape or dtype."""
    compared = {
        name: (base.tensors[name], sources[name], expert.tensors[sources[name]])
        for name, assignment in result.assignments.items()
        if name in sources and (assignment.action == "merge" or assignment.agree) and name not in result.told
    }
    found = other_headers(spec, compared)
    missing = _missing(sources, result)
    if spec.partial:
        if missing:
            result.notes.append(
                f"expert {spec.name!r} is partial: {tell(missing, list(sources))} are merged without it, or stay at "
                "the base"
            )
        return found
    floats = [name for name in extra if is_float(expert.tensors[name].dtype.name)]
    return found + less_than_the_base(spec, {name: base.tensors[name].shape for name in missing}, list(sources), floats)
