"""How the experts' tensors correspond to the base's, judged by headers alone; everything that does not fit."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

from cfmerge.engine.assign import Action, Assignment
from cfmerge.errors import nearest
from cfmerge.formats import Checkpoint, TensorInfo
from cfmerge.parameters import HEAD, Kind, is_attention_mask, is_float
from cfmerge.recipe import Expert, Recipe, Rule

UNSHARED_HEAD = re.compile(r"(^|[./])(pooler|lm_head)([./]|$)")  # part of the trunk where all models have it
VOCABULARY = re.compile(
    r"(embed_tokens|word_embeddings|wte|lm_head|shared|predictions\.(decoder|bias)|embed_in|embed_out)"
)


@dataclasses.dataclass
class Matched:
    """`sources[t]` maps the base's names to expert t's; `problems` are errors, one a line."""

    assignments: dict[str, Assignment]
    sources: list[dict[str, str]]
    exported: dict[str, tuple[str, ...]]
    notes: list[str]
    problems: list[str]


def match_experts(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    specs: Sequence[Expert],
    assignments: Mapping[str, Assignment],
) -> Matched:
    """Pairs names, applies the choice about heads, and collects every problem and note."""
    result = Matched(dict(assignments), [], {}, [], [])
    for spec, expert in zip(specs, experts, strict=True):
        problem = _architecture_problem(base, spec, expert)
        if problem:
            result.problems.append(problem)
            result.sources.append({})
            continue
        prefix = _prefix(base, expert)
        if any(prefix):
            result.notes.append(f"expert {spec.name!r}: its names are the base's with {_describe(prefix)}")
        result.sources.append(_sources(base, expert, prefix))
    if result.problems:
        return result
    _settle_heads(recipe, base, experts, specs, result)
    for spec, expert, sources in zip(specs, experts, result.sources, strict=True):
        _check_expert(recipe, base, spec, expert, sources, result)
    return result


def _architecture_problem(base: Checkpoint, spec: Expert, expert: Checkpoint) -> str | None:
    ours, theirs = base.config.get("model_type"), expert.config.get("model_type")
    if ours and theirs and ours != theirs:
        return (
            f"expert {spec.name!r} ({spec.path}) is another architecture: its config.json says {theirs!r}, the "
            f"base's says {ours!r}; experts must be fine-tuned from the base"
        )
    return None


def _prefix(base: Checkpoint, expert: Checkpoint) -> tuple[str, str]:
    """`(removed from, added to)` the base's names to give the expert's, such as `("", "bert.")`."""
    names, theirs = set(base.tensors), set(expert.tensors)
    if len(names & theirs) * 2 >= min(len(names), len(theirs)):
        return "", ""
    best, overlap = ("", ""), len(names & theirs)
    starts = {name.split(".")[0] + "." for name in names | theirs if "." in name}
    for start in sorted(starts):
        for removed, added in (("", start), (start, "")):
            renamed = {added + name.removeprefix(removed) for name in names if name.startswith(removed)}
            if len(renamed & theirs) > overlap:
                best, overlap = (removed, added), len(renamed & theirs)
    return best


def _describe(prefix: tuple[str, str]) -> str:
    removed, added = prefix
    return f"{added!r} in front" if added else f"{removed!r} taken off"


def _sources(base: Checkpoint, expert: Checkpoint, prefix: tuple[str, str]) -> dict[str, str]:
    """The expert's name for each of the base's, through the prefix and through ties."""
    removed, added = prefix
    aliases: dict[str, list[str]] = {}
    for alias, name in base.ties.items():
        aliases.setdefault(name, []).append(alias)
    sources = {}
    for name in base.tensors:
        for candidate in (name, *aliases.get(name, ())):
            theirs = added + candidate.removeprefix(removed)
            theirs = theirs if theirs in expert.tensors else expert.ties.get(theirs, theirs)
            if theirs in expert.tensors:
                sources[name] = theirs
                break
    return sources


def _settle_heads(
    recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint], specs: Sequence[Expert], result: Matched
) -> None:
    """Heads that not all models share in one shape need a choice; so do heads when a choice was made."""
    base_heads = [
        name for name, assignment in result.assignments.items()
        if assignment.rule is None and (
            assignment.parameter.kind is Kind.HEAD
            or (UNSHARED_HEAD.search(name) and any(name not in sources for sources in result.sources))
        )
    ]  # fmt: skip
    lines = []
    expert_heads: list[list[str]] = []
    for spec, expert, sources in zip(specs, experts, result.sources, strict=True):
        known = set(sources.values()) | set(expert.ties)
        extra = [name for name in expert.tensors if name not in known and _is_head(name)]
        ours = [sources[name] for name in base_heads if name in sources]
        expert_heads.append([*ours, *extra])
        lines += [f"  {spec.name}: {name} {expert.tensors[name].shape} is not in the base" for name in extra]
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
        return
    if recipe.heads is None:
        return
    for name in base_heads:
        action: Action = "skip" if recipe.heads == "drop" else "keep-base"
        result.assignments[name] = dataclasses.replace(result.assignments[name], action=action)
    if recipe.heads == "export":
        result.exported = {spec.name: tuple(heads) for spec, heads in zip(specs, expert_heads, strict=True) if heads}
    for sources in result.sources:
        for name in base_heads:
            sources.pop(name, None)


def _is_head(name: str) -> bool:
    """Whether a tensor that not all models have is a head's."""
    return bool(HEAD.search(name) or UNSHARED_HEAD.search(name))


