"""Where to start from: does a merge of others' experts make a better start of fine-tuning on a new task than the base?

    python benchmarks/start_study.py -o docs/results --minutes 30     # runs what is missing, and writes the page
    python benchmarks/start_study.py -o docs/results --minutes 0      # the page alone

Every second domain of the accuracy suite's `decoder-full` zoo is held out in turn. Starts are the base, the best single
one of the other experts (that with the least perplexity on the new domain's validation text), and merges of all others.
From each, all weights are fine-tuned on the held-out domain, with and without weight decay. Expectations stand in
docs/results/starts.md, and were written down before anything was run. Rows are appended to `starts.jsonl` as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import table
from zoo_models import keep, kept, write_tables

import cfmerge
from cfmerge_accuracy import statistics
from cfmerge_accuracy.decoder import suite, train
from cfmerge_accuracy.zoo import Params, Zoo

TITLE = "Which start for a new task: our measurements"
SEEDS = (0, 1, 2)
MERGES = ("average", "ties", "ace")
STARTS = ("base", "best single", *MERGES)
DOMAINS = suite.PLAN.domains[::2]
STEPS = (0, 10, 40)  # an expert of the zoo has 120
DECAYS = (0.0, 1.0)  # AdamW's; times the learning rate, which sums to some two hundredths over 40 steps


class Cell(NamedTuple):
    """One row: which domain is new, where its fine-tuning starts, how long it is, and how strong its decay."""

    seed: int
    held_out: str
    start: str
    steps: int
    decay: float


def cells(domains: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """All of a seed before the next; a start that is not trained has no decay."""
    for seed, held_out, steps, decay, start in itertools.product(seeds, domains, STEPS, DECAYS, STARTS):
        if steps or not decay:
            yield Cell(seed, held_out, start, steps, decay)


def best_single(zoo: Zoo, held_out: str) -> str:
    """The other expert with the least perplexity on validation text of the domain that is held out."""
    others = [task for task in zoo.tasks if task != held_out]
    return min(others, key=lambda task: zoo.perplexities(zoo.experts[task], "validation", [held_out])[held_out])


def started(zoo: Zoo, held_out: str, start: str) -> Params:
    """The parameters that fine-tuning starts from; no merge has seen the held-out domain's expert."""
    others = {task: params for task, params in zoo.experts.items() if task != held_out}
    if start == "base":
        return zoo.base
    if start == "best single":
        return others[best_single(zoo, held_out)]
    return cfmerge.merge_params(zoo.base, others, cfmerge.methods.make(start), seed=zoo.seed)


def measured(made: suite.Made, zoo: Zoo, cell: Cell, start: Params) -> dict[str, Any]:
    """A cell's row: accuracy and perplexity on test text after its steps."""
    begun, params = time.perf_counter(), start
    if cell.steps:
        recipe = dataclasses.replace(made.plan.experts["full"], steps=cell.steps, weight_decay=cell.decay)
        number = zoo.tasks.index(cell.held_out)
        params, _ = train.fit(made.plan.net, recipe, start, [cell.seed, number, 1], made.domains[cell.held_out].train)
    return cell._asdict() | {
        "accuracy": zoo.accuracies(params, "test", [cell.held_out])[cell.held_out],
        "perplexity": zoo.perplexities(params, "test", [cell.held_out])[cell.held_out],
        "expert": zoo.accuracies(zoo.experts[cell.held_out], "test", [cell.held_out])[cell.held_out],
        "single": best_single(zoo, cell.held_out) if cell.start == "best single" else None,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def run(file: Path, seeds: Sequence[int], domains: Sequence[str], minutes: float, plan: suite.Plan, label: str) -> None:
    """Adds the rows that are missing, until the time is over."""
    end = time.monotonic() + 60 * minutes
    done = {Cell(*(row[name] for name in Cell._fields)) for row in kept(file)}
    for seed in seeds:
        todo = [cell for cell in cells(domains, [seed]) if cell not in done]
        if not todo or time.monotonic() > end:
            continue
        made = suite.build(plan, "full", seed, label, print)
        zoo = made.zoo()
        for (held_out, start), some in itertools.groupby(
            sorted(todo, key=lambda cell: (domains.index(cell.held_out), STARTS.index(cell.start))),
            key=lambda cell: (cell.held_out, cell.start),
        ):
            begin = started(zoo, held_out, start)
            for cell in some:
                if time.monotonic() > end:
                    return
                keep(file, measured(made, zoo, cell, begin))


# --- the page -----------------------------------------------------------------------------------------------------


def accuracies(rows: Sequence[dict[str, Any]], start: str, steps: int, decay: float) -> statistics.Values:
    """In per cent, by seed and domain."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (row["start"], row["steps"], row["decay"]) == (start, steps, decay):
            found.setdefault(row["seed"], {})[row["held_out"]] = 100 * row["accuracy"]
    return found


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy by start, steps and decay, and differences to the base and to the best single expert."""
    settings = [(steps, decay) for steps in STEPS for decay in DECAYS if steps or not decay]

    def told(steps: int, decay: float) -> str:
        return f"{steps} steps" + (f", decay {decay:g}" if steps else "")

    def mean(start: str, steps: int, decay: float) -> str:
        found = [value for by in accuracies(rows, start, steps, decay).values() for value in by.values()]
        return f"{np.mean(found):.2f}" if found else ""

    def less(start: str, other: str, steps: int, decay: float) -> str:
        pair = statistics.paired(accuracies(rows, start, steps, decay), accuracies(rows, other, steps, decay))
        return f"{pair.mean:+.2f} [{pair.low:+.2f}, {pair.high:+.2f}]" if np.isfinite(pair.mean) else ""

    plain = [{"start": start} | {told(*one): mean(start, *one) for one in settings} for start in STARTS]
    parts = [f"Accuracy on the held-out domain's test text, per cent:\n\n{table(plain)}"]
    for other in ("base", "best single"):
        some = [start for start in STARTS if start != other and (other, start) != ("best single", "base")]
        against = [{"start": start} | {told(*one): less(start, other, *one) for one in settings} for start in some]
        parts.append(f"Less that from the {other} [95 %], paired by domain and seed:\n\n{table(against)}")
    pulled = [
        {"start": start} | {f"{steps} steps": decayed(rows, start, steps) for steps in STEPS if steps}
        for start in STARTS
    ]
    parts.append(f"With decay less without [95 %]:\n\n{table(pulled)}")
    seeds, domains = sorted({row["seed"] for row in rows}), list(dict.fromkeys(row["held_out"] for row in rows))
    seconds = sum(row["seconds"] for row in rows)
    parts.insert(0, f"{len(rows)} rows: seeds {seeds}, domains {', '.join(domains)}; {seconds / 60:.0f} minutes.\n")
    return "\n".join(parts)


def decayed(rows: Sequence[dict[str, Any]], start: str, steps: int) -> str:
    pair = statistics.paired(*(accuracies(rows, start, steps, decay) for decay in reversed(DECAYS)))
    return f"{pair.mean:+.2f} [{pair.low:+.2f}, {pair.high:+.2f}]" if np.isfinite(pair.mean) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"), help="folder of rows and page")
    parser.add_argument("--minutes", type=float, default=30, help="no row is begun later; 0: the page alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--domains", nargs="+", default=DOMAINS, choices=suite.PLAN.domains)
    given = parser.parse_args()
    file = given.output / "starts.jsonl"
    if given.minutes:
        run(file, given.seeds, given.domains, given.minutes, suite.PLAN, "")
    write_tables(given.output / "starts.md", TITLE, tables(kept(file)))


if __name__ == "__main__":
    main()
