"""Plans: recipes resolved against the checkpoints' headers. Tensors are read only to see which are copies."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge import methods
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, located, open_checkpoint, quantised
from cfmerge.formats.adapters import check_adapters
from cfmerge.formats.dequantised import dequantised
from cfmerge.formats.folders import check_folders, chosen_folders, same_folders
from cfmerge.formats.side_files import check_whole, side_files
from cfmerge.models import Parameter, classify, is_buffer, is_float
from cfmerge.planning.assign import assign, treated_apart
from cfmerge.planning.chat import with_template
from cfmerge.planning.configs import config_notes
from cfmerge.planning.experts import adapter_notes, key_of, leave_untouched, open_expert
from cfmerge.planning.jobs import check_count, check_moments, settled_jobs, with_ranks
from cfmerge.planning.match import match_experts, skips
from cfmerge.planning.pair import Paired, pair_experts
from cfmerge.planning.plugins import load_plugins
from cfmerge.planning.resolved import Planned, Resolved
from cfmerge.planning.stacks import Stacked, stacked
from cfmerge.planning.ties import settle_ties
from cfmerge.planning.unsolved import unsolved_notes
from cfmerge.planning.vocabularies import one_vocabulary
from cfmerge.planning.work import Participant, Work
from cfmerge.recipe import Expert, Recipe, parse_size
from cfmerge.statistics import Statistics, fingerprint

OUTPUT_DTYPES = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


def resolve(
    asked: Mapping[str, Recipe],
    statistics: Statistics | None = None,
    *,
    sums: bool = False,
    opened: Mapping[str, Source] | None = None,
) -> Resolved:
    """The recipes resolved: checkpoints opened, headers read, everything settled that headers can settle.

    Args:
        asked: recipes by label: one, or several that differ in method and parameters alone.
        statistics: the statistics of other experts; None: those that the recipe names, if it does.
        sums: methods in the form whose statistic is a sum of fixed size, as accumulating needs it.
        opened: checkpoints by path that are open already.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    recipe = next(iter(asked.values()))
    check_seed(recipe.seed)
    load_plugins(recipe.plugins)
    made = [methods.make(one.method, one.parameters) for one in asked.values()]
    if statistics is None and recipe.statistics is not None:
        statistics = Statistics.load(recipe.statistics)
    sums = sums or statistics is not None
    if statistics is not None:
        asked = {label: statistics.recipe(one) for label, one in asked.items()}
        recipe = next(iter(asked.values()))
    alone = all(method.needs.experts[1] == 1 for method in made)
    specs = recipe.resolved_experts(least=0 if statistics else 1 if sums or alone else 2)
    opened = opened or {}
    on_hub: dict[str, Any] = {"download": recipe.download, "cache_dir": recipe.cache_dir}
    base = opened.get(recipe.base) or open_checkpoint(recipe.base, **on_hub)
    if recipe.dequantize:
        base = dequantised("base", base)
    experts = [opened.get(key_of(spec)) or open_expert(spec, base, recipe) for spec in specs]
    if recipe.dequantize:
        experts = [dequantised(f"expert {spec.name!r}", expert) for spec, expert in zip(specs, experts, strict=True)]
    opened = {**dict(zip(map(key_of, specs), experts, strict=True)), recipe.base: base}
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
    stack = _stacked(recipe, specs, base, experts, opened, sums)
    for method in made if stack is None else ():
        check_count(method, len(earlier) + len(specs))
    if stack is None:
        notes, merged = _check_same_files(recipe, base, specs, experts), specs
    else:
        notes, base, experts, merged = list(stack.notes), stack.base, stack.experts, stack.specs
    named: Mapping[str, Source] = {spec.name: expert for spec, expert in zip(specs, experts, strict=True)}
    notes += [*adapter_notes(recipe, base, named), *_of_files(recipe, base, named)]
    base, named, of_components = chosen_folders(base, named, recipe.components)
    base, experts, of_folders = same_folders(base, named)
    notes += [*of_components, *of_folders]

    paired = pair_experts(recipe, base, experts, merged)
    base, of_tokens, of_vocabulary = one_vocabulary(recipe, base, paired, merged, sums)
    notes += of_tokens
    parameters = _parameters(base)

    def apart(one: str, other: str) -> bool:
        return treated_apart(recipe.rules, one, other) or (stack is not None and stack.apart(one, other))

    ties = settle_ties(base, paired.experts, merged, paired.sources, apart)
    own = {name: parameter for name, parameter in parameters.items() if name not in ties.aliases}
    others = {name for expert in paired.experts for name in expert.tensors}
    matched = []
    for one, method in zip(asked.values(), made, strict=True):
        assignments = assign(own, method, one.rules, others, stack.methods(one) if stack else None)
        matched.append(match_experts(one, base, merged, _afresh(paired), ties, assignments))
        problems = matched[-1].problems
        if problems:
            more = len(problems) - 20
            raise CfmergeError("\n".join([*problems[:20], *([f"... and {more} more problems"] if more > 0 else [])]))
    if statistics is None and not sums:  # statistics count an expert that has not changed a tensor
        notes += leave_untouched(matched, paired.experts)

    aliases: dict[str, list[str]] = {}
    for alias, name in ties.aliases.items():
        aliases.setdefault(name, []).append(alias)

    def output_dtype(parameter: Parameter) -> np.dtype:
        ruled = matched[0].assignments[parameter.name].rule is not None
        kept = is_buffer(parameter.name, parameter.shape) and not ruled  # exact, in whatever dtype
        if recipe.adapter_out is not None and is_float(parameter.dtype):
            return OUTPUT_DTYPES["float32"]  # less the base: the base's own dtype would round it
        floating = recipe.dtype and is_float(parameter.dtype) and not kept
        return OUTPUT_DTYPES[str(recipe.dtype)] if floating else base.tensors[parameter.name].dtype

    jobs, numbers_told = settled_jobs(
        [one.assignments for one in matched], [spec.name for spec in specs], [spec.weight for spec in merged],
        before=earlier, sources=matched[0].sources, aliases=aliases, dtype_of=output_dtype, statistics=statistics,
        sums=sums,
    )  # fmt: skip
    files = [open_checkpoint(spec.moments) if spec.moments else None for spec in specs]
    taking_part = [
        Participant(spec.name, f"expert {spec.name!r} ({spec.path})", expert, file)
        for spec, expert, file in zip(specs, paired.experts, files, strict=True)
    ]
    check_moments(jobs, taking_part, lambda file, name: file.tensors.get(name))  # type: ignore[attr-defined]
    jobs = with_ranks(jobs, taking_part, sums or statistics is not None)
    work = Work(
        Participant("base", f"base ({base.path})", base), tuple(taking_part), tuple(jobs), statistics, recipe.seed,
        recipe.precision, from_files=True, sums=sums,
    )  # fmt: skip
    if statistics and fingerprint(base, list(statistics.kinds)) != statistics.base:
        raise CfmergeError(f"base {recipe.base}: the statistics were accumulated over another base")
    if not stack and not any(job.assignment.action == "merge" for job in jobs):
        raise CfmergeError("nothing to merge: every tensor is kept from the base or left out")
    averaged = unsolved_notes({job.name: job.assignment for job in jobs}, made[0])
    results = {label: Planned(one, method) for (label, one), method in zip(asked.items(), made, strict=True)}
    beside, edits = dict(_side_files(recipe, base)), _joined(of_vocabulary, _edits(stack))
    if recipe.chat_template is not None:
        beside, of_chat, chat_notes = with_template(recipe.chat_template, base, experts, beside)
        edits = _joined(edits, of_chat)
        notes += chat_notes
    return Resolved(
        results, base, tuple(paired.experts), tuple(specs), work, matched[0].exported,
        (*notes, *numbers_told, *matched[0].notes, *averaged), parse_size(recipe.shard_size),
        beside, sums, opened, edits,
    )  # fmt: skip


