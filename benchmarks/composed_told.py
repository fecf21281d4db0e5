"""The tables and the pictures of `composed_zoos.py`."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import figure, table
from zoo_models import by_zoo, normalised

TITLES = {
    "reference": "References",
    "merge": "Merged models: the task is not told",
    "told": "The task is told: a checkpoint for each",
    "smile": "SMILE: the task is not told",
}
SENT, MOST = "sent to its expert", "taken by one"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
PLAIN = re.compile(r"smile\(rank=(\w+), gate=(\d+)\)")


class System(NamedTuple):
    """What a row is of: `kind` is a key of `TITLES`; `text` as for `compose.build` or `cfmerge.merge_params`."""

    kind: str
    text: str


class Line(NamedTuple):
    """One line of the tables, the mean over seeds: accuracy, and accuracy in per cent of the experts'."""

    kind: str
    system: str
    size: float
    accuracy: float
    normalised: float
    shares: dict[str, float]  # of SENT and MOST: means over layers, in per cent


def mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def by_system(rows: Sequence[Mapping[str, Any]]) -> dict[System, list[Mapping[str, Any]]]:
    """The rows of each system, one for each seed."""
    found: dict[System, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(System(row["kind"], row["system"]), []).append(row)
    return found


def complete(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of one zoo whose seeds have as many as the one that has most: means are of the same seeds."""
    count = Counter(row["seed"] for row in rows)
    return [row for row in rows if count[row["seed"]] == max(count.values())]


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Of one zoo."""
    experts = {row["seed"]: row["accuracies"] for row in rows if row["system"] == "experts"}
    made = []
    for system, of in by_system(rows).items():
        shares = {
            key: 100 * mean(mean(r[key].values()) for r in of) for key in (SENT, MOST) if all(key in r for r in of)
        }
        made.append(
            Line(
                *system,
                size=mean(row["size"] for row in of),
                accuracy=100 * mean(mean(row["accuracies"].values()) for row in of),
                normalised=mean(normalised(row["accuracies"], experts[row["seed"]]) for row in of),
                shares=shares,
            )
        )
    return made


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of every zoo the means over seeds, by kind, and accuracies by task."""
    parts = []
    for name, each in by_zoo(rows):
        of = complete(each)
        seeds = sorted({row["seed"] for row in of})
        found = lines(of)
        parts.append(f"## {name}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}\n")
        for kind in ("reference", "merge", "told", "smile"):
            parts.append(f"### {TITLES[kind]}\n\n{table([told(line) for line in found if line.kind == kind])}")
        parts.append(f"<details><summary>Accuracy by task</summary>\n\n{by_task(of)}\n</details>\n")
        parts.append(f"![accuracy against size](composed-{name.partition('-')[0]}.png)\n")
    return "\n".join(parts)


def told(line: Line) -> dict[str, Any]:
    """A row of a table."""
    found = {
        "system": line.system, "size": round(line.size, 2), "accuracy": f"{line.accuracy:.1f}",
        "of the experts, %": f"{line.normalised:.1f}",
    }  # fmt: skip
    return found | {f"{key}, %": f"{share:.0f}" for key, share in line.shares.items()}


def by_task(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies by task, the means over seeds."""
    return table(
        [
            {"system": system.text, "task": "told" if system.kind == "told" else ""}
            | {task: f"{100 * mean(row['accuracies'][task] for row in own):.1f}" for task in own[0]["accuracies"]}
            for system, own in by_system(rows).items()
        ]
    )


# --- the picture --------------------------------------------------------------------------------------------------


def draw(file: Path, zoo: str, lines: Sequence[Line], gates: Sequence[int]) -> None:
    """Writes the picture of a zoo's lines."""
    made, (axes,) = figure(1)
    made.set_size_inches(11, 6.2)
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
    one_checkpoint(axes, lines)
    for name in ("base", "experts", "multitask"):
        if line := by.get(("reference", name)):
            axes.scatter(line.size, line.normalised, marker="D", s=45, color="#8c510a", zorder=4)
            place = {"xytext": (0, 8), "ha": "center"} if name == "experts" else {"xytext": (7, 5)}
            axes.annotate(
                name, (line.size, line.normalised), textcoords="offset points", fontsize=9, color="#8c510a", **place
            )
    axes.axhline(100, color="#8c510a", linewidth=0.8)
    frame(axes, max(line.size for line in lines))
    axes.set_title(f"{zoo}: accuracy against size; numbers are ranks", fontsize=11, loc="left")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.4), frameon=False)
    made.savefig(file)


def one_checkpoint(axes: Any, lines: Sequence[Line]) -> None:
    """The merged models, all of size 1, their names beside them and apart."""
    merges = sorted((line for line in lines if line.kind == "merge"), key=lambda line: line.normalised)
    axes.scatter([1] * len(merges), [line.normalised for line in merges], marker="_", s=90, color="#5e3c99",
                 label="merged models")  # fmt: skip
    lowest = min(line.normalised for line in lines)
    gap, above = (101 - lowest) / 32, lowest - 100.0
    for line in merges:
        above = max(above + gap, line.normalised)
        axes.annotate(line.system, (1, line.normalised), (0.93, above), fontsize=8, ha="right", va="center",
                      color="#5e3c99", arrowprops={"arrowstyle": "-", "color": "#5e3c99", "lw": 0.5})  # fmt: skip


def frame(axes: Any, most: float) -> None:
    """The axes, for sizes up to the largest."""
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 4, 6, 8, 10, 16) if tick < 1.25 * most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.66, 1.15 * most)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("size of base and result, in sizes of the base")
    axes.set_ylabel("accuracy, in per cent of the experts'")


def curve(axes: Any, own: Sequence[tuple[Line, str]], names: bool = False, **style: Any) -> None:
    """Lines by size; with `names` each point has its rank below."""
    own = sorted(own, key=lambda pair: pair[0].size)
    axes.plot([line.size for line, _ in own], [line.normalised for line, _ in own], markersize=4.5, **style)
    for line, rank in own if names else ():
        word = "dense" if rank == "None" else rank
        axes.annotate(word, (line.size, line.normalised), (0, -13), textcoords="offset points", fontsize=8,
                      ha="center", color="#555555")  # fmt: skip
