"""What was asked of the fresh zoos, answered from the rows of their runs: `auto`, one factor of 0.71, and the scale.

`fresh_told.py` puts these tables on its pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from cfmerge_accuracy import results, statistics
from cfmerge_accuracy.results import Results
from cfmerge_accuracy.tables import number, spread, table

RIVALS = ("average", "task_arithmetic", "ace", "dc_merge", "tsv_m", "opcm", "average >> subspace_boosting")
PAIRS = (
    ("tsv_m >> svc(alpha=1) >> scale(0.71)", "tsv_m >> svc(alpha=1)"),
    ("task_arithmetic >> svc >> scale(0.71)", "task_arithmetic >> svc"),
)
BEHIND = 2.0  # points that `auto` may be behind the best of its rivals, as docs/auto.md says

Means = Mapping[str, Mapping[str, float]]  # by zoo and method


def sections(zoos: Sequence[Results]) -> list[str]:
    """The tables, each under its heading; without those that have nothing to show."""
    found = {
        "Experts": experts(zoos),
        "`auto`": of_auto(zoos),
        "One factor of 0.71": of_constant(zoos),
        "What sets the scale": of_scales(zoos),
    }
    return [f"## {title}\n\n{text}" for title, text in found.items() if text]


def experts(zoos: Sequence[Results]) -> str:
    """How good experts and bases are, and how long deltas are where the rows tell."""
    rows = []
    for zoo in zoos:
        own, base = zoo.reference("experts"), zoo.normalised(zoo.reference("base"))
        mean = lengths(zoo)
        cells = [number(100 * results.mean_of(own)), number(results.mean_of(base)), f"{mean:.3f}" if mean else ""]
        rows.append([f"`{zoo.name}`", ", ".join(zoo.tasks), *cells])
    header = ["zoo", "tasks", "experts' accuracy", "base, normalised", "length of deltas over the base's"]
    return table(header, rows, left=2)


def lengths(zoo: Results) -> float | None:
    """The mean over experts and seeds of `|D_t| / |W_0|`; None where no row has it."""
    found = [each for row in zoo.rows for each in row["facts"].get("lengths", {}).values()]
    return float(np.mean(found)) if found else None


def taken(zoo: Results) -> list[str]:
    """The methods that `auto` took, from the notes of its merges."""
    notes = [note for entry in zoo.methods.get("auto", {}).values() for note in entry.get("notes") or ()]
    told = [re.match(r"auto: (.+?) for ", note) for note in notes]
    return sorted({found[1] for found in told if found})


def means(zoos: Sequence[Results]) -> Means:
    """Normalised accuracy at defaults, by zoo and method."""
    return {zoo.name: {line.name: line.normalised.mean for line in zoo.lines("published")} for zoo in zoos}


def of_auto(zoos: Sequence[Results]) -> str:
    """`auto` beside the best of its rivals in each zoo, and whether these zoos meet what docs/auto.md asks."""
    judged = [zoo for zoo in zoos if "auto" in zoo.all_normalised("published")]
    if not judged:
        return ""
    found, rows, behind = means(judged), [], {}
    for zoo in judged:
        own, every = found[zoo.name], zoo.all_normalised("published")
        best = max((name for name in RIVALS if name in own), key=lambda name: own[name])
        behind[zoo.name] = own[best] - own["auto"]
        apart = spread(statistics.paired(every["auto"], every[best]), sign=True)
        methods = ", ".join(f"`{name}`" for name in taken(zoo)) or "not told"
        rows.append([f"`{zoo.name}`", methods, number(own["auto"]), f"`{best}` {number(own[best])}", apart])
    header = ["zoo", "taken", "`auto`", f"best of the {len(RIVALS)}", "difference [95 %]"]
    kinds = sorted({name for zoo in judged for name in taken(zoo)})
    return table(header, rows, left=2) + "\n" + _asked(found, behind, kinds)


def _asked(found: Means, behind: Mapping[str, float], kinds: Sequence[str]) -> str:
    """The three conditions on `auto`, on these zoos alone."""
    worst = max(behind, key=lambda name: behind[name])
    common = [name for name in ("auto", *RIVALS) if all(name in each for each in found.values())]
    mean = {name: float(np.mean([each[name] for each in found.values()])) for name in common}
    ahead = any(mean[name] >= mean["auto"] for name in common if name != "auto")
    told = ", ".join(f"`{name}` {mean[name]:.1f}" for name in sorted(mean, key=lambda name: -mean[name]))
    lines = (
        f"At most {BEHIND:g} points behind the best of the {len(RIVALS)}: **{_held(behind[worst] <= BEHIND)}** "
        f"(most behind on `{worst}`: {behind[worst]:z.1f}).",
        f"A better mean than each of them: **{_held(not ahead)}** ({told}).",
        f"At least three methods taken: **{_held(len(kinds) >= 3)}** ({', '.join(f'`{kind}`' for kind in kinds)}).",
    )
    whole = "What [auto.md](../auto.md) asks for is asked of all fresh zoos together; of these here:\n\n"
    return whole + "".join(f"{position}. {line}\n" for position, line in enumerate(lines, start=1))


def _held(yes: bool) -> str:
    return "yes" if yes else "no"


def of_constant(zoos: Sequence[Results]) -> str:
    """The two chains with one factor of 0.71 behind them, against the same without."""
    rows = []
    for zoo in zoos:
        every = zoo.all_normalised("published")
        pairs = [(every[a], every[b]) if a in every and b in every else None for a, b in PAIRS]
        rows.append([f"`{zoo.name}`", *(spread(statistics.paired(*pair), sign=True) if pair else "" for pair in pairs)])
    header = ["0.71 against 1, difference [95 %]", *(f"`{b}`" for _, b in PAIRS)]
    return table(header, rows) if any(cell for row in rows for cell in row[1:]) else ""


def of_scales(zoos: Sequence[Results]) -> str:
    """The best factor on validation examples, geometric mean over seeds, of the zoos that tried any."""

    def factors(zoo: Results, name: str) -> list[float]:
        return [entry["factor"] for entry in zoo.methods.get(name, {}).values() if entry.get("factor")]

    names = list(dict.fromkeys(name for zoo in zoos for name in zoo.methods))
    tried = [zoo for zoo in zoos if any(factors(zoo, name) for name in names)]
    rows = []
    for name in names:
        cells = [float(np.exp(np.mean(np.log(own)))) if (own := factors(zoo, name)) else None for zoo in tried]
        if any(cells):
            rows.append([f"`{name}`", *(number(cell, 2) for cell in cells)])
    if not rows:
        return ""
    rows.append(["(length of deltas over the base's)", *(number(lengths(zoo), 3) for zoo in tried)])
    return table(["best factor of the merged delta", *(zoo.name for zoo in tried)], rows)
