"""Tables, plots and one JSON file of a run's numbers, from the folder that keeps them.

folder/rows/<zoo>-<seed>.json, linear.json      what `compare` and `linear` found
folder/results.json                             all of it, with means and intervals
folder/overview.md                              all zoos in one table
folder/<family>.md                              "vision", "text" (in full and LoRA), "convolutional", "linear"
folder/<zoo>-{tasks,experts,scale,proxies}.png  plots
folder/report.html                              all zoos as one page that needs no other file
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmerge_accuracy import results, tables
from cfmerge_accuracy.results import Line, Results, Row, Setting

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12
ALWAYS = ("ace", "task_arithmetic", "average")  # in the terminal's table, wherever they rank
SETTINGS: dict[Setting, str] = {
    "published": "At published defaults",
    "scaled": "With one scale, chosen on validation examples",
}


def write(folder: Path, pictures: bool = True) -> list[Path]:
    """Writes everything anew; returns the files. Without `pictures` neither plots nor the page are made.

    Raises:
        CfmergeError: `folder/rows` has no results, or ones that cannot be put together.
    """
    zoos, linear = results.read(folder)
    written = [_write(folder / "results.json", _json(_everything(zoos, linear)))]
    drawn: dict[str, dict[str, Path]] = {zoo.name: {} for zoo in zoos}
    if pictures:
        from cfmerge_accuracy import plots

        drawn = {zoo.name: plots.write(zoo, folder) for zoo in zoos}
        written += [path for each in drawn.values() for path in each.values()]
    for family in dict.fromkeys(zoo.family for zoo in zoos):
        members = [zoo for zoo in zoos if zoo.family == family]
        text = f"# {family.capitalize()}\n\n{_made_by(row for zoo in members for row in zoo.rows)}\n"
        text += "\n".join(_zoo(zoo, drawn[zoo.name]) for zoo in members)
        written.append(_write(folder / f"{family}.md", text))
    if linear is not None:
        written.append(_write(folder / "linear.md", _linear(linear)))
    written.append(_write(folder / "overview.md", _overview(zoos)))
    if pictures:
        from cfmerge.report.page.rendering import html
        from cfmerge_accuracy import page

        made_by = _made_by([*(row for zoo in zoos for row in zoo.rows), *([linear] if linear else [])])
        written.append(_write(folder / "report.html", html(page.page(zoos, linear, made_by))))
    return written


def summary(folder: Path, console: Console) -> None:
    """The best methods of each zoo, for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    zoos, _ = results.read(folder)
    for zoo in zoos:
        lines, scaled = zoo.lines("published"), {line.name: line for line in zoo.lines("scaled")}
        shown = [line for rank, line in enumerate(lines) if rank < SHOWN or line.method in ALWAYS]
        made = Table(title=f"{zoo.name}: normalised accuracy (experts: 100)", title_justify="left")
        for name in ("method", "data"):
            made.add_column(name)
        for name in ("published [95 %]", "scale chosen"):
            made.add_column(name, justify="right")
        for line in shown:
            chosen = tables.number(scaled[line.name].normalised.mean) if line.name in scaled else ""
            interval = escape(tables.spread(line.normalised))
            made.add_row(escape(line.name), line.data, interval, chosen, style="bold" if line.name == "ace" else None)
        made.add_section()
        for name in ("multitask", "ensemble", "base"):
            if values := zoo.reference(name):
                made.add_row(f"({name})", "", tables.number(results.mean_of(zoo.normalised(values))), "")
        console.print(made)
        if len(shown) < len(lines):
            console.print(f"{len(lines) - len(shown)} more methods: {folder / f'{zoo.family}.md'}", highlight=False)


def _overview(zoos: Sequence[Results]) -> str:
    text = "# Overview\n\nNormalised accuracy (each expert on its own task: 100), mean over tasks and seeds.\n\n"
    seeds = [f"{zoo.name}: {', '.join(map(str, zoo.seeds))}" for zoo in zoos]
    text += f"Seeds: {'; '.join(seeds)}. Intervals are in the zoos' own tables.\n\n"
    return text + "\n".join(f"## {title}\n\n{tables.overview(zoos, setting)}" for setting, title in SETTINGS.items())


