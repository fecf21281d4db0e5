"""The page of some fresh zoos of the accuracy suite: tables of the methods at defaults, from the rows of their runs.

    python benchmarks/fresh_told.py docs/results/fresh/rows docs/results/fresh-text.md --zoos decoder-full decoder-lora

The tables are put between two marks of the page, whose other text stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fresh_questions
import numpy as np
from fresh_questions import RIVALS, means
from zoo_models import write_tables

from cfmerge_accuracy import results, tables
from cfmerge_accuracy.results import Results


def overview(zoos: Sequence[Results]) -> str:
    """Every method in every zoo and in the mean, and by how much at most it is below the best of `RIVALS`."""
    found = means(zoos)
    names = [name for name in found[zoos[0].name] if all(name in each for each in found.values())]
    best = {zoo: max(each[name] for name in RIVALS if name in each) for zoo, each in found.items()}
    mean = {name: float(np.mean([each[name] for each in found.values()])) for name in names}
    rows = [
        [
            name,
            *(f"{each[name]:.1f}" for each in found.values()),
            f"{mean[name]:.1f}",
            f"{max(best[zoo] - each[name] for zoo, each in found.items()):.1f}",
        ]
        for name in sorted(names, key=lambda name: -mean[name])
    ]
    rows.append([f"best of the {len(RIVALS)}", *(f"{value:.1f}" for value in best.values()), "", ""])
    header = ["method", *found, "mean", "most below the best"]
    return tables.table(header, rows)


def perplexities(zoo: Results) -> str:
    """By domain, the geometric mean over seeds; and over domains."""
    rows: dict[str, list[Mapping[str, float]]] = {}
    for row in zoo.rows:
        for name, by_task in row["perplexities"].items():
            rows.setdefault(f"({name})", []).append(by_task)
        for entry in row["methods"]:
            if "perplexities" in entry:
                rows.setdefault(entry["name"], []).append(entry["perplexities"])

    def mean(values: Sequence[float]) -> float:
        return float(np.exp(np.mean(np.log(values))))

    told = {name: {task: mean([one[task] for one in each]) for task in zoo.tasks} for name, each in rows.items()}
    over = {name: mean([*each.values()]) for name, each in told.items()}
    lines = [
        [name, f"{over[name]:.1f}", *(f"{told[name][task]:.1f}" for task in zoo.tasks)]
        for name in sorted(told, key=lambda name: over[name])
    ]
    return tables.table(["perplexity", "mean", *zoo.tasks], lines)


def section(zoo: Results) -> str:
    """A zoo's own tables."""
    lines = zoo.lines("published")
    text = f"## {zoo.name}\n\n{tables.protocol(zoo)}\n{tables.references(zoo)}\n"
    text += f"{tables.methods(zoo, lines, 'published')}\n"
    text += tables.folded("Paired differences", tables.differences(zoo, lines, "published"))
    text += tables.folded("Accuracy by task", tables.by_task(zoo, lines, "published"))
    if all("perplexities" in row for row in zoo.rows):
        text += tables.folded("Perplexity by domain", perplexities(zoo))
    failed = tables.failures(zoo)
    return text + (f"\n### Failures and warnings\n\n{failed}\n" if failed else "\n")


def made_by(zoos: Sequence[Results]) -> str:
    """Seeds of each zoo, versions, machine and time."""
    found: dict[str, Any] = {}
    for row in (row for zoo in zoos for row in zoo.rows):
        kept = row["environment"]
        words = ", ".join(f"{name} {kept[name]}" for name in ("cfmerge", "jax", "flax", "python"))
        found[f"{words}, on {kept['machine']}"] = None
    minutes = sum(sum(row["seconds"].values()) for zoo in zoos for row in zoo.rows) / 60
    seeds = "; ".join(f"{zoo.name}: seeds {', '.join(map(str, zoo.seeds))}" for zoo in zoos)
    return f"{seeds}. Made with {'; '.join(found)}: {minutes:.0f} minutes of wall time, beside other work.\n"


def page(folder: Path, wanted: Sequence[str], brief: bool = False) -> str:
    """The tables of the zoos that have rows; if brief, those over all of them alone."""
    zoos = [zoo for zoo in results.read(folder)[0] if zoo.name in wanted]
    zoos.sort(key=lambda zoo: list(wanted).index(zoo.name))
    asked = fresh_questions.sections(zoos)
    own = [] if brief else map(section, zoos)
    return "\n".join([made_by(zoos), f"## All of them\n\n{overview(zoos)}", *asked, *own])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the folder `rows` of a run")
    parser.add_argument("page", type=Path, help="the Markdown file")
    parser.add_argument("--zoos", nargs="+", required=True, help="in the page's order")
    parser.add_argument("--brief", action="store_true", help="without each zoo's own tables")
    given = parser.parse_args()
    write_tables(given.page, "Fresh zoos: our measurements", page(given.rows.parent, given.zoos, given.brief))


if __name__ == "__main__":
    main()
