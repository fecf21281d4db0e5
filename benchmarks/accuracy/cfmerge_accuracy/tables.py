"""The report's tables, in GitHub's Markdown: one function for each section, "" where there is nothing to show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cfmerge_accuracy import statistics
from cfmerge_accuracy.results import Line, Results, Row, Setting, mean_of, over_seeds
from cfmerge_accuracy.statistics import Interval

MOST_NOTES = 3
MARKS = (
    "n.s.: the 95 % interval contains 0. †: it does not, but the difference does not survive Holm's correction for all "
    "rows of the column. ‡: its sign is not the same on every seed."
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are aligned to the left, the others, numbers, to the right."""
    lines = [header, ["---" if column < left else "--:" for column in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def number(value: float | None, decimals: int = 1) -> str:
    """Without a minus before zero; nothing if there is no number."""
    return "" if value is None or not math.isfinite(value) else f"{value:z.{decimals}f}"


def spread(found: Interval, sign: bool = False) -> str:
    """`93.2 [91.0, 95.4]`; only the mean where there is no interval."""
    mean = f"{found.mean:+z.1f}" if sign else number(found.mean)
    return f"{mean} [{found.low:z.1f}, {found.high:z.1f}]" if math.isfinite(found.low) else mean


def folded(title: str, text: str) -> str:
    """A section that opens on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n" if text else ""


def overview(zoos: Sequence[Results], setting: Setting) -> str:
    """Every method's mean normalised accuracy in every zoo; the best mean over the zoos with most methods first.

    Zoos in which only some methods were run do not count for the mean, which would then be of different zoos.
    """
    found = {zoo.name: {line.name: line.normalised.mean for line in zoo.lines(setting)} for zoo in zoos}
    most = max((len(each) for each in found.values()), default=0)
    whole = [name for name, each in found.items() if len(each) > 0.9 * most]
    means = {
        method: sum(found[name][method] for name in whole) / len(whole)
        for method in dict.fromkeys(method for name in whole for method in found[name])
        if all(method in found[name] for name in whole)
    }
    rows = [
        [method, number(mean), *(number(each.get(method)) for each in found.values())]
        for method, mean in sorted(means.items(), key=lambda item: (-item[1], item[0]))
    ]
    return table(["method", f"mean of {', '.join(whole)}", *found], rows) if rows else ""


def protocol(zoo: Results) -> str:
    """What was run, in one paragraph."""
    seeds = f"seed {zoo.seeds[0]}" if len(zoo.seeds) == 1 else f"seeds {', '.join(map(str, zoo.seeds))}"
    quick = "**A quick run: a test of the suite, not of the methods.** " if zoo.rows[0].get("quick") else ""
    stated = zoo.rows[0].get("facts", {}).items()
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in stated if _is_short(value)]
    known = f" Of seed {zoo.seeds[0]}: {'; '.join(facts)}." if facts else ""
    over = "over tasks and seeds" if len(zoo.seeds) > 1 else "over tasks alone: one seed cannot say what another would"
    return (
        f"{quick}{len(zoo.tasks)} experts ({', '.join(zoo.tasks)}), {seeds}, {len(zoo.methods)} methods. Accuracies in "
        "per cent on test examples, which no choice has seen; normalised: in per cent of the expert's on the same task "
        f"and seed. Intervals are 95 %, {over}.{known}\n"
    )


def _is_short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 120)


def references(zoo: Results) -> str:
    """Upper and lower bounds, by task."""
    found = {name: zoo.reference(name) for name in ("experts", "multitask", "ensemble", "base")}
    chance = zoo.rows[0].get("facts", {}).get("chance")
    if isinstance(chance, Mapping):
        found["chance"] = {zoo.rows[0]["seed"]: {task: chance[task] for task in zoo.tasks if task in chance}}
    rows = []
    for name, values in found.items():
        if any(values.values()):
            by_task, mean = over_seeds(values), mean_of(zoo.normalised(values))
            each = [number(_percent(by_task.get(task))) for task in zoo.tasks]
            rows.append([name, number(100 * mean_of(values)), number(mean), *each])
    return table(["", "mean accuracy", "normalised", *zoo.tasks], rows)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def methods(zoo: Results, lines: Sequence[Line], setting: Setting) -> str:
    """The main table, the best first."""
    scaled = ["factor"] if setting == "scaled" else []
    rows = []
    for line in lines:
        missing = f" ({len(line.seeds)} of {len(zoo.seeds)} seeds)" if len(line.seeds) < len(zoo.seeds) else ""
        extreme = [f"{task} {value:.1f}" for task, value in (line.best, line.worst)]
        factors = [" / ".join(f"{factor:g}" for factor in line.factors)] if scaled else []
        shown = [number(line.accuracy), spread(line.normalised), *extreme]
        rows.append([line.name + missing, line.group, line.data, *factors, *shown])
    header = ["method", "group", "data", *scaled, "accuracy", "normalised [95 %]", "best task", "worst task"]
    return table(header, rows, left=3)


def by_task(zoo: Results, lines: Sequence[Line], setting: Setting) -> str:
    """Accuracy on every task, mean over seeds."""
    rows = []
    for line in lines:
        values = over_seeds(zoo.accuracies(line.name, setting))
        rows.append([line.name, *(number(_percent(values.get(task))) for task in zoo.tasks)])
    return table(["accuracy", *zoo.tasks], rows)


def rivals(zoo: Results, lines: Sequence[Line]) -> list[str]:
    """What the others are compared with: the best of those without data, and task arithmetic."""
    top = next((line.name for line in lines if line.data == "none"), None)
    plain = zoo.named("task_arithmetic")
    return list(dict.fromkeys(name for name in (top, plain) if name and name in {line.name for line in lines}))


def differences(zoo: Results, lines: Sequence[Line], setting: Setting) -> str:
    """Each method minus the best one without data, and minus task arithmetic, paired by seed and task."""
    against = rivals(zoo, lines)
    values = zoo.all_normalised(setting)
    columns = {name: _compared(values, name) for name in against}
    rows = [[line.name, *(columns[name].get(line.name, "") for name in against)] for line in lines]
    if not against or len(rows) < 2:
        return ""
    first = f"{against[0]} came out on top on the same test examples, which flatters it.\n\n"
    return first + table(["normalised accuracy", *(f"minus {name}" for name in against)], rows) + f"\n{MARKS}\n"


def _compared(values: Mapping[str, statistics.Values], rival: str) -> dict[str, str]:
    """The cells of a column, by method."""
    found = {name: statistics.paired(each, values[rival]) for name, each in values.items() if name != rival}
    found = {name: pair for name, pair in found.items() if math.isfinite(pair.mean)}
    corrected = statistics.holm({name: pair.p for name, pair in found.items()})
    cells = {}
    for name, pair in found.items():
        marks = "" if pair.significant else " n.s."
        if pair.significant and corrected[name] >= 1 - statistics.CONFIDENCE:
            marks = "†"
        if pair.seeds > 1 and not statistics.same_sign(values[name], values[rival]):
            marks += "‡"
        cells[name] = spread(pair, sign=True) + marks
    return cells


def ordering(zoo: Results, setting: Setting) -> str:
    """Whether another seed would have told the same."""
    found = statistics.ordering(zoo.all_normalised(setting))
    if len(found.rankings) < 2 or not found.total:
        return ""
    rows = [[str(seed), ", ".join(names[:5])] for seed, names in found.rankings.items()]
    share = 100 * len(found.pairs) / found.total
    clear = 100 * len(found.significant) / found.total
    text = (
        f"Of {found.total} pairs of methods, {share:.0f} % are in the same order on all {len(zoo.seeds)} seeds; for "
        f"{clear:.0f} % the paired interval excludes 0 as well (not corrected for their number). All other orders in "
        "the table are not significant.\n"
    )
    return table(["seed", "the five best"], rows, left=2) + "\n" + text


def counts(zoo: Results) -> str:
    """Normalised accuracy of the first 2, 3, ... experts merged, mean over seeds."""
    found = zoo.over_rows("counts", ("name", "count"), "normalised")
    numbers = sorted({count for _, count in found})
    names = list(dict.fromkeys(name for name, _ in found))
    names.sort(key=lambda name: -found.get((name, numbers[-1]), 0))
    rows = [[name, *(number(_percent(found.get((name, count)))) for count in numbers)] for name in names]
    return table(["experts", *map(str, numbers)], rows) if rows else ""


def excess(zoo: Results, lines: Sequence[Line]) -> str:
    """The error of the layers' outputs beside the accuracy, and how well it predicts the order."""
    pairs = [(line, error) for line in lines if (error := zoo.excess(line.name)) is not None]
    if not pairs:
        return ""
    pairs.sort(key=lambda pair: pair[1])
    together = statistics.rank_correlation([error for _, error in pairs], [line.normalised.mean for line, _ in pairs])
    told = f"Rank correlation over {len(pairs)} methods: {together:.2f}.\n" if math.isfinite(together) else ""
    text = (
        "Excess error of the layers' outputs on the true inputs, mean over layers: 0 keeps every expert's outputs, 1 "
        f"is as bad as the base. At published defaults. {told}\n"
    )
    rows = [
        [line.name, number(error, 2) if error < 100 else f"{error:.0e}", number(line.normalised.mean)]
        for line, error in pairs
    ]
    return text + folded("Errors by method", table(["method", "excess error", "normalised"], rows))


def covariances(zoo: Results) -> str:
    """Estimated against true input covariances, means over layers, tasks and seeds."""
    items = [item for row in zoo.rows for item in row.get("covariances") or ()]
    measures = list(dict.fromkeys(key for item in items for key in item if key != "estimator"))
    found = {measure: zoo.over_rows("covariances", ("estimator",), measure) for measure in measures}
    estimators = list(dict.fromkeys(item["estimator"] for item in items))
    rows = [[name, *(number(found[measure].get((name,)), 2) for measure in measures)] for name in estimators]
    return table(["estimate", *(measure.replace("_", " ") for measure in measures)], rows) if rows else ""


def peers(zoo: Results) -> str:
    """The same methods by other packages."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in zoo.rows:
        for item in row.get("peers") or ():
            found[item["name"], item["peer"]].append(item)
    rows = []
    for names, items in found.items():
        ours, theirs = ([item[key] for item in items] for key in ("accuracy_ours", "accuracy_theirs"))
        largest = f"{max(item['difference'] for item in items):.1e}"
        means = (number(100 * sum(each) / len(each)) for each in (ours, theirs))
        agree = "yes" if all(item["agrees"] for item in items) else "**no**"
        notes = "; ".join(dict.fromkeys(_one_line(item["note"]) for item in items if item["note"]))
        rows.append([*names, largest, *means, agree, notes])
    header = ["method", "peer", "largest difference", "accuracy, cfmerge", "accuracy, peer", "agree", "note"]
    text = table(header, rows, left=2) if rows else ""
    failed = [item for row in zoo.rows for item in row.get("peers_failed") or ()]
    lines = dict.fromkeys(f"- {item['name']} by {item['peer']}: {_one_line(item['failed'])}" for item in failed)
    return text + ("\nNot compared:\n\n" + "\n".join(lines) + "\n" if lines else "")


def failures(zoo: Results) -> str:
    """What could not be merged, and what the methods warned of."""
    lines = []
    for name, entries in zoo.methods.items():
        failed: dict[str, list[int]] = defaultdict(list)
        notes: dict[str, None] = {}
        for seed, entry in entries.items():
            if entry.get("failed"):
                failed[entry["failed"]].append(seed)
            notes |= dict.fromkeys(entry.get("notes") or ())
        for message, seeds in failed.items():
            where = "" if len(seeds) == len(zoo.seeds) else f" on seed {', '.join(map(str, seeds))}"
            lines.append(f"- **{name}** failed{where}: {_one_line(message)}")
        lines += [f"- {name}: {_one_line(note)}" for note in list(notes)[:MOST_NOTES]]
        if len(notes) > MOST_NOTES:
            lines.append(f"- {name}: and {len(notes) - MOST_NOTES} more warnings, in results.json")
    return "\n".join(lines) + "\n" if lines else ""


def _one_line(message: str) -> str:
    return " ".join(message.split())


def linear_risks(regimes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Excess risk of every method in every regime: mean over seeds and standard deviation, the least in bold."""
    names = list(dict.fromkeys(method for row in regimes.values() for method in row))
    least = {r: min((row[n]["mean"] for n in row if n != "oracle"), default=None) for r, row in regimes.items()}
    rows = [
        [name, *(_risk(row[name], least[regime]) if name in row else "" for regime, row in regimes.items())]
        for name in names
    ]
    return table(["method", *regimes], rows)


def _risk(cell: Mapping[str, float], least: float | None) -> str:
    mean = number(cell["mean"], 2)
    deviation = next((value for key, value in cell.items() if key.endswith("deviation")), None)
    shown = f"**{mean}**" if cell["mean"] == least else mean
    return shown if deviation is None else f"{shown} ± {number(deviation, 2)}"


def linear_covariances(covariances: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each measure, regimes by estimators."""
    names = list(dict.fromkeys(name for row in covariances.values() for name in row))
    cells = [cell for row in covariances.values() for cell in row.values()]
    measures = list(dict.fromkeys(key for cell in cells if isinstance(cell, Mapping) for key in cell))
    sections = []
    for measure in measures:
        rows = [
            [regime, *(_value(row.get(name, {}).get(measure)) for name in names)] for regime, row in covariances.items()
        ]
        sections.append(table([measure.replace("_", " "), *names], rows))
    return "\n".join(sections)


def _value(cell: Any) -> str:
    return number(cell.get("mean") if isinstance(cell, Mapping) else cell, 2)
