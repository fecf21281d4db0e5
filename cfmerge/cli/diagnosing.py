"""`cfmerge diagnose`: what models tell before they are merged, in a terminal and as JSON."""

import itertools
import json as json_module
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cfmerge.cli import options as o
from cfmerge.cli import show
from cfmerge.cli.messages import out, say, tell
from cfmerge.recipe import Expert, Recipe

if TYPE_CHECKING:
    from cfmerge.diagnosis import Diagnosis, Measured, Recommendation

EXAMPLES = (
    "cfmerge diagnose BASE EXPERT EXPERT",
    "cfmerge diagnose --base BASE -e code=PATH -e math=PATH --json",
    "cfmerge diagnose recipe.yaml --largest 1024",
)
STYLES = {"grave": "bold red", "warning": "bold yellow", "fact": "bold"}
LEGEND = (
    "length: of deltas over the base's. energy: share of all experts' squares. changed: tensors. cosine: of deltas. "
    "signs: opposite ones, by chance 50 %. rank: above rounding. effective: how many directions share the energy. "
    "leading: energy in the directions that hold half of the base's. inputs, outputs: overlap of the experts' spaces. "
    "growth: of least squares, best below 2. By layers: medians"
)
NARROW = 100  # columns below which tensors are not counted
PAIRS = 10  # that are listed
GROUPS = 4  # of layers
OF_OUTPUTS = (
    "method", "parameters", "statistics", "allow", "seed", "dtype", "format", "shard_size", "side_files", "adapter_out",
    "chat_template", "unmerged",
)  # fmt: skip


