"""The results of a run as one page of HTML: the tables of the Markdown report, with bars, intervals and curves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from cfmerge.report.card_reading import cells
from cfmerge.report.page import plots as drawn
from cfmerge.report.page.blocks import (
    Block,
    Cell,
    Figure,
    Fold,
    Heat,
    Interval,
    Items,
    Notice,
    Page,
    Panel,
    Prose,
    Section,
    Table,
)
from cfmerge_accuracy import plots, tables
from cfmerge_accuracy.results import Line, Results, Row, Setting, over_seeds

SHOWN = 12
ALWAYS = {"ace", "task_arithmetic", "average"}  # in the first table, wherever they rank
TITLES: dict[Setting, str] = {
    "published": "Methods at published defaults",
    "scaled": "Methods with one scale, chosen on validation examples",
}


def page(zoos: Sequence[Results], linear: Row | None, made_by: str) -> Page:
    """The page of a run; `made_by`: the command, versions and machine, in Markdown."""
    sections = [Section("Overview", _overview(zoos, made_by))] if zoos else []
    sections += [_zoo(zoo, place) for place, zoo in enumerate(zoos)]
    if linear is not None:
        sections.append(Section("Linear testbed", _linear(linear)))
    seeds = sorted({seed for zoo in zoos for seed in zoo.seeds})
    lead = f"{len(zoos)} zoo{'s' if len(zoos) != 1 else ''} of experts, seeds {', '.join(map(str, seeds))}"
    return Page("Accuracy benchmark", "Does merging work?", lead, sections, "Made by `cfmerge bench accuracy`.")


def blocks_of(text: str) -> list[Block]:
    """Markdown as `tables` writes it, as blocks: tables, items, folded parts, paragraphs."""
    blocks: list[Block] = []
    folded = re.split(r"<details><summary>(.*?)</summary>\n(.*?)</details>", text, flags=re.DOTALL)
    for place, part in enumerate(folded):
        if place % 3 == 2:
            blocks.append(Fold(folded[place - 1], blocks_of(part)))
        elif place % 3 == 0:
            blocks += [_block(each) for each in re.split(r"\n\s*\n", part.strip()) if each.strip()]
    return blocks


def _block(text: str) -> Block:
    if text.startswith("- "):
        return Items([line.removeprefix("- ") for line in text.splitlines()])
    if not text.startswith("|"):
        return Prose(text)
    head, rule, *rows = map(cells, text.splitlines())
    left = next((place for place, cell in enumerate(rule) if cell.endswith(":")), len(rule))
    return Table("", head, rows, left=max(left, 1))


def _captioned(blocks: Iterable[Block], caption: str) -> list[Block]:
    """The blocks, in which tables without a caption have this one."""
    made: list[Block] = []
    for block in blocks:
        if isinstance(block, Table):
            block = Table(block.caption or caption, block.head, block.rows, block.left, block.folded)
        elif isinstance(block, Fold):
            block = Fold(block.title, _captioned(block.blocks, block.title))
        made.append(block)
    return made


def _overview(zoos: Sequence[Results], made_by: str) -> list[Block]:
    """What was run, and all methods in all zoos."""
    blocks: list[Block] = []
    if any(row.get("quick") for zoo in zoos for row in zoo.rows):
        blocks.append(Notice("warning", "A quick run: a test of the suite, not of the methods.", "Quick."))
    blocks.append(Prose(
        "Normalised accuracy: each expert on its own task is 100. Means over tasks and seeds; intervals stand in the "
        "tables of the zoos."
    ))  # fmt: skip
    for setting, title in TITLES.items():
        blocks += _of_all_zoos(zoos, setting, title)
    made: list[Block] = [Prose(line) for line in made_by.strip().splitlines() if line]
    return [*blocks, *(made if len(made) < 3 else [Fold(f"Made by {len(made)} runs", made)])]


def _of_all_zoos(zoos: Sequence[Results], setting: Setting, title: str) -> list[Block]:
    """The best methods in all zoos, and all of them on a click; of scaled ones the latter alone."""
    table = next((block for block in blocks_of(tables.overview(zoos, setting)) if isinstance(block, Table)), None)
    if table is None:
        return []
    rows = [[row[0], *map(_heat, row[1:])] for row in table.rows]
    best = [row for rank, row in enumerate(rows) if rank < SHOWN or row[0] in ALWAYS]
    head, caption = [table.head[0], "mean", *table.head[2:]], f"{title}: normalised accuracy, {table.head[1]}"
    whole = Table(f"All {len(rows)} {title[0].lower()}{title[1:]}", head, rows, folded=True)
    return [Table(caption, head, best), whole] if setting == "published" else [whole]


def _heat(text: str | Cell) -> Cell:
    """A normalised accuracy in per cent, coloured from 40 to 100."""
    try:
        value = float(str(text))
    except ValueError:
        return str(text)
    return Heat(str(text), min(max((value - 40) / 60, 0.0), 1.0))


def _zoo(zoo: Results, place: int) -> Section:
    """A zoo: protocol, references, methods, curves, and why."""
    lines = zoo.lines("published")
    parts = {
        "References": tables.references(zoo),
        "Errors of layers' outputs": tables.excess(zoo, lines),
        "Estimated against true input covariances": tables.covariances(zoo),
        "The same methods in other packages": tables.peers(zoo),
    }
    sections = [
        Section(title, _captioned(blocks_of(text), f"{zoo.name}: {title}")) for title, text in parts.items() if text
    ]
    if failures := tables.failures(zoo):
        items = blocks_of(failures)
        count = sum(len(one.texts) for one in items if isinstance(one, Items))
        sections.append(Section("Failures and warnings", [Fold(f"{count} of them", items)]))
    methods = [_methods(zoo, setting) for setting in TITLES if zoo.lines(setting)]
    curves = _curves(zoo, place)
    return Section(zoo.name, blocks_of(tables.protocol(zoo)), [*methods, *curves, *sections])


def _methods(zoo: Results, setting: Setting) -> Section:
    """The best methods with their intervals; all of them, their differences and tasks on a click."""
    lines = zoo.lines(setting)
    best = [line for rank, line in enumerate(lines) if rank < SHOWN or line.method in ALWAYS]
    title = f"{TITLES[setting]}, {zoo.name}"
    blocks: list[Block] = [_intervals(f"{title}: normalised accuracy with its 95 % interval", best, best)]
    if len(best) < len(lines):
        blocks.append(Fold(f"All {len(lines)} methods", [_intervals(f"All {len(lines)} methods", lines, best)]))
    values = {name: over_seeds(each) for name, each in zoo.all_normalised(setting).items()}
    every = [[line.name, *(_heat(tables.number(values[line.name].get(task))) for task in zoo.tasks)] for line in lines]
    blocks.append(Table("Normalised accuracy by task", ["method", *zoo.tasks], every, folded=True))
    blocks.append(Fold("Accuracy by task, in per cent of the examples",
                       _captioned(blocks_of(tables.by_task(zoo, lines, setting)), "Accuracy by task")))  # fmt: skip
    for name, text in {
        "Paired differences": tables.differences(zoo, lines, setting),
        "Is the order the same on every seed?": tables.ordering(zoo, setting),
    }.items():
        if text:
            blocks.append(Fold(name, _captioned(blocks_of(text), name)))
    return Section(TITLES[setting], blocks)


def _intervals(caption: str, lines: Sequence[Line], scale: Sequence[Line]) -> Table:
    """The table of methods; the dots and intervals of all its rows lie on one scale, that of `scale`."""
    means = [line.normalised.mean for line in scale if math.isfinite(line.normalised.mean)]
    low, high = 10 * math.floor(min(means, default=0) / 10) - 10, max([100.0, *means])

    def at(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0)

    rows: list[list[Cell]] = []
    for line in lines:
        found = line.normalised
        known = math.isfinite(found.low) and math.isfinite(found.high)
        ends = (at(found.low), at(found.high)) if known else (None, None)
        extremes = (f"{task} {value:.1f}" for task, value in (line.best, line.worst))
        factors = [" / ".join(f"{factor:g}" for factor in line.factors)] if line.factors else []
        rows.append(
            [
                line.name,
                Interval(tables.spread(found), at(found.mean), *ends),
                line.group,
                line.data,
                *factors,
                *extremes,
            ]
        )
    head = ["method", f"normalised [95 %], from {low:g} to {high:g}", "group", "data"]
    head += ["factor"] if any(line.factors for line in lines) else []
    return Table(caption, [*head, "best task", "worst task"], rows, left=len(head) + 2)


def _curves(zoo: Results, place: int) -> list[Section]:
    """Accuracy by the number of experts and by the scale of the merged delta."""
    found: Mapping[str, tuple[str, plots.Curves, bool]] = {
        "By number of experts": ("experts merged", plots.curves_of_experts(zoo), False),
        "By scale of the merged delta": ("factor of the merged delta", plots.curves_of_scale(zoo), True),
    }
    sections = []
    for number, (title, (label, curves, logarithmic)) in enumerate(found.items()):
        known = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if known:
            figure = _figure(f"{zoo.name}: {title.lower()}", label, known, f"zoo-{place}-{number}", logarithmic)
            sections.append(Section(title, [figure]))
    return sections


def _figure(title: str, label: str, curves: plots.Curves, key: str, logarithmic: bool) -> Figure:
    places = sorted({x for curve in curves.values() for x in curve})
    series = {
        name: (number, sorted(curve), [curve[x] for x in sorted(curve)])
        for number, (name, curve) in enumerate(curves.items())
    }
    panel: Panel = drawn.lines(
        title, series, key=key, x=label, ticks=places if logarithmic else None, at=100.0, from_zero=False
    )  # fmt: skip
    rows = [[name, *(tables.number(curve.get(x)) for x in places)] for name, curve in curves.items()]
    table = Table(f"{title}, in numbers", [label, *(f"{x:g}" for x in places)], rows, folded=True)
    on = "validation examples, each with one factor for the whole model" if logarithmic else "test examples"
    caption = f"Normalised accuracy on {on}; the experts are at 100 (dashed)."
    return Figure(caption, [panel], [(name, number) for name, (number, _, _) in series.items()], table)


def _linear(linear: Row) -> list[Block]:
    blocks: list[Block] = [Prose(
        "Linear regression tasks with known input covariances. Excess risk of the merged layer: 0 is perfect, 1 is "
        "what a layer of zeros loses. The oracle is RegMean with the true covariances. Mean over seeds ± standard "
        "deviation."
    )]  # fmt: skip
    blocks += _captioned(blocks_of(tables.linear_risks(linear.get("regimes", {}))), "Excess risk by regime")
    found = tables.linear_covariances(linear.get("covariances") or {})
    return blocks + _captioned(blocks_of(found), "Estimated against true covariances")
