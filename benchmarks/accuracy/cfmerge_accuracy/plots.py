"""The report's plots, as PNG: 1200 pixels wide, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cfmerge_accuracy import statistics
from cfmerge_accuracy.methods import CURVE
from cfmerge_accuracy.results import Results, mean_of, over_seeds

WIDTH, DPI = 10.0, 120
# Okabe and Ito (2008), without the yellow that is pale on white, and with a grey and a violet
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#7f7f7f", "#5e3c99", "#8c510a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
GREY = "#555555"
Curves = Mapping[str, Mapping[float, float]]  # by method, x -> y


def write(zoo: Results, folder: Path) -> dict[str, Path]:
    """Draws what there are numbers for; returns the files by kind: tasks, scale, experts, proxies."""
    drawings = {"tasks": tasks(zoo), "scale": scale(zoo), "experts": experts(zoo), "proxies": proxies(zoo)}
    return {kind: _save(figure, folder / f"{zoo.name}-{kind}.png") for kind, figure in drawings.items() if figure}


def tasks(zoo: Results) -> Any | None:
    """A heat map of normalised accuracy at published defaults: references, then methods, by task."""
    values = {f"({name})": zoo.normalised(zoo.reference(name)) for name in ("multitask", "ensemble", "base")}
    values = {name: each for name, each in values.items() if any(each.values())}
    above = len(values)
    methods = zoo.all_normalised("published")
    values |= {line.name: methods[line.name] for line in zoo.lines("published")}
    if len(values) == above:
        return None
    columns = [*zoo.tasks, "mean"]
    cells = np.full((len(values), len(columns)), np.nan)
    for row, each in enumerate(values.values()):
        by_task = over_seeds(each)
        cells[row] = [*(by_task.get(task, np.nan) for task in zoo.tasks), mean_of(each)]
    height = 1.5 + 0.25 * len(values)
    figure, axes = _figure(height, left=2.9, top=1.1, right=0.8)
    low = max(0.0, 10 * math.floor(float(np.nanpercentile(cells, 10)) / 10))
    shown = axes.imshow(cells, cmap="cividis", vmin=min(low, 90), vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if math.isfinite(value):
            colour = "white" if value < (min(low, 90) + 100) / 2 else "black"
            weight = "bold" if column == len(zoo.tasks) else "normal"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9, weight=weight)
    axes.set_xticks(range(len(columns)), [_short(name, 14) for name in columns], fontsize=10)
    axes.set_yticks(range(len(values)), [_short(name, 36) for name in values], fontsize=9.5)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    tilted = len(columns) > 4
    for label in axes.get_xticklabels():
        label.set(rotation=30 if tilted else 0, ha="left" if tilted else "center", rotation_mode="anchor")
    axes.axvline(len(zoo.tasks) - 0.5, color="white", linewidth=4)
    axes.axhline(above - 0.5, color="white", linewidth=4)
    axes.spines[:].set_visible(False)
    long = min(3.0, height - 1.4)
    bar = figure.add_axes((1 - 0.6 / WIDTH, 1 - (1.1 + long) / height, 0.15 / WIDTH, long / height))
    figure.colorbar(shown, cax=bar, extend="both").outline.set_visible(False)
    bar.tick_params(labelsize=9, length=0)
    _title(figure, height, f"{zoo.name}: normalised accuracy by task (expert: 100), at published defaults{_over(zoo)}")
    return figure


def experts(zoo: Results) -> Any | None:
    """Normalised accuracy against the number of experts merged."""
    title = f"{zoo.name}: normalised accuracy by number of experts, at published defaults{_over(zoo)}"
    return _curves(curves_of_experts(zoo), title, "experts merged")


def curves_of_experts(zoo: Results) -> Curves:
    """Normalised accuracy by the number of experts merged, of some methods."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for (name, count), value in zoo.over_rows("counts", ("name", "count"), "normalised").items():
        curves[name][count] = 100 * value
    return {name: curves[name] for name in _selected(zoo, curves)}