def _zoo(zoo: Results, drawn: dict[str, Path]) -> str:
    """A family's section on one of its zoos."""
    lines = zoo.lines("published")
    text = f"## {zoo.name}\n\n{tables.protocol(zoo)}\n### References\n\n{tables.references(zoo)}\n"
    for setting in SETTINGS:
        text += _setting(zoo, zoo.lines(setting), setting)
        text += _picture(drawn, {"published": "tasks", "scaled": "scale"}[setting])
    sections = {
        "Number of experts": tables.counts(zoo) + _picture(drawn, "experts"),
        "Why: errors of layers' outputs": tables.excess(zoo, lines) + _picture(drawn, "proxies"),
        "Why: estimated against true input covariances": tables.covariances(zoo),
        "The same methods in other packages": tables.peers(zoo),
        "Failures and warnings": tables.failures(zoo),
    }
    return text + "".join(f"### {title}\n\n{body.strip()}\n\n" for title, body in sections.items() if body)


def _setting(zoo: Results, lines: Sequence[Line], setting: Setting) -> str:
    """The tables of one setting; the two are never mixed."""
    if not lines:
        return ""
    text = f"### {SETTINGS[setting]}\n\n{tables.methods(zoo, lines, setting)}\n"
    if setting == "scaled":
        text += "The merged delta is multiplied by the factor, one for the whole model, for each seed.\n\n"
    text += tables.folded("Paired differences", tables.differences(zoo, lines, setting))
    text += tables.folded("Accuracy by task", tables.by_task(zoo, lines, setting))
    order = tables.ordering(zoo, setting)
    return text + (f"\n#### Is the order the same on every seed?\n\n{order}\n" if order else "\n")


def _linear(linear: Row) -> str:
    text = f"# Linear testbed\n\n{_made_by([linear])}\n"
    text += (
        "Linear regression tasks with known input covariances. Excess risk of the merged layer: 0 is perfect, 1 is "
        "what a layer of zeros loses. The oracle is RegMean with the true covariances; the least of the others is "
        "bold. Mean over seeds ± standard deviation.\n\n"
    )
    text += tables.linear_risks(linear.get("regimes", {}))
    found = tables.linear_covariances(linear.get("covariances") or {})
    return text + (f"\n## Estimated against true covariances\n\n{found}" if found else "")


def _made_by(rows: Iterable[Row]) -> str:
    """The command, versions and machine; more than one line if rows come from different ones."""
    made = {json.dumps(row["environment"]): row["environment"] for row in rows if row.get("environment")}
    lines = []
    for environment in made.values():
        command = environment.get("command") or "cfmerge bench accuracy"
        rest = ", ".join(f"{key} {value}" for key, value in environment.items() if key not in ("command", "machine"))
        lines.append(f"Made by `{command}` with {rest} on {environment.get('machine', 'an unknown machine')}.\n")
    return "".join(lines) or "Made by `cfmerge bench accuracy`.\n"


def _picture(drawn: dict[str, Path], kind: str) -> str:
    return f"\n![{kind}]({drawn[kind].name})\n\n" if kind in drawn else ""


def _everything(zoos: Sequence[Results], linear: Row | None) -> dict[str, Any]:
    """What goes into results.json: the tables' numbers, then the rows that they were made of."""
    found: dict[str, Any] = {"zoos": {}}
    for zoo in zoos:
        made: dict[str, Any] = {"tasks": zoo.tasks, "seeds": zoo.seeds}
        made |= {setting: [_line(line) for line in zoo.lines(setting)] for setting in SETTINGS}
        found["zoos"][zoo.name] = made | {"rows": list(zoo.rows)}
    return found | ({"linear": linear} if linear is not None else {})


def _line(line: Line) -> dict[str, Any]:
    return dataclasses.asdict(line) | {"normalised": line.normalised._asdict()}


def _json(value: Any) -> str:
    """With six digits, and innermost objects on one line."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub(r"[{[][^][{}]*[]}]", lambda innermost: re.sub(r"\n *", " ", innermost[0]), text) + "\n"


def _plain(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
