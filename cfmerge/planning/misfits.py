"""The words about tensors of experts that do not fit the base: many of one kind are one pattern with a rule."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from cfmerge.errors import nearest
from cfmerge.formats import TensorInfo
from cfmerge.models import Shape, is_float
from cfmerge.models.heads import VOCABULARY
from cfmerge.models.patterns import Pattern, patterns
from cfmerge.recipe import Expert, rule_option

SHOWN = 5  # patterns of one kind of problem
SHOWN_EXPERTS = 3
LACKS, HAS, DIFFERS = (" lacks ", ": each lacks "), (" has ", ": each has "), (": ", ": ")
Compared = Mapping[
    str, tuple[TensorInfo, str, TensorInfo]
]  # {name: (the base's header, the expert's name, its header)}


@dataclasses.dataclass(frozen=True)
class Misfit:
    """A fault of one expert; experts with the same `text` are told together.

    Attributes:
        expert: the expert, and the file.
        verb: between the expert and the text, for one expert and for several.
        text: the rest of the sentence.
        part: the expert may be meant to be a part of the base.
    """

    expert: str
    verb: tuple[str, str]
    text: str
    part: bool = False


def told(misfits: Iterable[Misfit]) -> list[str]:
    """One line for each text, with all experts that it is about."""
    groups: dict[tuple[tuple[str, str], str], list[str]] = {}
    for misfit in misfits:
        groups.setdefault((misfit.verb, misfit.text), []).append(misfit.expert)
    lines = [_sentence(experts, verb, text) for (verb, text), experts in groups.items()]
    if any(misfit.part for misfit in misfits):
        lines.append(
            "(an expert that is meant to be a part of the base: -e '{path: PATH, partial: true}'; one whose tensors "
            "have other names: --rename 'REGEX => TEXT'; in a recipe 'partial: true' and "
            "'rename: [{from: REGEX, to: TEXT}]' beside its path)"
        )
    return lines


def _sentence(experts: Sequence[str], verb: tuple[str, str], text: str) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]}{verb[0]}{text}"
    more = f" and {len(experts) - SHOWN_EXPERTS} more" if len(experts) > SHOWN_EXPERTS else ""
    return f"experts {', '.join(experts[:SHOWN_EXPERTS])}{more}{verb[1]}{text}"


def less_than_the_base(
    spec: Expert, missing: Mapping[str, Shape], has: Sequence[str], others: Sequence[str]
) -> list[Misfit]:
    """The misfits of an expert that lacks tensors.

    Args:
        spec: the expert.
        missing: the base's names and shapes.
        has: names of the base that the expert has.
        others: names of the expert that the base lacks, one of which may be meant.
    """
    return _on_one_side(
        spec, LACKS, missing, has, others, ("tensor ", "tensors of the base"), "leave {} at the base", "keep-base",
        part=len(missing) > 1,
    )  # fmt: skip


def more_than_the_base(
    spec: Expert, extra: Mapping[str, Shape], paired: Sequence[str], missing: Sequence[str]
) -> list[Misfit]:
    """The misfits of an expert that has tensors which the base lacks.

    Args:
        spec: the expert.
        extra: the expert's names and shapes.
        paired: the expert's other names.
        missing: names of the base that the expert lacks, one of which may be meant.
    """
    words = "a tensor that the base lacks: ", "tensors that the base lacks"
    return _on_one_side(spec, HAS, extra, paired, missing, words, "leave {} out", "skip")


def _on_one_side(
    spec: Expert,
    verb: tuple[str, str],
    alone: Mapping[str, Shape],
    both: Sequence[str],
    others: Sequence[str],
    words: tuple[str, str],
    way_out: str,
    method: str,
    part: bool = False,
) -> list[Misfit]:
    """A line for each pattern of the tensors that one side has alone.

    Args:
        both: names that both sides have.
        others: names that the other side has alone.
        words: before one tensor's name; after the number of several.
        way_out: what a rule with that method does with `{}`.
    """
    who, found = f"{spec.name!r} ({spec.path})", patterns(list(alone), both)
    lines = []
    for pattern in found[:SHOWN]:
        name, count = pattern.names[0], len(pattern.names)
        such = f"{name!r} {alone[name]}"
        if count == 1:
            line = f"{words[0]}{such}{nearest(name, others) if others else ''}"
        else:
            line = f"{count} {words[1]}: {pattern.text}, such as {such}"
        rule = f"a rule with method {method}: {rule_option(pattern.glob, method)}"
        lines.append(f"{line} (to {way_out.format('it' if count == 1 else 'them')}: {rule})")
    if len(found) > SHOWN:
        lines.append(f"{sum(len(pattern.names) for pattern in found[SHOWN:])} more {words[1]}")
    return [Misfit(who, verb, line, part=part) for line in lines]


def other_headers(spec: Expert, compared: Compared) -> list[Misfit]:
    """The misfits of tensors in another shape, or not in floating point where the base is."""
    kinds: dict[str, list[str]] = {}
    for name, (ours, _, theirs) in compared.items():
        if is_float(ours.dtype.name) != is_float(theirs.dtype.name):
            kinds.setdefault("dtype", []).append(name)
        elif ours.shape != theirs.shape:
            rows = VOCABULARY.search(name) and ours.shape[1:] == theirs.shape[1:]
            kinds.setdefault("vocabulary" if rows else "shape", []).append(name)
    return [misfit for kind, names in kinds.items() for misfit in _of_kind(spec, kind, names, compared)]


def _of_kind(spec: Expert, kind: str, names: Sequence[str], compared: Compared) -> list[Misfit]:
    # a table and the output layer that reads it are named one by one: the counts of their rows may differ
    found = patterns(names, list(compared)) if kind != "vocabulary" else [p for n in names for p in patterns([n])]
    misfits = [
        Misfit(f"{spec.name!r} ({compared[pattern.names[0]][2].file})", DIFFERS, _differing(kind, pattern, compared))
        for pattern in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        count = sum(len(pattern.names) for pattern in found[SHOWN:])
        text = f"{count} more tensors of another {kind} than the base's: is it a fine-tuned copy of this base?"
        misfits.append(Misfit(f"{spec.name!r} ({spec.path})", HAS, text))
    return misfits


def _differing(kind: str, pattern: Pattern, compared: Compared) -> str:
    ours, own_name, theirs = compared[pattern.names[0]]
    count = len(pattern.names)
    start = "" if count == 1 else f"{count} tensors of another {kind}: {pattern.text}, such as: "
    start += f"tensor {own_name!r}"
    rule = rule_option(pattern.glob, "keep-base")
    if kind == "dtype":
        return (
            f"{start} is {theirs.dtype.name}, in the base {ours.dtype.name}; quantised models must be dequantised first"
        )
    if kind == "vocabulary":
        return (
            f"{start}: vocabulary sizes differ: {theirs.shape[0]} rows, {ours.shape[0]} in the base. Either give all "
            f"models one vocabulary (model.resize_token_embeddings), or leave the base's: {rule}"
        )
    them = "it" if count == 1 else "them"
    return f"{start} has shape {theirs.shape}, in the base {ours.shape}; to leave {them} at the base: {rule}"