def scale(zoo: Results) -> Any | None:
    """Normalised accuracy on validation examples against the factor of the merged delta, of some methods."""
    title = f"{zoo.name}: normalised accuracy on validation examples, by scale{_over(zoo)}"
    label = "factor of the merged delta (1: as published)"
    return _curves(curves_of_scale(zoo), title, label, logarithmic=True)


def curves_of_scale(zoo: Results) -> Curves:
    """Normalised accuracy on validation examples by the factor of the merged delta, of some methods."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, entries in zoo.methods.items():
        for entry in entries.values():
            for factor, value in (entry.get("validation") or {}).items():
                found[name][float(factor)].append(100 * value)
    curves = {name: {x: float(np.mean(y)) for x, y in each.items()} for name, each in found.items()}
    return {name: curves[name] for name in _selected(zoo, curves)}


def _selected(zoo: Results, curves: Curves) -> list[str]:
    """The methods of `CURVE`, in its order, so that a method has one colour in all plots; all if there are none."""
    return [name for method in CURVE if (name := zoo.named(method)) and name in curves] or list(curves)


def proxies(zoo: Results) -> Any | None:
    """Normalised accuracy against the excess error of the layers' outputs, one point for each method."""
    lines = [line for line in zoo.lines("published") if zoo.excess(line.name) is not None]
    if len(lines) < 2:
        return None
    errors = np.maximum(np.array([zoo.excess(line.name) for line in lines], np.float64), 1e-3)  # for the logarithm
    accuracies = np.array([line.normalised.mean for line in lines])
    figure, axes = _figure(7.5)
    _axes(axes, "excess error of the layers' outputs (0: every expert's outputs are kept; 1: as bad as the base)")
    if errors.max() / errors.min() > 5:
        axes.set_xscale("log")
        _plain_ticks(axes, _round_steps(errors))
    groups = list(dict.fromkeys(line.group for line in sorted(lines, key=lambda line: line.group)))
    for index, group in enumerate(groups):
        chosen = [line.group == group for line in lines]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(errors[chosen], accuracies[chosen], s=36, label=group or "methods", **style)
    axes.margins(x=0.09, y=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(6, len(groups)), frameon=False, fontsize=10)
    known = {zoo.named(method) for method in CURVE}
    named = [n for n, line in enumerate(lines) if line.name in known or n < 3 or len(lines) <= 20]  # best first
    labels = [(_short(lines[n].name, 30), COLOURS[groups.index(lines[n].group) % len(COLOURS)]) for n in named]
    _label_points(figure, axes, np.stack([errors, accuracies], axis=1), named, labels)
    together = statistics.rank_correlation(list(errors), list(accuracies))
    told = f"; rank correlation {together:.2f}" if math.isfinite(together) else ""
    _title(figure, 7.5, f"{zoo.name}: normalised accuracy against layers' errors{told}{_over(zoo)}")
    return figure


