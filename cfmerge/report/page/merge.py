"""The page of a merge, or of a recipe that is yet to be merged."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cfmerge.models.layers import named
from cfmerge.report.page import depth, layers
from cfmerge.report.page.blocks import Block, Code, Facts, Fold, Grade, Notice, Page, Prose, Section, Table
from cfmerge.report.page.plots import number

if TYPE_CHECKING:
    from cfmerge.diagnosis import Diagnosis, Finding, Measured

TOGETHER = 60  # tensors up to which one table has all
MOST = 3  # names that a finding lists
TIMES = "\N{MULTIPLICATION SIGN}"
GRADES: dict[str, tuple[Grade, str]] = {
    "grave": ("grave", "Grave:"), "warning": ("warning", "Warning:"), "fact": ("fact", "Fact:"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Input:
    """An input file: whose it is, its weight, its SHA-256, and its state now (before a merge its size), in words."""

    role: str
    weight: str
    file: str
    digest: str
    state: str = ""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the output, and what makes it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    what: str


@dataclasses.dataclass(frozen=True)
class Merge:
    """All that the page of a merge tells.

    Attributes:
        name: of the output, or of the recipe.
        done: whether it is merged.
        experts: their names.
        about: a sentence on the method.
        recipe: as YAML, without keys that have their defaults; `whole`: with them.
        counts: `(kind, what, tensors)`.
        warnings, notes: of the merge.
        lacking: why something could not be measured.
        facts: names and values for the summary, such as sizes.
        diagnosis: of the experts alone.
        measured: the numbers of the experts and behind them of the merged model; None: it was not measured.
    """

    name: str
    done: bool
    method: str
    about: str
    experts: Sequence[str]
    recipe: str
    whole: str
    counts: Sequence[tuple[str, str, int]]
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    lacking: Sequence[str] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Sequence[Input] = ()
    versions: str = ""
    tensors: Sequence[Tensor] = ()
    diagnosis: Diagnosis | None = None
    measured: Mapping[str, Measured] | None = None


def page(merge: Merge) -> Page:
    """The page."""
    count = f"{len(merge.experts)} expert{'s' if len(merge.experts) != 1 else ''}"
    verb = "merged by" if merge.done else "to be merged by"
    title = f"{count} {verb} {merge.method}" if merge.experts else "A stack of layers"
    sections = [
        Section("Summary", _summary(merge)),
        Section("Inputs and recipe", _inputs(merge)),
        *([Section("Diagnosis", _diagnosis(merge.diagnosis))] if merge.diagnosis else []),
        *_layers(merge),
        *([Section("Tensors and methods", _tensors(merge))] if merge.counts or merge.tensors else []),
    ]
    kind = "Merge report" if merge.done else "Merge plan"
    foot = f"Made by `cfmerge report`. {f'Merged with {merge.versions}.' if merge.done and merge.versions else ''}"
    return Page(kind, title, f"`{merge.name}`", sections, foot.strip())


def _summary(merge: Merge) -> list[Block]:
    """Warnings first, then grave findings, notes, and the main numbers."""
    blocks: list[Block] = [Notice("grave", text, "Warning:") for text in merge.warnings]
    blocks += [Notice("warning", text, "Not measured:") for text in merge.lacking]
    findings = merge.diagnosis.findings if merge.diagnosis else ()
    blocks += [_finding(one) for one in findings if one.severity == "grave"]
    if cautions := sum(one.severity == "warning" for one in findings):
        text = f"the diagnosis has {cautions} warning{'s' if cautions > 1 else ''}: see there."
        blocks.append(Notice("warning", text, "Diagnosis:"))
    if not blocks:
        checked = "or finding of the diagnosis asks" if merge.diagnosis else "asks"
        blocks.append(Notice("good", f"no warning {checked} for attention.", "Clear:"))
    blocks += [Notice("note", text, "Note:") for text in merge.notes]
    facts = {"Method": f"`{merge.method}`", "Experts": _named(merge.experts), **merge.facts}
    if findings:
        counts = Counter(one.severity for one in findings)
        facts["Findings"] = ", ".join(f"{count} {_word(grade, count)}" for grade, count in counts.items())
    blocks.append(Facts(facts))
    return [*blocks, *([Prose(merge.about)] if merge.about else [])]


def _named(experts: Sequence[str], most: int = 6) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return f"{', '.join(experts[:most])}{more}" if experts else "none"


def _word(grade: str, count: int) -> str:
    return grade if grade == "grave" or count == 1 else f"{grade}s"


def _inputs(merge: Merge) -> list[Block]:
    blocks: list[Block] = []
    if merge.inputs:
        columns = {"model": "role", "file": "file", "weight": "weight"}
        columns |= {"SHA-256": "digest"} if merge.done else {}
        columns |= {"now" if merge.done else "size": "state"} if any(one.state for one in merge.inputs) else {}
        rows = [[_code(getattr(one, field), field) for field in columns.values()] for one in merge.inputs]
        blocks.append(Table("Input files", list(columns), rows, left=len(columns)))
    again = "repeats the merge" if merge.done else "makes the merge"
    blocks.append(Prose(f"`cfmerge merge recipe.yaml -o OUT`, with this text as the file `recipe.yaml`, {again}."))
    blocks.append(Code(merge.recipe, "The recipe, as YAML"))
    if merge.whole != merge.recipe:
        blocks.append(Fold("The recipe with every key", [Code(merge.whole, "The recipe with every key, as YAML")]))
    if merge.versions:
        blocks.append(Prose(f"Versions: {merge.versions}."))
    return blocks


def _code(text: str, field: str) -> str:
    return f"`{text}`" if text and field == "digest" else text


def _diagnosis(found: Diagnosis) -> list[Block]:
    told = found.recommendation
    without = f"Leave out: {', '.join(told.without)}." if told.without else ""
    method, reason = f"`{told.method}`" if told.method else "no merge", told.reason.removeprefix("no merge: ")
    evidence = f"Measured in {told.evidence}." if told.evidence else ""
    command = shlex.join(["cfmerge", "merge", "recipe.yaml", "-m", told.method, "-o", "OUT"])
    so = f"`{command}` merges so." if told.method and not told.without else ""
    said = [f"{method}: {reason}.", evidence, without, so]
    blocks: list[Block] = [Notice("good" if told.method else "grave", " ".join(filter(None, said)), "Recommended:")]
    blocks += [_finding(one) for one in found.findings]
    if not found.findings:
        blocks.append(Prose("Nothing stands out."))
    blocks.append(_by_expert(found))
    if found.notes:
        blocks.append(Fold(f"Notes of the diagnosis ({len(found.notes)})", [Prose(note) for note in found.notes]))
    return blocks


def _finding(one: Finding) -> Notice:
    grade, label = GRADES[one.severity]
    names = one.tensors
    shown = ""
    if names and not all(name in one.text for name in names):
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        shown = f"\nTensors: {', '.join(f'`{name}`' for name in names[:MOST])}{more}."
    return Notice(grade, one.text + shown, label)


def _by_expert(found: Diagnosis) -> Table:
    """A row of numbers for each expert, over the whole model."""
    members = list(found.tensors.values())
    columns: dict[str, Any] = {
        "relative norm": depth.relative_norms(members),
        "rank": depth.medians(members, "ranks"),
        "stable rank": depth.medians(members, "stable_ranks"),
        "effective rank": depth.medians(members, "effective_ranks"),
        "leading": depth.share(members, "leading"),
        "lesser": depth.share(members, "lesser"),
        "null": depth.share(members, "null"),
        "conflicts": depth.with_others(depth.conflicts(members)) if len(found.experts) > 1 else None,
    }
    known = {name: values for name, values in columns.items() if values is not None}
    rows = [[name, *(number(float(values[t])) for values in known.values())] for t, name in enumerate(found.experts)]
    sides = [min(one.sides) for one in members if one.ranks is not None and one.sides is not None]
    ranks = f"ranks (medians over matrices, whose shorter side has {np.median(sides):.0f})" if sides else "ranks"
    caption = (
        f"Each expert's delta: its norm relative to the base, {ranks}, the shares of its energy in "
        "the base's leading, lesser and null input directions, and the share of opposite signs with the others"
    )
    return Table(caption, ["expert", *known], rows)


def _layers(merge: Merge) -> Iterable[Section]:
    """The pictures, of the merged model too if it was measured."""
    numbers = merge.measured or (merge.diagnosis.tensors if merge.diagnosis else {})
    parts = layers.sections(numbers, merge.experts, merged=merge.measured is not None)
    return [Section("Layer by layer", (), parts)] if parts else []


def _tensors(merge: Merge) -> list[Block]:
    """Counts by kind and method, and all tensors: in one table, or folded by layer if they are many."""
    counts = Table(
        "How many tensors of each kind are made by which method", ["kind", "method", "tensors"],
        [[kind, f"`{what}`", f"{count:,}"] for kind, what, count in merge.counts], left=2,
    )  # fmt: skip
    if not merge.tensors:
        return [counts]
    numbers = merge.measured or (merge.diagnosis.tensors if merge.diagnosis else {})
    if len(merge.tensors) <= TOGETHER:
        table = _table(f"All {len(merge.tensors)} tensors", merge.tensors, numbers, merge.measured is not None)
        return [counts, Fold(table.caption, [table])]
    folds: list[Block] = []
    for title, members in itertools.groupby(merge.tensors, lambda one: _layer(one.name)):
        rows = list(members)
        folds.append(Fold(f"{title} ({len(rows)})", [_table(title, rows, numbers, merge.measured is not None)]))
    return [counts, Fold(f"All {len(merge.tensors):,} tensors, by layer", folds)]


def _layer(name: str) -> str:
    place = named(name)
    return f"{place.stem}{place.layer}" if place else "outside the layers"


def _table(caption: str, tensors: Sequence[Tensor], numbers: Mapping[str, Measured], merged: bool) -> Table:
    """A row for each tensor: what it is, what makes it, and what was measured, as ranges over the experts."""
    head = ["tensor", "kind", "shape", "dtype", "method"]
    head += ["relative norm", "conflicts", *(["kept"] if merged else [])] if numbers else []
    rows = []
    for one in tensors:
        row = [one.name, one.kind, f" {TIMES} ".join(map(str, one.shape)) or "scalar", one.dtype, f"`{one.what}`"]
        rows.append([*row, *(_numbers(numbers.get(one.name), merged) if numbers else [])])
    return Table(caption, head, rows, left=5)


def _numbers(one: Measured | None, merged: bool) -> list[str]:
    if one is None:
        return [""] * (3 if merged else 2)
    experts = slice(None, -1) if merged else slice(None)
    norms = depth.relative_norms([one])[experts]
    conflicts = depth.with_others(one.conflicts[experts, experts])
    return [_range(norms), _range(conflicts), *([_range(depth.kept([one]))] if merged else [])]


def _range(values: Any) -> str:
    """The least and the largest."""
    found = [float(value) for value in np.ravel(values) if math.isfinite(value)]
    if not found:
        return ""
    low, high = number(min(found), 2), number(max(found), 2)
    return low if low == high else f"{low} to {high}"
