"""The page on fresh zoos, from the rows that are there; nothing on it is written by hand but its words.

    python benchmarks/accuracy/fresh.py --rows docs/results -o docs/results/fresh-images.md --title images \
        --zoo efficientnet --zoo vision-lora

Where a zoo has several seeds, a number is the mean over seeds and tasks, with the interval of `statistics.interval`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cfmerge_accuracy import results, statistics
from cfmerge_accuracy.methods import FRESH
from cfmerge_accuracy.results import Results
from cfmerge_accuracy.suite import FRESH_ZOOS
from cfmerge_accuracy.tables import folded, number, spread, table

RIVALS = (  # those that `auto` has to keep up with, as docs/auto.md says
    *("average", "task_arithmetic", "ace", "dc_merge", "tsv_m", "opcm", "average >> subspace_boosting"),
)
PAIRS = (
    ("tsv_m >> svc(alpha=1) >> scale(0.71)", "tsv_m >> svc(alpha=1)"),
    ("task_arithmetic >> svc >> scale(0.71)", "task_arithmetic >> svc"),
)
BEHIND = 2.0  # points that `auto` may be behind the best of its rivals

Means = Mapping[str, Mapping[str, float]]  # by zoo and method, in per cent of the experts


def means(zoos: Sequence[Results]) -> dict[str, dict[str, float]]:
    """Each method's normalised accuracy at defaults, of the methods that failed on no seed."""
    found = {}
    for zoo in zoos:
        whole = {
            name: values for name, values in zoo.all_normalised("published").items() if len(values) == len(zoo.rows)
        }
        found[zoo.name] = {name: statistics.interval(values).mean for name, values in whole.items()}
    return found


def about(zoos: Sequence[Results]) -> str:
    """What the zoos are: experts, base, and how long deltas are against the base."""
    rows = []
    for zoo in zoos:
        experts, base = zoo.reference("experts"), zoo.normalised(zoo.reference("base"))
        lengths = [x for row in zoo.rows for x in row["facts"].get("lengths", {}).values()]
        length = f"{float(np.mean(lengths)):.3f}" if lengths else ""
        seeds = ", ".join(map(str, zoo.seeds))
        cells = [number(100 * results.mean_of(experts)), number(results.mean_of(base)), length]
        rows.append([f"`{zoo.name}`", ", ".join(zoo.tasks), seeds, *cells])
    return table(["zoo", "tasks", "seeds", "experts' accuracy", "base, normalised", "length of deltas"], rows, left=3)


def by_method(zoos: Sequence[Results], found: Means) -> str:
    """Normalised accuracy of every method in every zoo; the best of a zoo is bold, the best mean first."""
    known = [name for name in FRESH if any(name in found[zoo.name] for zoo in zoos)]
    rows = []
    for name in known:
        values = [found[zoo.name].get(name) for zoo in zoos]
        mean = float(np.mean([value for value in values if value is not None])) if None not in values else None
        rows.append((mean, name, values))
    best = [
        max((each for each in column if each is not None), default=None)
        for column in zip(*(r[2] for r in rows), strict=True)
    ]
    lines = []
    for mean, name, values in sorted(rows, key=lambda row: (row[0] is None, -(row[0] or 0), row[1])):
        shown = [
            f"**{number(v)}**" if v == top and v is not None else number(v) for v, top in zip(values, best, strict=True)
        ]
        lines.append([f"`{name}`", *shown, number(mean)])
    for label in ("multitask", "ensemble", "base"):
        own = [results.mean_of(zoo.normalised(zoo.reference(label))) if zoo.reference(label) else None for zoo in zoos]
        if any(value is not None for value in own):
            mean = float(np.mean([v for v in own if v is not None])) if None not in own else None
            lines.append([f"({label})", *(number(value) for value in own), number(mean)])
    return table(["at defaults", *(zoo.name for zoo in zoos), "mean"], lines)


def taken(zoo: Results) -> list[str]:
    """The methods that `auto` took, from the notes of its merges."""
    found = set()
    for entry in zoo.methods.get("auto", {}).values():
        for note in entry.get("notes") or ():
            if told := re.match(r"auto: (.+?) for ", note):
                found.add(told[1])
    return sorted(found)


def of_auto(zoos: Sequence[Results], found: Means) -> str:
    """`auto` beside the best of its rivals, zoo by zoo, and what was asked of it."""
    rows, behind = [], {}
    judged = [zoo for zoo in zoos if "auto" in found[zoo.name]]
    if not judged:
        return "`auto` has no rows here.\n"
    for zoo in judged:
        own = found[zoo.name]
        best = max((name for name in RIVALS if name in own), key=lambda name: own[name])
        behind[zoo.name] = own[best] - own["auto"]
        every = zoo.all_normalised("published")
        apart = spread(statistics.paired(every["auto"], every[best]), sign=True)
        methods = ", ".join(f"`{name}`" for name in taken(zoo)) or "(not told)"
        rows.append([f"`{zoo.name}`", methods, number(own["auto"]), f"`{best}` {number(own[best])}", apart])
    text = table(["zoo", "what `auto` took", "`auto`", "best of the seven", "difference [95 %]"], rows, left=2)
    worst = max(behind, key=lambda name: behind[name])
    mean = {
        n: float(np.mean([found[z.name][n] for z in judged]))
        for n in ("auto", *RIVALS)
        if all(n in found[z.name] for z in judged)
    }
    ahead = [name for name in RIVALS if mean.get(name, -1.0) >= mean["auto"]]
    kinds = {name for zoo in judged for name in taken(zoo) if name != "average"}
    held = "held" if behind[worst] <= BEHIND else "failed"
    text += f"\n1. At most {BEHIND:g} points behind the best of the seven in every zoo: **{held}** here"
    text += f" (the most: {behind[worst]:.1f} on `{worst}`).\n"
    told = ", ".join(f"`{name}` {mean[name]:.1f}" for name in sorted(mean, key=lambda name: -mean[name]))
    text += f"2. A better mean than each of them: **{'failed' if ahead else 'held'}** here ({told}).\n"
    listed = ", ".join(f"`{kind}`" for kind in sorted(kinds))
    text += f"3. Different methods that it took, besides the mean: {len(kinds)} ({listed}).\n"
    return text


