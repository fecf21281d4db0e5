"""The tables and the picture of `subspaces.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import figure, table
from zoo_models import by_zoo, normalised

PROPER = ("I", "II", "II + III", "but I")  # neither nothing nor all of the delta
SHOWN = ("base", "none", *PROPER, "all")
ARTICLE = {"I": 57.3, "II": 74.8, "II + III": 86.6, "all": 90.4, "base": 48.2}  # ViT-B/32, eight tasks, per cent
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def mean_accuracy(rows: Sequence[Mapping[str, Any]], how: str) -> float:
    """In per cent, over tasks and seeds."""
    return 100 * float(np.mean([[*row["accuracies"][how].values()] for row in rows]))


def recovered(rows: Sequence[Mapping[str, Any]], how: str) -> float:
    """In per cent of the experts', over tasks and seeds."""
    return float(np.mean([normalised(row["accuracies"][how], row["accuracies"]["all"]) for row in rows]))


def mean_of(rows: Sequence[Mapping[str, Any]], key: str, how: str) -> float:
    """The mean over layers and seeds of an energy, or of that by chance; in per cent."""
    return 100 * float(np.mean([layer[key][how] for row in rows for layer in row["layers"].values()]))


def by_width(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, dict[int, float]]:
    """Overlaps by gate or energies by rank, for each input width; means over layers and seeds."""
    found: dict[int, dict[int, list[float]]] = {}
    for layer in (layer for row in rows for layer in row["layers"].values()):
        for gate, value in layer[key].items():
            found.setdefault(layer["shape"][1], {}).setdefault(int(gate), []).append(value)
    return {n: {g: float(np.mean(v)) for g, v in sorted(by.items())} for n, by in sorted(found.items())}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of every zoo: accuracies and energies by projection, overlaps by width, leading directions by layer."""
    parts = []
    for name, of in by_zoo(rows):
        seeds = ("seeds " if len(of) > 1 else "seed ") + ", ".join(str(row["seed"]) for row in of)
        by_projection = [
            {
                "delta": how,
                "accuracy": f"{mean_accuracy(of, how):.1f}",
                "of the experts, %": f"{recovered(of, how):.1f}",
                "energy, %": f"{mean_of(of, 'energy', how):.1f}" if how in PROPER else "",
                "by chance, %": f"{mean_of(of, 'chance', how):.1f}" if how in PROPER else "",
                "article, ViT-B/32": f"{ARTICLE[how]:.1f}" if how in ARTICLE else "",
            }
            for how in SHOWN
        ]
        overlaps = [
            {"input width": n, **{f"gate {g}": f"{value:.2f} ({g / n:.2f})" for g, value in by.items()}}
            for n, by in by_width(of, "overlap").items()
        ]
        held = [
            {"input width": n, **{f"rank {k}": f"{100 * value:.0f}" for k, value in by.items()}}
            for n, by in by_width(of, "held").items()
        ]
        by_layer = [
            {"layer": layer, "out x in": "x".join(map(str, own["shape"])), "k": own["k"], "rank": own["rank"]}
            | {how: f"{100 * share:.1f}" for how, share in own["energy"].items()}
            | {"I, by chance": f"{100 * own['chance']['I']:.1f}"}
            for layer, own in of[0]["layers"].items()
        ]
        parts += [
            f"## {name}, {seeds}\n",
            table(by_projection),
            f"Overlap of two experts' leading input directions, and by chance:\n\n{table(overlaps)}",
            f"Energy of a delta's leading triplets, per cent:\n\n{table(held)}",
            f"<details><summary>Energy by layer, per cent, seed {of[0]['seed']}</summary>\n",
            f"{table(by_layer)}\n</details>\n",
        ]
    return "\n".join(parts)


def draw(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the picture: for each zoo accuracy, energy and overlap."""
    zoos = [*by_zoo(rows)]
    made, _ = figure(0)
    made.set_size_inches(15, 4.4 * len(zoos))
    for line, (name, of) in enumerate(zoos):
        panels = [made.add_subplot(len(zoos), 3, 3 * line + panel) for panel in (1, 2, 3)]
        bars(panels[0], name, of)
        energies(panels[1], of)
        curves(panels[2], of)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
    made.savefig(file)


def bars(axes: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    values = [recovered(rows, how) for how in SHOWN]
    axes.bar(range(len(SHOWN)), values, color=["#999999", "#999999", *COLOURS, "#333333"])
    article = [(x, 100 * ARTICLE[how] / ARTICLE["all"]) for x, how in enumerate(SHOWN) if how in ARTICLE]
    axes.plot(*zip(*article, strict=True), "D", color="white", markeredgecolor="black", label="article, ViT-B/32")
    for x, value in enumerate(values):
        axes.annotate(f"{value:.0f}", (x, 2), ha="center", fontsize=9.5, color="white", weight="bold")
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_ylim(0, 119)
    axes.set_title(f"{name}: accuracy by projection of the delta,\nper cent of the experts'", fontsize=10, loc="left")
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")


def energies(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for shift, key, style in ((-0.2, "energy", {}), (0.2, "chance", {"alpha": 0.35})):
        values = [mean_of(rows, key, how) for how in PROPER]
        axes.bar(np.arange(len(PROPER)) + shift, values, 0.4, color=COLOURS, **style)
        for x, value in enumerate(values):
            axes.annotate(
                f"{value:.0f}", (x + shift, value), (0, 3), textcoords="offset points", ha="center", fontsize=9
            )
    axes.set_xticks(range(len(PROPER)), PROPER)
    axes.set_ylim(0, 112)
    axes.set_title("share of the delta's energy, per cent;\npale: a delta without direction", fontsize=10, loc="left")


def curves(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for (n, by), colour in zip(by_width(rows, "overlap").items(), COLOURS, strict=False):
        axes.plot([*by], [*by.values()], "o-", color=colour, markersize=4, label=f"input width {n}")
        axes.plot([*by], [gate / n for gate in by], ":", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [1, 4, 16, 64, 256], [str(tick) for tick in ticks])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("gate: leading right singular vectors of the deltas")
    axes.set_title("overlap of two experts' input directions;\ndotted: by chance", fontsize=10, loc="left")
    axes.legend(fontsize=8.5, frameon=False)
