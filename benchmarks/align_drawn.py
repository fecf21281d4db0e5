"""The plots of `align_study.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from align_told import BUDGET, INPUTS, Rows, nets, of
from drawing import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, headed, titled
from measuring import figure

CURVES = {  # of two models of the same classes: colour, line, marker
    ("none", False): ("as they are", ORANGE, "-", "v"),
    ("none", True): ("as they are + REPAIR", ORANGE, ":", "v"),
    ("weights", False): ("weight matching", BLUE, "-", "o"),
    ("weights", True): ("weight matching + REPAIR", BLUE, ":", "o"),
    ("activations", False): ("activation matching", GREEN, "-", "s"),
    ("activations", True): ("activation matching + REPAIR", GREEN, ":", "s"),
    ("ot", False): ("OT fusion", PINK, "-", "^"),
}
ZIPS = {  # of other classes: method and budget
    ("none", BUDGET): ("average", ORANGE, "v"),
    ("weights", BUDGET): ("weight matching", AMBER, "^"),
    ("activations", BUDGET): ("permute", GREEN, "s"),
    ("zip", BUDGET): ("ZipIt!", BLUE, "o"),
    ("zip", 1.0): ("ZipIt!, budget 1", SKY, "P"),
    ("from weights", BUDGET): ("ZipIt! from weights", PINK, "D"),
}


def write(folder: Path, rows: Rows) -> None:
    """Draws the pictures of the page."""
    for name, drawn in {"mlp": mlp, "conv": conv, "transformer": transformer, "zip": zips}.items():
        made = drawn(rows)
        if made is not None:
            made.savefig(folder / f"align-{name}.png")


# --- the same classes ---------------------------------------------------------------------------------------------


def mlp(rows: Rows) -> Any:
    return by_width(
        rows, ("mlp",), "MLPs of two seeds: loss on the way from one to the other, and its barrier by width"
    )


def conv(rows: Rows) -> Any:
    title = "ConvNets of two seeds: loss on the way from one to the other, and its barrier by width"
    return by_width(rows, ("conv", "batch"), title)


def by_width(rows: Rows, kinds: Sequence[str], title: str) -> Any:
    """Curves of the narrowest and the widest network of each kind, and barriers by width of the first kind."""
    own = of(rows, part="pair")
    found = {kind: [net for net in nets(own) if net.startswith(kind)] for kind in kinds}
    shown = [net for own in found.values() for net in dict.fromkeys([*own[:1], *own[-1:]])]
    if not shown:
        return None
    rows_of_panels = 2 if len(shown) == 3 else 1
    made, panels = figure((len(shown) + 1) // rows_of_panels, 4.8, rows_of_panels)
    for axes, net in zip(panels, shown, strict=False):
        curves(axes, of(own, net=net), net)
    widths(panels[-1], [row for row in own if row["net"] in found[kinds[0]]], kinds[0])
    for axes in panels[:: len(panels) // rows_of_panels]:
        axes.set_ylabel("test loss")
    panels[-1].legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return headed(made, title)


def curves(axes: Any, own: Rows, title: str) -> None:
    """The mean loss over pairs by method; bands go from the lowest pair to the highest."""
    for (method, repair), (label, colour, line, marker) in CURVES.items():
        losses = [row["loss"] for row in of(own, method=method, repair=repair)]
        if losses:
            points = np.linspace(0, 1, len(losses[0]))
            axes.fill_between(points, np.min(losses, 0), np.max(losses, 0), color=colour, alpha=0.1, linewidth=0)
            axes.plot(points, np.mean(losses, 0), line, color=colour, marker=marker, markersize=4, label=label)
    logarithmic(axes, (0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20))
    titled(axes, title, "share of the second model")


def logarithmic(axes: Any, ticks: Sequence[float]) -> None:
    """The y axis, with those of the ticks that lie on it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()