def _skips(rule: Rule, name: str) -> bool:
    return rule.method == "skip" and bool(rule.match) and fnmatch.fnmatchcase(name, rule.match)


def _check_expert(
    recipe: Recipe, base: Checkpoint, spec: Expert, expert: Checkpoint, sources: Mapping[str, str], result: Matched
) -> None:
    used = set(sources.values())
    extra = [
        name for name in expert.tensors
        if name not in used and expert.ties.get(name) not in used and not _is_head(name)
    ]  # fmt: skip
    skipped = [name for name in extra if any(_skips(rule, name) for rule in recipe.rules)]
    if skipped:
        result.notes.append(
            f"expert {spec.name!r}: {len(skipped)} tensors that the base lacks are left out by rule, such as "
            f"{skipped[0]!r}"
        )
        extra = [name for name in extra if name not in skipped]
    tied_to = set(base.ties) | {name for name in expert.tensors if name in expert.ties}
    buffers = [
        n for n in extra
        if not is_float(expert.tensors[n].dtype.name) or is_attention_mask(n, expert.tensors[n].shape)
    ]  # fmt: skip
    floats = [n for n in extra if n not in buffers and n not in tied_to]
    if buffers:
        result.notes.append(
            f"expert {spec.name!r} has {len(buffers)} buffers (integers or masks) that the base lacks, such as "
            f"{buffers[0]!r}; they are not in the output"
        )
    for alias, name in base.ties.items():
        theirs = sources.get(alias, alias)
        if name in base.tensors and theirs in expert.tensors and theirs not in (*expert.ties, sources.get(name)):
            result.problems.append(
                f"expert {spec.name!r} ({spec.path}) has a {theirs!r} of its own, but in the base it is tied to "
                f"{name!r}; tie_word_embeddings must be the same in every config.json. Untie it in the base "
                "(store both, and set it to false), or tie it in the expert"
            )
    missing = []
    for name, assignment in result.assignments.items():
        if not (assignment.action == "merge" or (assignment.agree and name in sources)):
            continue
        if name not in sources:
            missing.append(name)
            continue
        problem = _header_problem(name, base.tensors[name], spec, sources[name], expert.tensors[sources[name]])
        if problem:
            result.problems.append(problem)
    for name in missing[:5]:
        result.problems.append(
            f"expert {spec.name!r} ({spec.path}) lacks tensor {name!r} {base.tensors[name].shape}"
            f"{nearest(name, floats) if floats else ''} (to leave it at the base: a rule with method keep-base)"
        )
    if len(missing) > 5:
        result.problems.append(f"expert {spec.name!r} lacks {len(missing) - 5} more tensors of the base")
    for name in floats[:5]:
        result.problems.append(
            f"expert {spec.name!r} ({spec.path}) has a tensor that the base lacks: {name!r} "
            f"{expert.tensors[name].shape}{nearest(name, missing) if missing else ''} (to leave it out: a rule "
            "with method skip)"
        )
    if len(floats) > 5:
        result.problems.append(f"expert {spec.name!r} has {len(floats) - 5} more tensors that the base lacks")


def _header_problem(name: str, ours: TensorInfo, spec: Expert, their_name: str, theirs: TensorInfo) -> str | None:
    if is_float(ours.dtype.name) != is_float(theirs.dtype.name):
        return (
            f"expert {spec.name!r} ({theirs.file}): tensor {their_name!r} is {theirs.dtype.name}, in the base "
            f"{ours.dtype.name}; quantised models must be dequantised first"
        )
    if ours.shape == theirs.shape:
        return None
    place = f"expert {spec.name!r} ({theirs.file}): tensor {their_name!r}"
    if VOCABULARY.search(name) and ours.shape[1:] == theirs.shape[1:]:
        return (
            f"{place}: vocabulary sizes differ: {theirs.shape[0]} rows, {ours.shape[0]} in the base. Either give "
            "all models one vocabulary (model.resize_token_embeddings), or leave the base's: a rule "
            f"'match: \"{name}\", method: keep-base'"
        )
    return (
        f"{place} has shape {theirs.shape}, in the base {ours.shape}; to leave it at the base: a rule with "
        "method keep-base"
    )
