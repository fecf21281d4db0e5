"""The experts that a recipe names, opened: models, adapters over the base, adapters over other models."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, located, open_checkpoint
from cfmerge.formats.adapters import AdapterSource, is_adapter, other_bases
from cfmerge.models.patterns import tell
from cfmerge.planning.assign import Assignment
from cfmerge.planning.match import Matched
from cfmerge.recipe import Expert, Recipe


def key_of(spec: Expert) -> str:
    """The name of an expert among sources that are open."""
    return f"{spec.path} with the adapter {spec.adapter}" if spec.adapter else spec.path


def open_expert(spec: Expert, base: Source, recipe: Recipe) -> Source:
    """The source of one expert.

    Raises:
        CfmergeError: it is damaged, or no model and no adapter of this base.
    """
    on_hub: dict[str, Any] = {"download": recipe.download, "cache_dir": recipe.cache_dir}
    path = located(spec.path, **on_hub)
    if not spec.adapter and not is_adapter(path):
        return open_checkpoint(spec.path, **on_hub)
    renames = [(rule.pattern, rule.to) for rule in (*spec.rename, *recipe.rename)]
    if not spec.adapter:
        return AdapterSource(path, base, renames, partial=spec.partial)
    adapter = located(spec.adapter, **on_hub)
    if not is_adapter(adapter):
        found = "is no adapter (a directory with adapter_config.json, or a file of factors)"
        there = found if adapter.exists() else "no such file or directory"
        raise CfmergeError(f"expert {spec.name!r}: {adapter}: {there}")
    if is_adapter(path):
        raise CfmergeError(
            f"expert {spec.name!r}: {path} is an adapter itself; `path` names the model that {adapter} changes"
        )
    own = open_checkpoint(spec.path, **on_hub)
    if _files(own) == _files(base):
        return AdapterSource(adapter, base, renames, partial=spec.partial)
    return AdapterSource(adapter, own, own_base=True, partial=spec.partial)


def _files(source: Source) -> list[Path]:
    return [file.resolve() for file in source.files]


def adapter_notes(recipe: Recipe, base: Source, experts: Mapping[str, Source]) -> list[str]:
    """Notes on the bases that adapters say they were trained on.

    Raises:
        CfmergeError: they say different ones, and the recipe does not allow it.
    """
    adapters = {name: one for name, one in experts.items() if isinstance(one, AdapterSource) and not one.own_base}
    if not adapters:
        return []
    cached = hub.snapshot(base.path)
    named = base.config.get("_name_or_path")
    told = cached.repository if cached else named if isinstance(named, str) and named.count("/") == 1 else ""
    problems, notes = other_bases(adapters, base, told)
    if problems and "other-base" not in recipe.allow:
        raise CfmergeError(
            f"{problems[0]}. If they are one model, allow it: --allow other-base (recipe: 'allow: [other-base]')"
        )
    return [*problems, *notes]


def leave_untouched(matched: Sequence[Matched], experts: Sequence[Source]) -> list[str]:
    """Keeps from the base, in every result, the tensors that all experts' adapters leave as they are; a note on them.

    But not where a method looks at the whole model, of which they are a part.
    """
    first = matched[0]
    kept = [
        name for name in first.assignments
        if experts and all(_may_stay(one.assignments[name]) for one in matched)
        and all(name in own and e.rank(own[name]) == 0 for e, own in zip(experts, first.sources, strict=True))
    ]  # fmt: skip
    for one in matched:
        one.assignments |= {name: dataclasses.replace(one.assignments[name], action="keep-base") for name in kept}
    return [f"{tell(kept, first.assignments)}: changed by no adapter; the output has the base's"] if kept else []


def _may_stay(assignment: Assignment) -> bool:
    survey = assignment.method.survey
    return assignment.action == "merge" and (survey is None or survey.within == "tensor")
