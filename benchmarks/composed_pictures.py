"""The picture of `composed_zoos.py`: accuracy against size, a line for each gate."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
PLAIN = re.compile(r"smile\(rank=(\w+), gate=(\d+)\)")


def draw(file: Path, zoo: str, lines: Sequence[Any], gates: Sequence[int]) -> None:
    """Writes the picture of a zoo's `composed_zoos.Line`s."""
    made, (axes,) = figure(1, width=9.5)
    made.set_size_inches(9.5, 6.2)
    by = {(line.kind, line.system): line for line in lines}
    for gate, colour in zip(gates, COLOURS, strict=False):
        own = [(line, m[1]) for line in lines if line.kind == "smile" and (m := PLAIN.fullmatch(line.system))
               and int(m[2]) == gate]  # fmt: skip
        curve(axes, own, color=colour, marker="o", label=f"SMILE, gate {gate}")
    told = [(line, m[1]) for line in lines if line.kind == "told" and (m := PLAIN.fullmatch(line.system))]
    curve(axes, told, names=True, color="#7f7f7f", marker="o", linestyle="--", label="SMILE's experts, task told")
    ratios = [(line, "") for line in lines if line.system.startswith("tsv_c")]
    curve(axes, ratios, color="black", marker="v", linestyle=":", label="TSV-C, task told")
    for name, system, marker in (("EMR", "emr(rescale='l1', scope='model')", "*"), ("TALL", "tall, chosen", "P")):
        if line := by.get(("told", system)):
            axes.scatter(line.size, line.normalised, s=150, marker=marker, color="black", zorder=4,
                         label=f"{name}, task told")  # fmt: skip
    merges = sorted((line for line in lines if line.kind == "merge"), key=lambda line: line.normalised)
    axes.scatter([1] * len(merges), [line.normalised for line in merges], marker="_", s=90, color="#5e3c99",
                 label="merged models")  # fmt: skip
    lowest = min(line.normalised for line in lines)
    gap, above = (101 - lowest) / 32, lowest - 100.0
    for line in merges:
        above = max(above + gap, line.normalised)
        axes.annotate(line.system, (1, line.normalised), (0.93, above), fontsize=8, ha="right", va="center",
                      color="#5e3c99", arrowprops={"arrowstyle": "-", "color": "#5e3c99", "lw": 0.5})  # fmt: skip
    for name in ("base", "experts", "multitask"):
        if line := by.get(("reference", name)):
            axes.scatter(line.size, line.normalised, marker="D", s=45, color="#8c510a", zorder=4)
            axes.annotate(name, (line.size, line.normalised), (7, -3), textcoords="offset points", fontsize=9,
                          color="#8c510a")  # fmt: skip
    axes.axhline(100, color="#8c510a", linewidth=0.8)
    axes.set_xscale("log")
    most = max(line.size for line in lines)
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 10, 16) if tick < 1.25 * most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.7, 1.25 * most)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("size of base and result, in sizes of the base")
    axes.set_ylabel("accuracy, in per cent of the experts'")
    axes.set_title(f"{zoo}: accuracy against size; numbers are ranks", fontsize=11, loc="left")
    axes.legend(fontsize=8.5, loc="lower right", frameon=False)
    made.savefig(file)


def curve(axes: Any, own: Sequence[tuple[Any, str]], names: bool = False, **style: Any) -> None:
    """Lines by size; with `names` each point has its rank above."""
    own = sorted(own, key=lambda pair: pair[0].size)
    axes.plot([line.size for line, _ in own], [line.normalised for line, _ in own], markersize=4.5, **style)
    for line, rank in own if names else ():
        word = "dense" if rank == "None" else rank
        axes.annotate(word, (line.size, line.normalised), (0, 6), textcoords="offset points", fontsize=8,
                      ha="center", color="#555555")  # fmt: skip
