"""The recipe's key `unmerged`: the model that gives what is not merged, in place of the base."""

import dataclasses
from collections.abc import Mapping, Sequence

from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, open_checkpoint
from cfmerge.formats.dequantised import dequantised
from cfmerge.formats.unmerged import Unmerged
from cfmerge.models import is_buffer, is_float
from cfmerge.models.buffers import is_optional
from cfmerge.models.patterns import escape, tell
from cfmerge.planning.assign import Assignment
from cfmerge.planning.opening import Models
from cfmerge.planning.pair import Paired
from cfmerge.recipe import Expert, Recipe, rule_option

BASE = "base"  # the word for the base itself


def check_unmerged(recipe: Recipe, composing: bool) -> None:
    """Raises `CfmergeError` where the output is no model, or has other tensors or side files than that model."""
    if recipe.unmerged is not None and composing:
        raise CfmergeError("unmerged: a composed result keeps nothing that is not merged; leave the key out")
    key = next((key for key in ("layers", "vocabulary") if getattr(recipe, key)), None)
    if recipe.unmerged is not None and key:
        raise CfmergeError(
            f"unmerged: with `{key}` the output's tensors are none of {recipe.unmerged!r}; leave one of the keys out"
        )


def without_agreement(assignments: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """The assignments for a merge that names the model of its integers: the experts may have others."""
    return {name: dataclasses.replace(one, settled=True) for name, one in assignments.items()}


def with_unmerged(
    recipe: Recipe, base: Source, models: Models, specs: Sequence[Expert], paired: Paired,
    assignments: Mapping[str, Assignment],
) -> Source:  # fmt: skip
    """The base, with the integers, buffers and objects of the model that the recipe names, if it is another.

    Tensors that a rule or `heads` keeps from the base stay the base's.

    Raises:
        CfmergeError: that model cannot be read, or lacks such a tensor, or has it in another shape or dtype.
    """
    if recipe.unmerged in (None, BASE, recipe.base):
        return base
    number = next((n for n, spec in enumerate(specs) if recipe.unmerged in (spec.name, spec.path)), None)
    if number is None:
        other, theirs, who = _opened(recipe, models), {}, f"unmerged ({recipe.unmerged})"
    else:
        other, theirs = paired.experts[number], paired.sources[number]
        who = f"unmerged: expert {specs[number].name!r} ({other.path})"
    kept = [
        name for name, one in assignments.items()
        if one.action == "keep-base" and one.rule is None and _is_no_parameter(one)
    ]  # fmt: skip
    names = {name: theirs.get(name, name) for name in kept}
    _check_headers(who, base, other, names)
    return Unmerged(base, other, names)


def _opened(recipe: Recipe, models: Models) -> Source:
    path = str(recipe.unmerged)
    try:
        other = models.opened.get(path) or open_checkpoint(path, download=recipe.download, cache_dir=recipe.cache_dir)
    except CfmergeError as error:
        raise CfmergeError(f"unmerged: {error}. It is {BASE}, an expert's name, or the path of a model") from None
    return dequantised("unmerged", other) if recipe.dequantize else other


def _is_no_parameter(assignment: Assignment) -> bool:
    one = assignment.parameter
    return not is_float(one.dtype) or is_buffer(one.name, one.shape) or is_optional(one.name)


def _check_headers(who: str, base: Source, other: Source, names: Mapping[str, str]) -> None:
    missing = [name for name, theirs in names.items() if theirs not in other.tensors]
    if missing:
        way_out = rule_option(escape(missing[0]), "keep-base")
        raise CfmergeError(
            f"{who}: lacks {tell(missing, list(names))}, which are not merged; to keep the base's: {way_out}"
        )
    for name, theirs in names.items():
        ours, found = base.tensors[name], other.tensors[theirs]
        if (ours.shape, ours.dtype) != (found.shape, found.dtype):
            raise CfmergeError(
                f"{who}: {theirs!r} is {found.dtype.name} {found.shape}, in the base ({base.path}) "
                f"{ours.dtype.name} {ours.shape}; to keep the base's: {rule_option(escape(name), 'keep-base')}"
            )
