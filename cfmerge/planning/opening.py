"""The models of a recipe, opened: their headers read, and what can be said of their files without their tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, open_checkpoint, quantised
from cfmerge.formats.adapters import check_adapters
from cfmerge.formats.dequantised import dequantised
from cfmerge.formats.folders import check_folders, chosen_folders, same_folders
from cfmerge.planning.configs import config_notes
from cfmerge.planning.experts import adapter_notes, key_of, open_expert
from cfmerge.planning.match import skips
from cfmerge.planning.stacks import Stacked, stacked
from cfmerge.recipe import Expert, Recipe


class Models(NamedTuple):
    """The models of a recipe.

    Attributes:
        base, experts: those that are merged: of a stack with its layers, without folders that are copied.
        specs: the experts as the recipe has them; of a stack with the weights of its runs.
        stack: None: the layers are the base's.
        opened: the models by path, as they lie.
    """

    base: Source
    experts: Sequence[Source]
    specs: Sequence[Expert]
    stack: Stacked | None
    notes: Sequence[str]
    opened: Mapping[str, Source]


def open_models(recipe: Recipe, specs: Sequence[Expert], opened: Mapping[str, Source], sums: bool) -> Models:
    """The models of a recipe.

    Args:
        opened: models by path that are open already.
        sums: statistics are wanted, or come before the experts.

    Raises:
        CfmergeError: a model cannot be read, is quantised, or is named twice.
    """
    on_hub: dict[str, Any] = {"download": recipe.download, "cache_dir": recipe.cache_dir}
    base = opened.get(recipe.base) or open_checkpoint(recipe.base, **on_hub)
    if recipe.dequantize:
        base = dequantised("base", base)
    experts = [opened.get(key_of(spec)) or open_expert(spec, base, recipe) for spec in specs]
    if recipe.dequantize:
        experts = [dequantised(f"expert {spec.name!r}", expert) for spec, expert in zip(specs, experts, strict=True)]
    known = {**dict(zip(map(key_of, specs), experts, strict=True)), recipe.base: base}
    for expert in experts:
        if not expert.config:  # a bare file: tied as the base is
            told = {alias: name for alias, name in base.ties.items() if name in expert.tensors}
            expert.ties = {**told, **expert.ties}
    stack, notes = None, list[str]()
    if recipe.layers:
        stack = _stacked(recipe, specs, base, experts, known, sums)
        base, experts, specs, notes = stack.base, list(stack.experts), stack.specs, list(stack.notes)
    else:
        notes = _check_same_files(recipe, base, specs, experts)
    named: Mapping[str, Source] = {spec.name: expert for spec, expert in zip(specs, experts, strict=True)}
    notes += [*adapter_notes(recipe, base, named), *_of_files(recipe, base, named)]
    base, named, of_components = chosen_folders(base, named, recipe.components)
    base, experts, of_folders = same_folders(base, named)
    return Models(base, experts, specs, stack, [*notes, *of_components, *of_folders], known)


def _stacked(
    recipe: Recipe,
    specs: Sequence[Expert],
    base: Source,
    experts: Sequence[Source],
    opened: dict[str, Source],
    sums: bool,
) -> Stacked:
    """Base and experts with the layers that the recipe asks for."""
    if sums:
        raise CfmergeError("layers: statistics are of the base's own layers; merge without statistics, or leave it out")
    for path in {run.base for run in recipe.layers if run.base} - set(opened):
        opened[path] = open_checkpoint(path, download=recipe.download, cache_dir=recipe.cache_dir)
    return stacked(recipe, specs, base, experts, opened)


def _of_files(recipe: Recipe, base: Source, experts: Mapping[str, Source]) -> list[str]:
    """Notes on the models' files and configs.

    Raises:
        CfmergeError: a model is quantised, or one is a pipeline and another a component.
    """
    problems = quantised.problems(base, experts)
    if problems:
        raise CfmergeError("\n".join(problems))
    check_folders(base, experts)
    of_adapters = check_adapters(base, experts, lambda name: any(skips(rule, name) for rule in recipe.rules))
    left_out = base.left_out if recipe.side_files is None else ()
    return [
        *base.notes,
        *_of_experts(experts),
        *left_out,
        *quantised.notes(base, experts),
        *of_adapters,
        *config_notes(base, experts),
    ]


def _of_experts(experts: Mapping[str, Source]) -> list[str]:
    """Notes on the experts' files; one that several experts share but for the path is told once."""
    shared: dict[str, list[tuple[str, str]]] = {}
    for name, expert in experts.items():
        for note in expert.notes:
            shared.setdefault(note.removeprefix(f"{expert.path}: "), []).append((name, note))
    lines = []
    for note, told in shared.items():
        name, whole = told[0]
        lines.append(f"expert {name!r} and {len(told) - 1} more: {note}" if told[1:] else f"expert {name!r}: {whole}")
    return lines


def _check_same_files(recipe: Recipe, base: Source, specs: Sequence[Expert], experts: Sequence[Source]) -> list[str]:
    """The same files named twice: an error unless the recipe allows it."""
    notes = []
    seen: dict[tuple[Path, ...], str] = {}
    base_files = tuple(file.resolve() for file in base.files)
    for spec, expert in zip(specs, experts, strict=True):
        files = tuple(file.resolve() for file in expert.files)
        if not files:  # in memory
            continue
        if files == base_files and "base-as-expert" not in recipe.allow and recipe.align is None:
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
