"""The picture of a report: the metrics over the steps, and under it the scores of each task at each step."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.temporal.report import NO_NUMBER, Report

METRICS = {  # label, colour (Okabe and Ito), marker, width
    "geometric_mean": ("geometric mean", "#000000", "D", 2.4),
    "knowledge_accumulation": ("knowledge accumulation", "#0072b2", "o", 1.6),
    "zero_shot_retention": ("zero-shot retention", "#d55e00", "s", 1.6),
}
SUBTITLE = ("setting", "init", "deploy", "technique")  # of what a report is about
GREY, TRAINED = "#555555", "#d55e00"
DPI = 150
CROWDED = 4  # more steps than this that train one task are marked by corners in place of outlines
GAP = 0.7  # between adaptation and held-out tasks, in rows
LETTER = 0.078  # inches, of a letter of 9 points on average
WIDEST, TALLEST = 20.0, 32.0  # inches, of the matrix
CURVES, RIGHT, TOP, LEGEND = 2.3, 2.25, 0.8, 0.6  # inches


def draw(report: Report, file: Path) -> None:
    """Writes the figure of a report; names are drawn as they are written, in them `$` begins no formula."""
    from matplotlib import rc_context

    with warnings.catch_warnings(), rc_context({"text.parse_math": False}):
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box stands for it; report.md has it
        picture(report).savefig(file)


def picture(report: Report) -> Any:
    """The figure of a report: metrics above, scores by task and step under them, on one axis of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(report.order) + 1
    names = [_short(name, 18) for name in ("base", *report.order)]
    count = max(len(report.tasks) + len(report.held_out), 1)
    step = min(max(0.72, 5.2 / columns), 1.2) if columns <= 14 else min(0.46, WIDEST / columns)  # inches, as all below
    row = 0.32 if count <= 16 else min(0.23, TALLEST / count)
    rows = row * (count + (GAP if report.held_out else 0))
    tilted = max(map(len, names)) * LETTER > step - 0.05
    left = 0.75 + LETTER * max(len(_short(task)) for task in (*report.tasks, *report.held_out, "." * 10))
    below = LEGEND + (LETTER * max(map(len, names)) if tilted else 0.25)
    width, height = left + columns * step + RIGHT, TOP + CURVES + 0.55 + rows + below
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)

    def panel(start: float, bottom: float, wide: float, tall: float) -> Any:
        return figure.add_axes((start / width, bottom / height, wide / width, tall / height))

    draw_curves(panel(left, height - TOP - CURVES, columns * step, CURVES), report)
    matrix = panel(left, below, columns * step, rows)
    mesh = draw_matrix(matrix, report, 0 if min(step / 0.4, row / 0.2) < 1 else 8.5 if step > 0.6 else 7)
    every = math.ceil(0.16 / step)  # names that fit beside each other
    matrix.set_xticks(range(columns)[::every], names[::every], fontsize=9, rotation=90 if tilted else 0)
    if report.scored:
        tall = min(rows - 0.2, 2.6)
        _colour_bar(figure, panel(width - RIGHT + 0.3, below + rows - tall - 0.2, 0.14, tall), mesh)
    _legend(figure, left / width, 0.14 / height, TRAINED if crowded(report) else "none")
    figure.text(0.2 / width, 1 - 0.34 / height, "Merging over time", fontsize=13, weight="bold")
    subtitle = textwrap.shorten(_subtitle(report), int(width / LETTER), placeholder=" …")
    figure.text(0.2 / width, 1 - 0.58 / height, subtitle, fontsize=9.5, color=GREY)
    return figure