def of_constant(zoos: Sequence[Results]) -> str:
    """The two chains with one factor of 0.71 behind them, against the same without."""
    rows = []
    for zoo in zoos:
        every = zoo.all_normalised("published")
        cells = [
            spread(statistics.paired(every[a], every[b]), sign=True) if a in every and b in every else ""
            for a, b in PAIRS
        ]
        rows.append([f"`{zoo.name}`", *cells])
    return table(["0.71 against 1, difference [95 %]", *(f"`{b}`" for _, b in PAIRS)], rows)


def of_scales(zoos: Sequence[Results]) -> str:
    """The factor that is best on validation examples, geometric mean over seeds; of zoos that tried any."""
    tried = [zoo for zoo in zoos if any("factor" in e for each in zoo.methods.values() for e in each.values())]
    if not tried:
        return ""
    rows = []
    for name in FRESH:
        cells = []
        for zoo in tried:
            factors = [e["factor"] for e in zoo.methods.get(name, {}).values() if e.get("factor")]
            cells.append(f"{float(np.exp(np.mean(np.log(factors)))):.2f}" if factors else "")
        if any(cells):
            rows.append([f"`{name}`", *cells])
    lengths = [np.mean([x for row in zoo.rows for x in row["facts"].get("lengths", {}).values()]) for zoo in tried]
    rows.append(["(length of deltas over the base's)", *(f"{length:.3f}" for length in lengths)])
    return table(["best factor of the merged delta", *(zoo.name for zoo in tried)], rows)


def by_task(zoo: Results) -> str:
    """Every method's normalised accuracy on every task, and what failed."""
    every, rows = zoo.all_normalised("published"), []
    for name in (name for name in FRESH if name in every):
        cells = [number(results.over_seeds(every[name]).get(task)) for task in zoo.tasks]
        rows.append([f"`{name}`", *cells, spread(statistics.interval(every[name]))])
    failures = {n: e["failed"] for n, each in zoo.methods.items() for e in each.values() if e.get("failed")}
    text = table([zoo.name, *zoo.tasks, "mean [95 %]"], rows)
    return text + "".join(f"\n`{name}` failed: {why}\n" for name, why in failures.items())


def page(zoos: Sequence[Results], title: str) -> str:
    """The whole page."""
    found = means(zoos)
    missing = [name for name in FRESH_ZOOS if name not in found]
    seconds = {zoo.name: sum(sum(row.get("seconds", {}).values()) for row in zoo.rows) for zoo in zoos}
    cost = ", ".join(f"`{name}` {value / 60:.0f}" for name, value in seconds.items())
    parts = [
        f"# Fresh zoos: {title}",
        "Zoos that nobody had seen when the rule of [`auto`](../auto.md) was written down. Accuracies on test "
        "examples, which no choice has seen, in per cent of the expert's on the same task and seed; intervals are "
        "95 %, over seeds and tasks. Every method runs at its own defaults.",
        about(zoos),
        "The length of deltas is `|D| / |W_0|` over all that was trained, the mean over experts.",
        "## Methods", by_method(zoos, found),
        "## `auto`", of_auto(zoos, found),
        "## One factor of 0.71", of_constant(zoos),
    ]  # fmt: skip
    if scales := of_scales(zoos):
        parts += ["## What sets the scale", scales]
    parts += ["## By task", *(folded(f"<code>{zoo.name}</code>", by_task(zoo)) for zoo in zoos)]
    commands = dict.fromkeys(row["environment"]["command"] for zoo in zoos for row in zoo.rows)
    machines = dict.fromkeys(row["environment"]["machine"] for zoo in zoos for row in zoo.rows)
    parts += ["## How it was made", "".join(f"    {command}\n" for command in commands)]
    parts += [f"On {'; '.join(machines)}. Minutes, with training and compilation: {cost}."]
    if missing:
        parts.append(f"Not on this page: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path("docs/results"), help="the folder that holds rows/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--title", default="all")
    parser.add_argument("--zoo", action="append", choices=FRESH_ZOOS, help="default: all that are there")
    given = parser.parse_args()
    zoos, _ = results.read(given.rows)
    order = list(given.zoo or FRESH_ZOOS)
    chosen = sorted((zoo for zoo in zoos if zoo.name in order), key=lambda zoo: order.index(zoo.name))
    given.output.write_text(page(chosen, given.title), encoding="utf-8")


if __name__ == "__main__":
    main()
