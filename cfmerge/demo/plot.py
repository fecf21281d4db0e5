"""The demo's picture: accuracy per task and method, over a few images of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.demo.data import Task

LABELS = {
    "experts": "experts (one model per task)",
    "ace": "ACE (one merged model)",
    "task_arithmetic": "task arithmetic, scale 0.3",
    "average": "plain average",
    "base": "base",
}
COLOURS = {
    "experts": "#3b3b3b",
    "ace": "#0b6fb8",
    "task_arithmetic": "#f0a13a",
    "average": "#7fb069",
    "base": "#c9c9c9",
}


def mean_accuracy(per_task: Mapping[str, float]) -> float:
    return float(np.mean(list(per_task.values())))


def draw(path: Path, accuracies: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]) -> None:
    """Writes the picture to `path` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.2, 0.92, 0.62))
    _draw_bars(axes, accuracies, [task.name for task in tasks])
    for index, task in enumerate(tasks):
        _draw_samples(figure, axes, index, task)
    title = f"{len(tasks)} fine-tuned experts merged into one model, without data"
    figure.text(0.065, 0.945, title, fontsize=15, weight="bold")
    subtitle = "Accuracy on held-out test images of each task; one shared base, frozen heads"
    figure.text(0.065, 0.905, subtitle, fontsize=10.5, color="#555555")
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.008, 1.01),
        ncols=len(LABELS),
        frameon=False,
        fontsize=9.5,
        handlelength=1.1,
        columnspacing=1.4,
    )
    figure.savefig(path)


def _draw_bars(axes: Any, accuracies: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    width = 0.165
    centres = np.arange(len(names) + 1, dtype=np.float64)
    centres[-1] += 0.15
    for index, (row, label) in enumerate(LABELS.items()):
        values = [100 * accuracies[row][name] for name in names] + [100 * mean_accuracy(accuracies[row])]
        places = centres + (index - (len(LABELS) - 1) / 2) * width
        axes.bar(places, values, width * 0.94, color=COLOURS[row], label=label)
        colour, weight = (COLOURS["ace"], "bold") if row == "ace" else ("#333333", "normal")
        for place, value in zip(places, values, strict=True):
            axes.text(place, value + 1, f"{value:.0f}", ha="center", fontsize=8, color=colour, weight=weight)
    axes.set_xticks(centres, [*names, "mean of the tasks"], fontsize=11)
    axes.set_xlim(-0.55, centres[-1] + 0.55)
    axes.axvline(centres[-1] - 0.575, color="#bbbbbb", linewidth=0.8)
    axes.set_ylim(0, 106)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_samples(figure: Any, axes: Any, index: int, task: Task) -> None:
    """A strip of test images under the task's bars."""
    count, margin = 5, 2
    chosen = np.linspace(0, len(task.test) - 1, count).astype(int)
    strip = np.concatenate([np.pad(task.test.images[i], margin) for i in chosen], axis=1)
    to_figure = axes.transData + figure.transFigure.inverted()
    (left, _), (right, _) = to_figure.transform([(index - 0.41, 0), (index + 0.41, 0)])
    inset = figure.add_axes((left, 0.035, right - left, 0.11))
    inset.imshow(strip, cmap="gray", interpolation="nearest")
    inset.set_axis_off()