def draw_curves(axes: Any, report: Report) -> None:
    """Draws knowledge accumulation, zero-shot retention and their geometric mean over the steps."""
    steps = np.arange(len(report.rows))
    ends: list[tuple[float, str, str]] = []
    for metric, (label, colour, marker, width) in METRICS.items():
        values = np.array([_nan(getattr(row, metric)) for row in report.rows])
        told = values[np.isfinite(values)]
        if told.size:
            style = {"color": colour, "marker": marker, "markersize": 5, "markeredgecolor": "white"}
            axes.plot(steps, values, linewidth=width, zorder=3 if width > 2 else 2, **style)  # with gaps
            ends.append((told[-1], f"{label} {report.shown(told[-1])}", colour))
    axes.set_xlim(-0.5, len(steps) - 0.5)
    every = math.ceil(len(steps) / 45)
    axes.set_xticks(steps[::every], [str(step) for step in steps[::every]], fontsize=9)
    axes.set_xlabel("step", fontsize=9, color=GREY, labelpad=1)
    axes.tick_params(length=0, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(y=0.12)
    if not ends:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no step has all scores", transform=axes.transAxes, ha="center", color=GREY)
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names the curves at their right ends, at least a line of text apart."""
    low, high = axes.get_ylim()
    apart, above = (high - low) * 0.105, -math.inf
    for value, label, colour in sorted(ends):
        above = max(value, above + apart)
        place = (axes.get_xlim()[1], above)
        weight = "bold" if colour == "#000000" else "normal"
        axes.text(*place, f" {label}", color=colour, fontsize=9, va="center", weight=weight, clip_on=False)


def draw_matrix(axes: Any, report: Report, size: float) -> Any:
    """Draws the scores, a row for each task, held-out tasks below; returns what a colour bar is made from.

    `size` is the numbers' size in points; 0: no numbers.
    """
    every = [score for scores in report.history.values() for score in scores.values()]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    high = high if high > low else low + 1
    groups = {"adaptation": report.sorted_tasks(), "held out": report.held_out}
    start, ticks, mesh = 0.0, dict[str, float](), None
    for called, tasks in groups.items():
        if not tasks:
            continue
        mesh = _draw_rows(axes, report, tasks, start, (low, high), size)
        ticks |= {task: start + row for row, task in enumerate(tasks)}
        axes.annotate(
            called, (0, start + (len(tasks) - 1) / 2), (-_margin(report), 0), ("axes fraction", "data"),
            "offset points", rotation=90, ha="center", va="center", fontsize=9, color=GREY,
        )  # fmt: skip
        start += len(tasks) + GAP
    axes.set_xlim(-0.5, len(report.order) + 0.5)
    axes.set_ylim(start - GAP - 0.5, -0.5)
    shown = math.ceil(max(len(ticks), 1) / (TALLEST / 0.15))
    axes.set_yticks([*ticks.values()][::shown], [_short(task) for task in ticks][::shown], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _draw_rows(
    axes: Any, report: Report, tasks: Sequence[str], start: float, bounds: tuple[float, float], size: float
) -> Any:
    """Draws some tasks' rows from `start` on: coloured cells, their numbers, and what a step has to do with a task."""
    from matplotlib import colormaps

    columns = range(len(report.order) + 1)
    scores = np.array([[_nan(report.history.get(step, {}).get(task)) for step in columns] for task in tasks])
    edges = np.arange(len(columns) + 1) - 0.5, start + np.arange(len(tasks) + 1) - 0.5
    colours = colormaps["cividis"].with_extremes(bad="#f0f0f0")
    style = {"cmap": colours, "vmin": bounds[0], "vmax": bounds[1], "edgecolors": "white", "linewidth": 0.8}
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(scores), **style)
    mark = _corner if crowded(report) else _outline
    for row, task in enumerate(tasks):
        if task not in report.held_out:
            _hatch(axes, np.isnan(scores[row, : report.first_step(task)]), start + row)
        for step in report.steps_of[task]:
            mark(axes, step, start + row)
    if size:
        _write_numbers(axes, scores, mesh.to_rgba(np.ma.masked_invalid(scores)), start, size, report.is_fraction)
    return mesh


def _write_numbers(axes: Any, scores: Any, fills: Any, start: float, size: float, fraction: bool) -> None:
    """Writes each score into its cell, in black or white, with a rim of the cell's colour."""
    from matplotlib.patheffects import withStroke

    for (row, step), score in np.ndenumerate(scores):
        fill = fills[row, step]
        text = NO_NUMBER if math.isnan(score) else f"{score:.{2 if fraction else 1}f}"
        ink = "black" if _lightness(fill) > 0.45 else "white"
        label = axes.text(step, start + row, text, ha="center", va="center", fontsize=size, color=ink)
        label.set_path_effects([withStroke(linewidth=2, foreground=fill)])


def crowded(report: Report) -> bool:
    """Whether some task is trained by so many steps that outlines would fill the picture."""
    return max(map(len, report.steps_of.values()), default=0) > CROWDED


def _hatch(axes: Any, lacking: Any, row: float) -> None:
    """Hatches a row's cells from the left, in another colour where the score is lacking."""
    column = 0
    for lacks, cells in itertools.groupby(lacking.tolist()):
        count = len(list(cells))
        _frame(axes, column, row, 0, wide=count, hatch="////", edgecolor=(GREY if lacks else "white", 0.45), lw=0)
        column += count


def _outline(axes: Any, column: float, row: float) -> None:
    _frame(axes, column, row, 0.05, edgecolor="white", lw=3.2)
    _frame(axes, column, row, 0.05, edgecolor=TRAINED, lw=1.8)


def _corner(axes: Any, column: float, row: float) -> None:
    from matplotlib.patches import Polygon

    left, top = column - 0.5, row - 0.5
    corner = [(left, top), (left + 0.2, top), (left, top + 0.4)]
    axes.add_patch(Polygon(corner, facecolor=TRAINED, edgecolor="white", lw=0.6))


def _frame(axes: Any, column: float, row: float, within: float, *, wide: int = 1, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.5 + within, row - 0.5 + within)
    axes.add_patch(Rectangle(corner, wide - 2 * within, 1 - 2 * within, fill=False, **style))


def _colour_bar(figure: Any, axes: Any, mesh: Any) -> None:
    figure.colorbar(mesh, cax=axes).outline.set_visible(False)
    axes.set_title("score", fontsize=9, color=GREY, loc="left")
    axes.tick_params(length=0, labelsize=8.5, labelcolor=GREY)


def _legend(figure: Any, left: float, bottom: float, fill: str) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=fill, edgecolor=TRAINED, linewidth=1.8, label="a step that trained the task"),
        Patch(facecolor="#dddddd", edgecolor="#888888", hatch="////", linewidth=0, label="not trained yet"),
    ]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(left, bottom), ncols=2, frameon=False, fontsize=9,
        borderpad=0, borderaxespad=0, columnspacing=1.6, handlelength=1.4,
    )  # fmt: skip


def _subtitle(report: Report) -> str:
    told = {name: value for name, value in report.about.items() if name in SUBTITLE}
    return ", ".join(f"{name} {value}" for name, value in told.items())


def _margin(report: Report) -> float:
    """How far left of the cells the names of the groups stand, in points."""
    return 72 * (0.38 + LETTER * max(len(_short(task)) for task in (*report.tasks, *report.held_out, "." * 10)))


def _lightness(colour: Sequence[float]) -> float:
    red, green, blue = (float(part) for part in colour[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _nan(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"