@o.takes_recipe(*OF_OUTPUTS, models=True)
def diagnose(
    asked: Recipe,
    file: Path | None,
    *,
    largest: Annotated[int, o.option("--largest", metavar="SIDE", help="Decompose matrices up to it (4096).")] = 4096,
    memory: o.Memory = None,
    no_compile_cache: o.NoCompileCache = False,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Tell what a base and experts are, and which method fits them."""
    from cfmerge.engine.placement import placement_of
    from cfmerge.planning.work import silent
    from cfmerge.products.diagnose import bytes_measured, diagnosed, planned_to_diagnose

    where = placement_of(devices)
    planned = planned_to_diagnose(asked)
    with show.progress(bytes_measured(planned), json=False, quiet=quiet or json, what="diagnosing") as progress:
        found = diagnosed(planned, largest, memory, where, progress or silent)
    command = to_paste(asked, file, found)
    if json:
        print(json_module.dumps({**found.to_json(), "command": command}, indent=2))
        return
    console = out()
    if not quiet:
        console.print(f"base    {escape(found.base)}", soft_wrap=True)
        for table in (of_experts(found), of_groups(found, console.width), of_pairs(found)):
            if table.row_count:
                console.print(table)
        say(console, LEGEND, "dim")
    for one in found.findings:
        tell(console, one.severity, one.text, STYLES[one.severity])
    if not found.findings:
        say(console, "nothing unusual was found", "bold")
    show.notes(found.notes)
    _recommend(console, found.recommendation, command)
    own = {field for field in Recipe.__struct_fields__ if getattr(asked, field) != getattr(Recipe(""), field)}
    others = sorted(own - {"base", "experts", "method", "parameters"})
    if command and others and not command.startswith(f"cfmerge merge {file}"):
        say(console, f"and the options as here: {', '.join(map(o.option_of, others))}")


def _recommend(console: Console, one: "Recommendation", command: str) -> None:
    tell(
        console, "recommendation", f"{one.method or 'no merge'}: {one.reason.removeprefix('no merge: ')}", "bold green"
    )
    if one.evidence:
        say(console, one.evidence)
    if command:
        console.print(escape(command), soft_wrap=True)


def to_paste(asked: Recipe, file: Path | None, found: "Diagnosis") -> str:
    """The command that merges as is recommended; empty where no merge is, or where options cannot say its experts."""
    told, specs = found.recommendation, asked.resolved_experts(1)
    listed = file is None or bool(told.without)
    plain = all(one == Expert(one.path, name=one.name, weight=one.weight) for one in specs)
    if not told.method or (listed and not plain):
        return ""
    words = ["cfmerge", "merge"]
    if not listed:
        words.append(str(file))
    else:
        words += ["--base", asked.base]
        for given, expert in zip(asked.experts, specs, strict=True):
            if expert.name not in told.without:
                named = expert.path if isinstance(given, str) or not given.name else f"{expert.name}={expert.path}"
                words += ["-e", named if expert.weight == 1 else f"{named}@{expert.weight}"]
    return " ".join([shlex.join([*words, "-m", told.method]), "-o OUT"])


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """A table of numbers; columns whose name begins with a blank are of words."""
    made = [Column(name.strip(), justify="left" if name.startswith(" ") else "right", no_wrap=True) for name in columns]
    return Table(*made, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def of_experts(found: "Diagnosis") -> Table:
    """A row for each expert: length over the base's, share of the energy, ranks, share in leading directions."""
    from cfmerge.diagnosis.reading import Reading

    read = Reading(found.experts, found.tensors)
    energy = max(float(np.sum(read.norms**2)), np.finfo(float).tiny)
    table = _table(" expert", "length", "energy", "changed", "rank", "effective", "leading")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for t, name in enumerate(found.experts):
        own = [one for _, one in read.changed(t)]
        changed = sum(bool(one.norms[t] > 0) for one in found.tensors.values())
        table.add_row(
            escape(name),
            f"{read.norms[t] / read.base_norm:.2g}" if read.base_norm else "",
            f"{read.norms[t] ** 2 / energy:.0%}",
            f"{changed}/{len(found.tensors)}",
            _ranks(own, t),
            _number([_at(one.effective_ranks, t) for one in own], ".1f"),
            _number([_at(one.leading, t) for one in own], ".0%"),
        )
    return table


def of_groups(found: "Diagnosis", width: int = NARROW) -> Table:
    """A row for each kind and group of layers, of medians; growth is the largest."""
    counted = ["tensors"] if width >= NARROW else []
    table = _table(" kind", " layers", *counted, "length", "cosine", "signs", "rank", "inputs", "outputs", "growth")
    for kind, layers, group in groups(found.tensors):
        table.add_row(
            kind,
            layers,
            *([str(len(group))] if counted else []),
            _number([_length(one) for one in group], ".2g"),
            _number([_of_pairs(one, _cosines(one)) for one in group], ".2f"),
            _number([_of_pairs(one, one.conflicts) for one in group], ".0%"),
            _ranks(group),
            _number([_of_pairs(one, one.rows) for one in group], ".2f"),
            _number([_of_pairs(one, one.columns) for one in group], ".2f"),
            _number([one.growth for one in group], ".1f", np.max),
        )
    return table


def groups(tensors: "Mapping[str, Measured]") -> Iterator[tuple[str, str, "list[Measured]"]]:
    """`(kind, layers, tensors)`: of each kind at most so many runs of layers, and those outside the layers."""
    for kind in dict.fromkeys(one.kind for one in tensors.values()):
        own = [one for one in tensors.values() if one.kind == kind]
        outside = [one for one in own if one.layer is None]
        if outside:
            yield kind, "-", outside
        numbers = sorted({one.layer for one in own if one.layer is not None})
        for run in np.array_split(numbers, min(GROUPS, len(numbers))) if numbers else ():
            first, last = int(run[0]), int(run[-1])
            told = str(first) if first == last else f"{first}-{last}"
            yield kind, told, [one for one in own if one.layer is not None and first <= one.layer <= last]


def of_pairs(found: "Diagnosis") -> Table:
    """A row for each pair of experts, those with the largest cosines first."""
    from cfmerge.diagnosis.reading import Reading

    read = Reading(found.experts, found.tensors)
    pairs = sorted(read.pairs(), key=lambda pair: -abs(read.cosines[pair]))
    table = _table(" experts", "cosine", "signs", "inputs", "outputs")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for s, t in pairs[:PAIRS]:
        both = [one for _, one in read.changed(s, t)]
        table.add_row(
            escape(f"{found.experts[s]}, {found.experts[t]}"),
            f"{read.cosines[s, t]:.2f}",
            f"{read.conflicts[s, t]:.0%}",
            _number([_at(one.rows, (s, t)) for one in both], ".2f"),
            _number([_at(one.columns, (s, t)) for one in both], ".2f"),
        )
    if len(pairs) > PAIRS:
        table.add_row(f"and {len(pairs) - PAIRS} more pairs", "", "", "", "")
    return table


def _number(values: Sequence[float | None], form: str, join: Callable[..., Any] = np.median) -> str:
    """The median of those values that are known; empty where none is."""
    known = [value for value in values if value is not None]
    return (f"{join(known):{form}}" if known else "").replace("-0.00", "0.00")


def _at(values: Any, place: Any) -> float | None:
    return None if values is None else float(values[place])


def _ranks(group: "Sequence[Measured]", t: int | None = None) -> str:
    """The median rank of one expert's deltas, or of all that are not zero, and the median of the shorter sides."""
    own = [(one.ranks, min(one.sides)) for one in group if one.ranks is not None and one.sides is not None]
    ranks = [float(np.median(ranks[ranks > 0])) if t is None else float(ranks[t]) for ranks, _ in own if ranks.any()]
    return f"{np.median(ranks):.0f}/{np.median([side for _, side in own]):.0f}" if ranks else ""


def _length(one: "Measured") -> float | None:
    changed = one.norms[one.norms > 0]
    return float(np.median(changed)) / one.base_norm if one.base_norm and len(changed) else None


def _cosines(one: "Measured") -> np.ndarray:
    from cfmerge.diagnosis.reading import ratio

    return ratio(one.gram, np.outer(one.norms, one.norms))


def _of_pairs(one: "Measured", values: Any) -> float | None:
    """The mean over pairs of experts that both changed the tensor."""
    changed = [t for t, norm in enumerate(one.norms) if norm > 0]
    pairs = [] if values is None else list(itertools.combinations(changed, 2))
    return float(np.mean([values[pair] for pair in pairs])) if pairs else None
