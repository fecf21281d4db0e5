"""Plans: recipes resolved against the checkpoints' headers. Tensors are read only to see which are copies."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge import methods
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, open_checkpoint
from cfmerge.models import Parameter, classify, is_buffer, is_float
from cfmerge.planning.aligning import check_align, in_one_order
from cfmerge.planning.assign import Choose, assign, treated_apart
from cfmerge.planning.beside import beside_of
from cfmerge.planning.experts import leave_untouched
from cfmerge.planning.jobs import check_count, check_moments, check_result, settled_jobs, with_ranks
from cfmerge.planning.match import match_experts
from cfmerge.planning.opening import open_models
from cfmerge.planning.pair import Paired, pair_experts
from cfmerge.planning.plugins import load_plugins
from cfmerge.planning.resolved import Planned, Resolved
from cfmerge.planning.ties import settle_ties
from cfmerge.planning.unmerged import check_unmerged, with_unmerged, without_agreement
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
    composing: Callable[[int, Any], Choose] | None = None,
) -> Resolved:
    """The recipes resolved: checkpoints opened, headers read, everything settled that headers can settle.

    Args:
        asked: recipes by label: one, or several that differ in method and parameters alone.
        statistics: the statistics of other experts; None: those that the recipe names, if it does.
        sums: methods in the form whose statistic is a sum of fixed size, as accumulating needs it.
        opened: checkpoints by path that are open already.
        composing: the choice of every parameter's method, given the number of experts and the method that is asked
            for, where the result is not one checkpoint.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    recipe = next(iter(asked.values()))
    check_seed(recipe.seed)
    check_unmerged(recipe, composing is not None)
    check_align(recipe, sums or statistics is not None, composing is not None)
    load_plugins(recipe.plugins)
    made = [methods.make(one.method, one.parameters) for one in asked.values()]
    for method in made:
        check_result(method, composing is not None)
    if statistics is None and recipe.statistics is not None:
        statistics = Statistics.load(recipe.statistics)
    sums = sums or statistics is not None
    if statistics is not None:
        asked = {label: statistics.recipe(one) for label, one in asked.items()}
        recipe = next(iter(asked.values()))
    alone = all(method.needs.experts[1] == 1 for method in made)
    specs = recipe.resolved_experts(least=0 if statistics else 1 if sums or alone or composing else 2)
    earlier = list(statistics.experts) if statistics else []
    _check_texts(recipe, specs)
    _check_new(specs, earlier)
    models = open_models(recipe, specs, opened or {}, sums)
    for method in made if models.stack is None else ():
        check_count(method, len(earlier) + len(specs))
    stack, merged, notes = models.stack, models.specs, list(models.notes)

    paired = pair_experts(recipe, models.base, models.experts, merged)
    base, of_tokens, of_vocabulary = one_vocabulary(recipe, models.base, paired, merged, sums)
    notes += of_tokens
    order = in_one_order(recipe, base, paired.experts, specs, paired.sources)
    parameters = _parameters(base)

    def apart(one: str, other: str) -> bool:
        return treated_apart(recipe.rules, one, other) or (stack is not None and stack.apart(one, other))

    ties = settle_ties(base, paired.experts, merged, paired.sources, apart)
    own = {name: parameter for name, parameter in parameters.items() if name not in ties.aliases}
    others = {name for expert in paired.experts for name in expert.tensors}
    choose = composing(len(specs), made[0]) if composing else None
    matched = []
    for one, method in zip(asked.values(), made, strict=True):
        assignments = assign(own, method, one.rules, others, stack.methods(one) if stack else None, choose)
        if recipe.unmerged is not None:
            assignments = without_agreement(assignments)
        matched.append(match_experts(one, base, merged, _afresh(paired), ties, assignments))
        problems = matched[-1].problems
        if problems:
            more = len(problems) - 20
            raise CfmergeError("\n".join([*problems[:20], *([f"... and {more} more problems"] if more > 0 else [])]))
    if statistics is None and not sums:  # statistics count an expert that has not changed a tensor
        notes += leave_untouched(matched, paired.experts)

    if statistics and fingerprint(base, list(statistics.kinds)) != statistics.base:
        raise CfmergeError(f"base {recipe.base}: the statistics were accumulated over another base")
    base = with_unmerged(recipe, order.base, models, merged, paired, matched[0].assignments)

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
        for spec, expert, file in zip(specs, order.experts, files, strict=True)
    ]
    check_moments(jobs, taking_part, lambda file, name: file.tensors.get(name))  # type: ignore[attr-defined]
    jobs = with_ranks(jobs, taking_part, sums or statistics is not None)
    work = Work(
        Participant("base", f"base ({base.path})", base), tuple(taking_part), tuple(jobs), statistics, recipe.seed,
        recipe.precision, from_files=True, sums=sums,
    )  # fmt: skip
    if not stack and not any(job.assignment.action == "merge" for job in jobs):
        raise CfmergeError("nothing to merge: every tensor is kept from the base or left out")
    averaged = [] if composing else unsolved_notes({job.name: job.assignment for job in jobs}, made[0])
    results = {label: Planned(one, method) for (label, one), method in zip(asked.items(), made, strict=True)}
    beside = beside_of(recipe, base, models, of_vocabulary)
    return Resolved(
        results, base, tuple(order.experts), tuple(specs), work, matched[0].exported,
        (*notes, *beside.notes, *order.notes, *numbers_told, *matched[0].notes, *averaged),
        parse_size(recipe.shard_size), beside.files, sums, models.opened, beside.edits,
    )  # fmt: skip


def _check_texts(recipe: Recipe, specs: Sequence[Expert]) -> None:
    """Raises `CfmergeError` if a path or name cannot stand in a recipe."""
    for text in (recipe.base, *(text for spec in specs for text in (spec.path, spec.adapter or "", spec.name))):
        try:
            str(text).encode()
        except UnicodeEncodeError:
            raise CfmergeError(
                f"{text!r}: is not UTF-8, as a recipe and a model's card must be; rename it, or make a link to it"
            ) from None


def _check_new(specs: Sequence[Expert], earlier: Sequence[str]) -> None:
    """Raises `CfmergeError` if an expert is in the statistics already."""
    twice = [spec.name for spec in specs if spec.name in earlier]
    if twice:
        raise CfmergeError(
            f"expert {twice[0]!r} is in the statistics already, and would count twice; leave it out, or, if it is "
            "another one, give it another name"
        )


def _afresh(paired: Paired) -> Paired:
    """The same, to be narrowed for one recipe: heads are taken out of its sources."""
    return dataclasses.replace(paired, sources=[dict(names) for names in paired.sources])


def _parameters(checkpoint: Source) -> dict[str, Parameter]:
    headers = {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}
    return classify(headers, checkpoint.config)
