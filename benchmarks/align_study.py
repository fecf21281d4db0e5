"""Models of different initialisation: what matching, REPAIR, ZipIt! and OT fusion keep of them, in small networks.

    python benchmarks/align_study.py -o docs/results --minutes 45     # runs what is missing, and writes page and plots
    python benchmarks/align_study.py -o docs/results --minutes 0      # page and plots alone

Networks, data, measures and expectations stand in docs/results/align.md, and were written down before anything was run.
Rows are appended to `align.jsonl` as they come; a later call goes on where the rows end, and trained models are in the
cache.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import align_drawn
import align_merges
import align_told
from zoo_models import keep, kept, write_tables

TITLE = "Models of different initialisation: our measurements"
INPUTS, BUDGET = 2000, 0.125
SEEDS = (0, 1, 2)
REPLICATES = (0, 1, 2)
PAIRS = ((0, 1), (0, 2), (1, 2))
SAME = ("mlp-256", "conv-16", "vit-64", "mlp-64", "mlp-128", "mlp-512", "conv-8", "conv-32", "batch-16")
THREE = ("mlp-256", "conv-16", "mlp-512", "conv-32")
OTHER = ("mlp-256", "conv-32", "batch-32")
UNEQUAL = ("mlp-64 mlp-256", "mlp-256 mlp-64")  # the second has the width of the result


class Cell(NamedTuple):
    """One row: what is merged, how, and what is measured of it."""

    part: str  # pair, several, zip, unequal
    net: str
    who: tuple[int, ...]  # seeds, or the replicate
    method: str
    repair: bool = False
    stop: int = 0  # how many layers are one trunk
    inputs: int = INPUTS
    budget: float = BUDGET


class Run:
    """A file of rows, and the time until it is to end."""

    def __init__(self, file: Path, minutes: float) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = kept(file)
        self.done = {cell_of(row) for row in self.rows}

    def go(self, cells: Sequence[Cell]) -> bool:
        """Whether all of the cells have their rows now."""
        for cell in cells:
            if cell in self.done:
                continue
            if time.monotonic() > self.end:
                return False
            begun = time.perf_counter()
            row = {
                **cell._asdict(),
                "who": [*cell.who],
                **measured(cell),
                "seconds": round(time.perf_counter() - begun, 2),
            }
            self.rows.append(row)
            self.done.add(cell)
            keep(self.file, row)
        return True


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(**{**{name: row[name] for name in Cell._fields}, "who": tuple(row["who"])})


def measured(cell: Cell) -> dict[str, Any]:
    """The figures of a cell."""
    if cell.part == "pair":
        return align_merges.pair(cell.net, cell.who, cell.method, cell.repair, cell.inputs)
    if cell.part == "several":
        return align_merges.several(cell.net, cell.who, cell.method, cell.repair, cell.inputs)
    if cell.part == "unequal":
        return align_merges.unequal(cell.net, cell.who, cell.method, cell.inputs)
    return align_merges.zipped(cell.net, cell.who, cell.method, cell.repair, cell.stop, cell.inputs, cell.budget)


# --- cells --------------------------------------------------------------------------------------------------------


def cells() -> Iterator[Cell]:
    """All of them, by what they are worth."""
    for replicate, net in itertools.product(REPLICATES, OTHER):
        yield from other_classes(net, (replicate,))
    for which, net in itertools.product(PAIRS, SAME):
        yield from same_classes(net, which)
    for net in THREE:
        yield from three(net)
    for which, nets in itertools.product(PAIRS, UNEQUAL):
        yield from (Cell("unequal", nets, which, method) for method in ("members", "ot"))


def same_classes(net: str, who: tuple[int, ...]) -> Iterator[Cell]:
    """Curves between two models; heads of a transformer have no features that their order could be told by."""
    methods = ("none", "weights", *(() if net.startswith("vit") else ("activations",)), "ot")
    for method, repair in itertools.product(methods, (False, True)):
        if not (method == "ot" and (repair or net.startswith("batch"))):
            yield Cell("pair", net, who, method, repair)


def three(net: str) -> Iterator[Cell]:
    """Means of three models."""
    yield from (Cell("several", net, SEEDS, method) for method in ("members", "ensemble"))
    for method, repair in itertools.product(("none", "weights", "activations", "merge_many", "c2m3"), (False, True)):
        yield Cell("several", net, SEEDS, method, repair)


def other_classes(net: str, who: tuple[int, ...]) -> Iterator[Cell]:
    """Zips of two models of five classes each, at every stop."""
    yield Cell("zip", net, who, "ensemble")
    stops = range(1, 1 + (4 if net.startswith(("conv", "batch")) else 3))
    normed = net.startswith("batch")
    for method, stop in itertools.product(("none", "weights", "activations", "zip"), stops):
        for repair in (False, True):
            if not (method == "zip" and repair and not normed):
                yield Cell("zip", net, who, method, repair, stop)
    for stop in stops:
        yield from (Cell("zip", net, who, "zip", normed, stop, inputs) for inputs in (50, 500))
        yield from (Cell("zip", net, who, "zip", normed, stop, INPUTS, budget) for budget in (0.0, 0.5, 1.0))
        yield Cell("zip", net, who, "from weights", normed, stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--minutes", type=float, default=45)
    given = parser.parse_args()
    run = Run(given.output / "align.jsonl", given.minutes)
    if not run.go([*cells()]):
        print("not all rows are there: the time is over")
    write_tables(given.output / "align.md", TITLE, align_told.tables(run.rows))
    align_drawn.write(given.output, run.rows)


if __name__ == "__main__":
    main()