def widths(axes: Any, own: Rows, kind: str) -> None:
    """Barriers by width: lines are means, small marks are pairs."""
    places = nets(own)
    for (method, repair), (label, colour, line, marker) in CURVES.items():
        found = [[row["barrier"] for row in of(own, net=net, method=method, repair=repair)] for net in places]
        if any(found):
            means = [np.mean(each) if each else np.nan for each in found]
            axes.plot(range(len(places)), means, line, color=colour, marker=marker, markersize=6, label=label)
            for place, each in enumerate(found):
                axes.plot([place] * len(each), each, marker, color=colour, markersize=3, alpha=0.45)
    axes.set_xticks(range(len(places)), [net.removeprefix(f"{kind}-") for net in places])
    logarithmic(axes, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10))
    titled(axes, "barrier by width; small marks: pairs", f"W of {kind}-W", "barrier in test loss")


def transformer(rows: Rows) -> Any:
    """Loss and accuracy on the way between two transformers."""
    own = [row for row in of(rows, part="pair") if row["net"].startswith("vit")]
    if not own:
        return None
    made, panels = figure(2, 5.6)
    curves(panels[0], own, "test loss")
    panels[0].set_ylabel("test loss")
    for (method, repair), (label, colour, line, marker) in CURVES.items():
        found = [row["accuracy"] for row in of(own, method=method, repair=repair)]
        if found:
            points = np.linspace(0, 1, len(found[0]))
            panels[1].fill_between(points, 100 * np.min(found, 0), 100 * np.max(found, 0), color=colour, alpha=0.1)
            panels[1].plot(
                points, 100 * np.mean(found, 0), line, color=colour, marker=marker, markersize=4, label=label
            )
    titled(panels[1], "test accuracy, %", "share of the second model")
    panels[1].legend(fontsize=8.5, frameon=False, loc="lower left")
    return headed(made, f"Two transformers ({nets(own)[0]}) of other seeds; bands: lowest to highest pair")


# --- other classes ------------------------------------------------------------------------------------------------


def zips(rows: Rows) -> Any:
    """Joint accuracy, and below it that of tasks, by the number of layers that are one trunk."""
    own = of(rows, part="zip", inputs=INPUTS)
    places = nets(own)
    if not places:
        return None
    made, panels = figure(len(places), 5.0, rows=2)
    for number, net in enumerate(places):
        for what, axes in (("joint", panels[number]), ("tasks", panels[len(places) + number])):
            zips_of(axes, of(own, net=net), what, (True,) if net.startswith("batch") else (False, True))
            titled(axes, f"{net}: {'all ten classes' if what == 'joint' else 'each head on its five classes'}")
    for axes in panels[:: len(places)]:
        axes.set_ylabel("test accuracy, %")
    for axes in panels[len(places) :]:
        axes.set_xlabel("layers in one trunk")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    return headed(made, "Two models of five classes each, zipped so far (BatchNorm: statistics estimated again); "
                  "grey: the ensemble")  # fmt: skip


def zips_of(axes: Any, own: Rows, what: str, repairs: Sequence[bool]) -> None:
    """The lines of one network."""
    both = of(own, stop=0)
    axes.axhline(100 * np.mean([np.mean(row[what]) for row in both]), color=GREY, linewidth=1)
    for (method, budget), (label, colour, marker) in ZIPS.items():
        for repair in repairs:
            mine = of(own, method=method, budget=budget, repair=repair)
            if mine:
                line = ":" if repair and False in repairs else "-"
                stopped(axes, both + mine, what, colour, line + marker, label + (" + REPAIR" if line == ":" else ""))


def stopped(axes: Any, own: Rows, what: str, colour: str, style: str, label: str) -> None:
    """A line over stops, the mean of replicates, and small marks for each of them."""
    stops = sorted({row["stop"] for row in own})
    found = [[100 * float(np.mean(row[what])) for row in of(own, stop=stop)] for stop in stops]
    axes.plot(stops, [np.mean(each) for each in found], style, color=colour, markersize=6, label=label)
    for stop, each in zip(stops, found, strict=True):
        axes.plot([stop] * len(each), each, style[-1], color=colour, markersize=3, alpha=0.35)
    axes.set_xticks(stops)
