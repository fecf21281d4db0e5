"""The plots of `time_study.py`."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import time_stream
from drawing import AMBER, BLUE, DARK, GREEN, GREY, ORANGE, PINK, SKY, headed, titled
from measuring import figure
from time_cells import WEIGHTS
from time_scores import CELLS, Score, Told, of_technique, over
from time_told import settings

SIZE_MARKS = {"small": (AMBER, "^"), "medium": (SKY, "o"), "large": (BLUE, "s")}


def write(folder: Path, told: Told) -> None:
    """Draws the four pictures of the page."""
    for name, drawn in {"steps": steps, "plane": plane, "techniques": techniques, "growth": growth}.items():
        drawn(told).savefig(folder / f"time-{name}.png")


# --- GM after every task ------------------------------------------------------------------------------------------


def steps(told: Told) -> Any:
    made, panels = figure(2, 6.4)
    mean = told.mean
    lines = {
        "ema + ema (BEST-IN-TIME)": (mean, mean, BLUE, "o"),
        "last + ema": ("last", mean, GREEN, "s"),
        "base + ema": ("base", mean, SKY, "D"),
        "base + all (offline)": ("base", "all", PINK, "^"),
        "last + last (sequential)": ("last", "last", ORANGE, "v"),
    }
    for axes, replay in zip(panels, (False, True), strict=True):
        for label, (init, deploy, colour, marker) in lines.items():
            found = [told.base(), *(told.at(init, deploy, replay, step) for step in range(1, told.count + 1))]
            values = [over(one) for one in found]
            low, high = (
                [pick((score.gm for score in one.values()), default=np.nan) for one in found] for pick in (min, max)
            )
            axes.fill_between(range(len(found)), low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(values, color=colour, marker=marker, markersize=5, label=label)
        counts = range(2, told.count + 1, 2)
        every = [over(told.multitask(count)) for count in counts]
        axes.plot(counts, every, "*", color=DARK, markersize=10, label="trained on all so far at once")
        axes.axhline(over(told.base()), color=GREY, linestyle=":", label="base")
        titled(axes, f"experts {'with' if replay else 'without'} replay", "tasks that have come", "GM, %")
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)
    panels[1].legend(fontsize=8.5, frameon=False, loc="lower right")
    return headed(made, "GM of the deployed model after every task (init + deploy); bands: lowest to highest replicate")


# --- knowledge against retention ----------------------------------------------------------------------------------


def plane(told: Told) -> Any:
    """KA against ZS after the last task; curves of equal GM."""
    made, panels = figure(2, 6.4)
    mean = told.mean
    inits = {"base": ("base", AMBER), "last": ("last", ORANGE), "ema": (mean, BLUE)}
    deploys = {"last": ("last", "v"), "ema": (mean, "o"), "all": ("all", "^")}
    for axes, replay in zip(panels, (False, True), strict=True):
        for (begin, colour), (serve, marker) in itertools.product(inits.values(), deploys.values()):
            placed(axes, told.at(begin, serve, replay), marker, colour)
        placed(axes, told.base(), "P", DARK)
        placed(axes, told.multitask(), "*", DARK, 14)
        titled(axes, f"experts {'with' if replay else 'without'} replay", "KA: adaptation tasks, %", "ZS: held-out, %")
    weighted = {weight: f"ema(weight={weight})" for weight in WEIGHTS}
    for begin, colour in (("", BLUE), ("last", ORANGE)):
        path = [(weight, told.at(begin or how, how)) for weight, how in weighted.items()]
        path = [(weight, found) for weight, found in path if len(found) == len(told.seeds)]
        panels[0].plot(*([over(one, what) for _, one in path] for what in ("ka", "zs")), "-", color=colour, linewidth=1)
        for weight, one in path:
            panels[0].plot(over(one, "ka"), over(one, "zs"), ".", color=colour)
            panels[0].annotate(f"{weight}", (over(one, "ka"), over(one, "zs")), (7, 3), textcoords="offset points",
                               fontsize=8, color=colour)  # fmt: skip
    joined(panels)
    marks = [(f"begins: {name}", "s", colour) for name, (_, colour) in inits.items()]
    marks += [(f"deployed: {name}", marker, GREY) for name, (_, marker) in deploys.items()]
    marks += [("base", "P", DARK), ("trained on all at once", "*", DARK)]
    drawn = [panels[0].plot([], [], marker, color=colour, label=label)[0] for label, marker, colour in marks]
    panels[1].legend(handles=drawn, fontsize=8.5, frameon=False, loc="lower left", ncols=2)
    return headed(made, "Learnt against kept, after eight tasks, by interpolation; numbers: the EMA's weight")


def placed(axes: Any, found: dict[int, Score], marker: str, colour: str, size: float = 9) -> None:
    """A mark at the mean over replicates, and one small one for each of them."""
    if found:
        axes.plot(over(found, "ka"), over(found, "zs"), marker, color=colour, markersize=size,
                  markeredgecolor="white", zorder=3)  # fmt: skip
        for one in found.values():
            axes.plot(one.ka, one.zs, marker, color=colour, markersize=3, alpha=0.45, zorder=2)


def joined(panels: list[Any]) -> None:
    """The same limits in all panels, and curves of equal GM under them."""
    (left, right), (low, high) = (
        (min(pair[0] for pair in limits), max(pair[1] for pair in limits))
        for limits in ([axes.get_xlim() for axes in panels], [axes.get_ylim() for axes in panels])
    )
    right += 0.08 * (right - left)
    x = np.linspace(left, right, 60)
    for axes in panels:
        for gm in range(20, 80, 2):
            y = gm**2 / x
            axes.plot(x, y, color="#d9d9d9", linewidth=0.8, zorder=0)
            if low < y[-1] < high:
                axes.annotate(f"GM {gm}", (right, y[-1]), ha="right", fontsize=7.5, color=GREY)
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.grid(False)


# --- techniques ---------------------------------------------------------------------------------------------------


def techniques(told: Told) -> Any:
    """GM by technique in six cells: dots are means, lines go from the lowest to the highest replicate."""
    made, (axes,) = figure(1, 11)
    colours = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, DARK, GREY)
    markers = "osD^vPX*"
    for index, (name, colour, marker) in enumerate(zip(told.names, colours, markers, strict=False)):
        shift = (index - (len(told.names) - 1) / 2) * 0.09
        for place, cell in enumerate(CELLS.values()):
            found = of_technique(told, name, *cell)
            if found:
                values = [one.gm for one in found.values()]
                axes.plot([place + shift] * 2, [min(values), max(values)], color=colour, linewidth=1.2)
                axes.plot(place + shift, over(found), marker, color=colour, markersize=6.5,
                          label=name if place == 0 else None)  # fmt: skip
    axes.axhline(over(told.base()), color=GREY, linestyle=":")
    axes.set_xlim(-0.55, len(CELLS) - 0.45)
    axes.annotate(
        "base", (5.5, over(told.base())), (0, 3), textcoords="offset points", fontsize=8.5, color=GREY, ha="right"
    )
    axes.set_xticks(range(len(CELLS)), CELLS)
    titled(axes, "GM after eight tasks by init + deploy and technique; lines: lowest to highest replicate", "", "GM, %")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=9, frameon=False, ncols=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return made


# --- growth -------------------------------------------------------------------------------------------------------


def growth(told: Told) -> Any:
    """GM of ema + ema less that of others: by budget and size in each replicate, and by the number of tasks."""
    made, panels = figure(4, 4.1)
    against = {
        "less that of the base": lambda setting: told.base(setting[0]),
        "less that of offline merging": lambda setting: told.at("base", "all", setting=setting),
        "less that of training on all at once": lambda setting: told.multitask(setting=setting),
    }
    for axes, (title, other) in zip(panels, against.items(), strict=False):
        for (size, (colour, marker)), seed in itertools.product(SIZE_MARKS.items(), told.seeds):
            gains = {}
            for setting in settings(told):
                best, beside = told.at(told.mean, told.mean, setting=setting), other(setting)
                if setting[0] == size and seed in best and seed in beside:
                    gains[setting[1]] = best[seed].gm - beside[seed].gm
            bold = {"markersize": 6, "linewidth": 1.8, "label": size}
            style = bold if seed == told.seeds[0] else {"markersize": 4, "linewidth": 0.8, "alpha": 0.55}
            axes.plot([*gains], [*gains.values()], f"{marker}-", color=colour, **style)
        axes.axhline(0, color=DARK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(budgets := time_stream.BUDGETS, [str(steps) for steps in budgets])
        axes.minorticks_off()
        titled(axes, title, "steps of one task")
    panels[0].set_ylabel("GM of ema + ema, difference")
    panels[0].legend(fontsize=8.5, frameon=False, title="base", title_fontsize=8.5)
    counts = range(2, told.count + 1, 2)
    lines = {
        "ema + ema": (told.mean, told.mean, False, BLUE, "o"),
        "last + ema": ("last", told.mean, False, GREEN, "s"),
        "last + ema, replay": ("last", told.mean, True, AMBER, "D"),
        "last + last, replay": ("last", "last", True, ORANGE, "v"),
    }
    for label, (init, deploy, replay, colour, marker) in lines.items():
        values = [gain(told.at(init, deploy, replay, step=count), told.multitask(count)) for count in counts]
        panels[3].plot(counts, values, f"{marker}-", color=colour, markersize=5, label=label)
    panels[3].axhline(0, color=DARK, linewidth=0.8)
    panels[3].set_xticks([*counts])
    titled(panels[3], "medium, 300 steps, mean of replicates:\nless that of all so far at once", "tasks")
    panels[3].legend(fontsize=8, frameon=False)
    return headed(made, "GM of ema + ema, less that of others, after eight tasks; thin: replicates 1 and 2")


def gain(one: dict[int, Score], other: dict[int, Score]) -> float:
    """The mean difference of GM in the replicates that both have."""
    both = [one[seed].gm - other[seed].gm for seed in one if seed in other]
    return float(np.mean(both)) if both else np.nan