def _stacked(
    recipe: Recipe,
    specs: Sequence[Expert],
    base: Source,
    experts: Sequence[Source],
    opened: dict[str, Source],
    sums: bool,
) -> Stacked | None:
    """Base and experts with the layers that the recipe asks for; None: they are the base's."""
    if not recipe.layers:
        return None
    if sums:
        raise CfmergeError("layers: statistics are of the base's own layers; merge without statistics, or leave it out")
    for path in {run.base for run in recipe.layers if run.base} - set(opened):
        opened[path] = open_checkpoint(path, download=recipe.download, cache_dir=recipe.cache_dir)
    return stacked(recipe, specs, base, experts, opened)


def _edits(stack: Stacked | None) -> Mapping[str, Mapping[str, Any]]:
    """`{name of a JSON side file: {key: value}}` of the keys that other layers change."""
    if stack is None or not stack.base.edits:
        return {}
    return {f"{stack.base.folders[0].name}/config.json".lstrip("/"): stack.base.edits}


def _joined(*edits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All edits of the side files, by file."""
    files = dict.fromkeys(name for some in edits for name in some)
    return {name: {key: value for some in edits for key, value in some.get(name, {}).items()} for name in files}


def _afresh(paired: Paired) -> Paired:
    """The same, to be narrowed for one recipe: heads are taken out of its sources."""
    return dataclasses.replace(paired, sources=[dict(names) for names in paired.sources])


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
    read = [*base.notes, *(f"expert {name!r}: {note}" for name, expert in experts.items() for note in expert.notes)]
    left_out = base.left_out if recipe.side_files is None else ()
    return [*read, *left_out, *quantised.notes(base, experts), *of_adapters, *config_notes(base, experts)]


def _parameters(checkpoint: Source) -> dict[str, Parameter]:
    headers = {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}
    return classify(headers, checkpoint.config)


def _check_same_files(recipe: Recipe, base: Source, specs: Sequence[Expert], experts: Sequence[Source]) -> list[str]:
    """The same files named twice: an error unless the recipe allows it."""
    notes = []
    seen: dict[tuple[Path, ...], str] = {}
    base_files = tuple(file.resolve() for file in base.files)
    for spec, expert in zip(specs, experts, strict=True):
        files = tuple(file.resolve() for file in expert.files)
        if not files:  # in memory
            continue
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


def _side_files(recipe: Recipe, base: Source) -> Mapping[str, Path]:
    if recipe.side_files is None:
        check_whole(base.side_files)
        return base.side_files
    directory = located(recipe.side_files, recipe.download, recipe.cache_dir, weights=False)
    if not directory.is_dir():
        raise CfmergeError(f"side_files: {directory} is not a directory")
    files = side_files(directory)
    check_whole(files)
    return files