def _curves(curves: Curves, title: str, label: str, logarithmic: bool = False) -> Any | None:
    """Lines that carry their names at their ends."""
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    names = list(curves)
    if len(names) > len(COLOURS):
        names = sorted(names, key=lambda name: -max(curves[name].values()))[: len(COLOURS)]
    figure, axes = _figure(5.6, right=2.7)
    _axes(axes, label)
    ticks = sorted({x for curve in curves.values() for x in curve})
    if logarithmic:
        axes.set_xscale("log")
    _plain_ticks(axes, ticks)
    ends = []
    for index, name in enumerate(names):
        x, y = zip(*sorted(curves[name].items()), strict=True)
        axes.plot(x, y, color=COLOURS[index], marker=MARKERS[index], markersize=6, linewidth=1.8)
        ends.append((x[-1], y[-1], _short(name, 30), COLOURS[index]))
    low, high = axes.get_ylim()
    places = _apart([y for _, y, _, _ in ends], 0.045 * (high - low))
    for place, (*end, name, colour) in zip(places, ends, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        beyond = axes.transAxes + axes.transData.inverted()
        right = beyond.transform((1.03, 0))[0]
        axes.annotate(
            name, end, (right, place), va="center", color=colour, fontsize=10, arrowprops=line, annotation_clip=False
        )
    _title(figure, 5.6, title)
    return figure


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The nearest places, in the same order, that are at least `gap` apart (in the mean square: pooled neighbours)."""
    order = np.argsort(values, kind="stable")
    blocks: list[list[float]] = []  # each a run of labels that touch: their targets, less their offsets in the run
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    shifted = [float(np.mean(block)) for block in blocks for _ in block]
    places = dict(zip(order, (start + rank * gap for rank, start in enumerate(shifted)), strict=True))
    return [places[index] for index in range(len(values))]


def _label_points(
    figure: Any, axes: Any, points: Float[np.ndarray, "N 2"], named: Sequence[int], labels: Sequence[tuple[str, str]]
) -> None:
    """Names beside some points, each at the nearest place where it covers nothing; with a line where that is far."""
    figure.canvas.draw()
    pixels = axes.transData.transform(points)
    frame = axes.get_window_extent().extents
    taken = np.concatenate([pixels - 6, pixels + 6], axis=1)  # left, bottom, right, top
    for index, (name, colour) in zip(named, labels, strict=True):
        x, y = pixels[index]
        label = axes.annotate(name, points[index], (0, 0), textcoords="offset pixels", fontsize=8.5, color=colour)
        extent = label.get_window_extent()
        choices = _boxes(x, y, extent.width + 2, extent.height + 2)
        inside = choices[np.all(choices[:, :2] > frame[:2], axis=1) & np.all(choices[:, 2:] < frame[2:], axis=1)]
        choices = inside if len(inside) else choices
        left, bottom, right, top = chosen = choices[np.argmin(_overlaps(choices, np.delete(taken, index, axis=0)))]
        label.set_position((left - x, bottom - y))
        taken = np.concatenate([taken, chosen[None]])
        near = (np.clip(x, left, right), np.clip(y, bottom, top))
        if math.dist(near, (x, y)) > 12:
            ends = axes.transData.inverted().transform([near, (x, y)])
            axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.6, scalex=False, scaley=False)


def _boxes(x: float, y: float, width: float, height: float) -> Float[np.ndarray, "C 4"]:
    """Places for a label around a point, the nearest first: left, bottom, right, top, in pixels."""
    reach, angle = np.meshgrid((9, 20, 34, 52, 75, 100, 130), np.radians(np.arange(0, 360, 20)), indexing="ij")
    across, up = np.cos(angle).ravel(), np.sin(angle).ravel()
    left = x + across * reach.ravel() + (across - 1) / 2 * width
    bottom = y + up * reach.ravel() + (up - 1) / 2 * height
    return np.stack([left, bottom, left + width, bottom + height], axis=1)


def _overlaps(a: Float[np.ndarray, "C 4"], b: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "C"]:
    """How much of all boxes `b` each box of `a` covers."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.prod(np.maximum(sides, 0), axis=2).sum(axis=1)


def _figure(
    height: float, left: float = 0.8, top: float = 0.6, right: float = 0.3, bottom: float = 0.9
) -> tuple[Any, Any]:
    """A figure with one pair of axes; margins in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    bottom = 0.3 if top > 1 else bottom
    place = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes(place)


def _axes(axes: Any, label: str) -> None:
    axes.set_xlabel(label, fontsize=11, color=GREY)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=10)


def _plain_ticks(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _round_steps(values: Float[np.ndarray, "N"]) -> list[float]:
    """1, 2 and 5 times powers of ten, within the values' range."""
    decades = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    steps = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    steps = [step for step in steps if values.min() / 1.3 <= step <= values.max() * 1.3]
    return steps if len(steps) < 12 else [10.0**decade for decade in decades][:: 1 + len(decades) // 10]


def _title(figure: Any, height: float, text: str) -> None:
    size = 12 * min(1.0, 88 / len(text))
    figure.text(0.2 / WIDTH, 1 - 0.28 / height, text, fontsize=size, weight="bold", va="center")


def _over(zoo: Results) -> str:
    return "" if len(zoo.seeds) == 1 else f"; mean of {len(zoo.seeds)} seeds"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _save(figure: Any, path: Path) -> Path:
    """With 256 colours, a third of the size."""
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
