"""TIME's findings on the project's own stream: which rules begin a task and deploy a model, and by which technique.

    python benchmarks/time_study.py -o docs/results --minutes 75     # runs what is missing, and writes page and plots
    python benchmarks/time_study.py -o docs/results --minutes 0      # page and plots alone

Named before anything was run: tasks, held-out tasks and orders (`time_stream.py`), and

- a replicate is a seed with an order; 0, 1, 2. Main setting: the medium base, 300 steps a task, eight tasks.
- KA: mean test accuracy over the eight adaptation tasks, those to come too; ZS: over the four held-out tasks;
  GM = sqrt(KA ZS), of the deployed model after every task. The last task's value is the headline.
- init: base, last, ema, and in part all and paint; deploy: last, ema, all. Experts with and without replay: half of a
  batch is drawn from 200 images of each task that has been.
- the weight of the newest in an EMA is chosen among WEIGHTS by the GM on validation images after the last task, with
  init and deploy by EMA of interpolation, in replicate 0; all replicates and techniques then have that weight.
- every technique but interpolation has a factor on its merged delta, chosen among FACTORS on the same validation images
  with experts that begin at the base: one for EMA (init and deploy), one for offline merging.
- weights by time: linear, squared, exponential, and linear backwards.
- growth: three sizes, three budgets, two to eight tasks; trained on all tasks at once for the same steps beside it.

Added after the weight was chosen (0.1, the least) and before its consequences were seen: every weight for every init in
all replicates; in growth an EMA of weight USUAL beside it, which the article's code has. The factors below 0.3 were
added when 0.3, until then the least, was the choice of six techniques of seven offline.

Added when last + ema was above ema + ema in replicate 0: last + ema in growth.

Seen before all this was fixed: scores of the medium base in replicate 0, and of four of its experts and their merges,
at three learning rates (1e-3, 5e-4, 2.5e-4: the first, the vision zoo's, makes the best experts, and stayed).

Rows are appended to `time.jsonl` as they come; a later call goes on where the rows end, and experts are in the cache.
"""

import argparse
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import time_drawn
import time_stream
import time_told
from time_stream import ORDERS, Params, Stream
from time_told import Told
from zoo_models import keep, kept, write_tables

from cfmerge import temporal

MAIN = ("medium", 300)
WEIGHTS = (0.1, 0.25, 0.5, 0.75)
USUAL = 0.5
FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
# by name: the method's text, and whether the EMA's weight is given to it (the others add both up, times their factor)
TECHNIQUES = {
    "average": ("average", True),
    "task_arithmetic": ("task_arithmetic(scale=1.0)", False),
    "ties": ("ties(density=0.2)", True),
    "dare_ties": ("dare_ties(p=0.5)", True),
    "breadcrumbs": ("breadcrumbs(scale=1.0)", False),
    "magmax": ("magmax(scale=1.0)", False),
    "ace": ("ace", True),
    "iso_c": ("iso_c", False),
}
BY_TIME = ("by_time='linear'", "by_time='squared'", "by_time='exponential'", "by_time='linear', backwards=True")


class Chain(NamedTuple):
    """Experts of one order, each begun by a rule."""

    seed: int
    size: str
    steps: int
    init: str  # a rule's text
    replay: bool


class Cell(NamedTuple):
    """Models of a chain by one deploy rule, after some of the tasks."""

    chain: Chain
    deploy: str
    at: tuple[int, ...]  # after how many tasks
    split: str = "test"

    def keys(self) -> list[tuple[Any, ...]]:
        return [(*self.chain, self.deploy, step, self.split) for step in self.at]


KEY = (*Chain._fields, "deploy", "step", "split")
Row = dict[str, Any]


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


# --- rules --------------------------------------------------------------------------------------------------------


def advanced(how: str, base: Params, before: Params, experts: Sequence[Params]) -> Params:
    """What a rule makes of the experts, from what it made of all but the newest: an EMA is one merge of two."""
    rule = temporal.rule(how)
    if rule.name != "ema" or (len(experts) == 1 and rule.seed == "first"):
        return temporal.combined(rule, base, experts)
    pair = msgspec.structs.replace(rule, seed="first")
    return temporal.combined(pair, base, [before, experts[-1]], seed=len(experts))


def made(how: str, base: Params, experts: Sequence[Params]) -> Iterator[Params]:
    """What a rule makes after each expert."""
    model = base
    for count in range(1, len(experts) + 1):
        model = advanced(how, base, model, experts[:count])
        yield model


def trained(of: Stream, chain: Chain, count: int) -> list[Params]:
    """The first experts of a chain."""
    begin, experts = of.base, list[Params]()
    for number, task in enumerate(of.order[:count]):
        before = of.order[:number] if chain.replay else ()
        experts.append(jax.device_get(time_stream.trained(of, begin, task, chain.steps, before)))
        begin = jax.device_get(advanced(chain.init, of.base, begin, experts))
    return experts


def ema(technique: str, weight: float, factor: float = 1.0) -> str:
    text, weighted = TECHNIQUES[technique]
    if technique == "average":
        return f"ema(weight={weight})"
    return f"ema(technique='{text} >> scale(factor={factor})'{f', weight={weight}' if weighted else ''})"


def offline(technique: str, factor: float = 1.0) -> str:
    return "all" if technique == "average" else f"all(technique='{TECHNIQUES[technique][0]} >> scale(factor={factor})')"


# --- what is run --------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """What validation images have decided: the EMA's weight, and each technique's factors."""

    weight: float
    ema: dict[str, float]
    offline: dict[str, float]

    def of_ema(self, technique: str) -> str:
        return ema(technique, self.weight, self.ema.get(technique, 1.0))

    def of_all(self, technique: str) -> str:
        return offline(technique, self.offline.get(technique, 1.0))


def every(count: int) -> tuple[int, ...]:
    return tuple(range(1, count + 1))


def weight_cells(main: tuple[str, int], count: int) -> list[Cell]:
    """For the choice of the weight."""
    rules = [ema("average", weight) for weight in WEIGHTS]
    return [
        Cell(Chain(0, *main, how, False), how, (count,), split) for how in rules for split in ("validation", "test")
    ]


def factor_cells(main: tuple[str, int], count: int, weight: float) -> list[Cell]:
    """For the choice of the factors."""
    chain = Chain(0, *main, "base", False)
    ways = [(name, factor) for name in TECHNIQUES if name != "average" for factor in FACTORS]
    rules = [rule for name, factor in ways for rule in (ema(name, weight, factor), offline(name, factor))]
    return [Cell(chain, rule, (count,), "validation") for rule in rules]


def cells(main: tuple[str, int], count: int, chosen: Chosen, seeds: Sequence[int]) -> list[Cell]:
    """The main setting: what matters most comes first."""
    mean, found, last = chosen.of_ema("average"), list[Cell](), (count,)
    others = [name for name in TECHNIQUES if name != "average"]
    for replay in (False, True):
        for seed in seeds:
            inits = [Chain(seed, *main, init, replay) for init in ("base", "last", mean)]
            found += [Cell(chain, deploy, every(count)) for chain in inits for deploy in ("last", mean, "all")]
            found += [Cell(inits[0], f"all({how})", last) for how in BY_TIME]
            found += [Cell(inits[0], chosen.of_all(name), last) for name in others]
    for seed in seeds:
        for name in others:
            own = Chain(seed, *main, chosen.of_ema(name), False)
            starts = [Chain(seed, *main, init, False) for init in ("base", "last")]
            found += [
                Cell(chain, deploy, last)
                for chain in (*starts, own)
                for deploy in (chosen.of_ema(name), chosen.of_all(name), *(["last"] if chain is own else []))
            ]
    for seed in seeds:
        for how in (ema("average", weight) for weight in WEIGHTS):
            found += [Cell(Chain(seed, *main, init, False), how, last) for init in ("base", "last", how)]
    for seed in seeds:
        paint = f"paint(weight={chosen.weight})"
        found += [Cell(Chain(seed, *main, init, False), deploy, every(count)) for init, deploy in
                  ((paint, paint), ("all", "all"), ("all", mean), ("all", "last"))]  # fmt: skip
    return found


def growth(main: tuple[str, int], count: int, chosen: Chosen, seeds: Sequence[int]) -> list[Cell]:
    """Sizes, budgets and numbers of tasks; `multitask` for a rule is the base trained on all at once."""
    mean, found = chosen.of_ema("average"), list[Cell]()
    fewer = tuple(range(2, count + 1, 2))
    for seed in seeds:
        usual = ema("average", USUAL)
        found += [Cell(Chain(seed, *main, "multitask", False), "multitask", fewer)]
        found += [Cell(Chain(seed, *main, usual, False), usual, every(count))]
    settings = [(size, steps) for steps in time_stream.BUDGETS for size in time_stream.SIZES if (size, steps) != main]
    for seed in seeds:
        for size, steps in settings:
            if seed != seeds[0] and size == "large":
                continue
            usual = ema("average", USUAL)
            ways = (mean, mean, False), ("base", "all", False), ("last", "last", True), (usual, usual, False)
            for init, deploy, replay in ways:
                found.append(Cell(Chain(seed, size, steps, init, replay), deploy, every(count)))
            found.append(Cell(Chain(seed, size, steps, "base", False), "last", every(count)))  # the experts themselves
            found += [Cell(Chain(seed, size, steps, "last", False), deploy, every(count)) for deploy in (mean, "last")]
            found.append(Cell(Chain(seed, size, steps, "multitask", False), "multitask", (count,)))
    return found


def best(rows: Iterable[Row], rules: dict[Any, str], count: int, where: str) -> Any:
    """The choice whose rule has the highest GM on validation images after the last task."""
    gm = {row[where]: time_told.score(row).gm for row in rows if row["split"] == "validation" and row["step"] == count}
    return max(rules, key=lambda choice: gm[rules[choice]])


def choose(rows: Sequence[Row], count: int, weight: float) -> Chosen:
    begun = [row for row in rows if row["init"] == "base"]
    names = [name for name in TECHNIQUES if name != "average"]
    return Chosen(
        weight,
        {name: best(begun, {f: ema(name, weight, f) for f in FACTORS}, count, "deploy") for name in names},
        {name: best(begun, {f: offline(name, f) for f in FACTORS}, count, "deploy") for name in names},
    )


# --- running ------------------------------------------------------------------------------------------------------


class Runner:
    """Fills a file of rows until the time is over."""

    def __init__(self, file: Path, streams: Any, minutes: float) -> None:
        self.file, self.streams, self.end = file, streams, time.monotonic() + 60 * minutes
        self.rows: list[Row] = kept(file)
        self.done = {key_of(row) for row in self.rows}

    def run(self, cells: Sequence[Cell]) -> bool:
        """Whether all of the cells have their rows now."""
        chains: dict[Chain, list[Cell]] = {}
        for cell in cells:
            chains.setdefault(cell.chain, []).append(cell)
        for chain, of in chains.items():
            todo = [cell for cell in of if not self.done.issuperset(cell.keys())]
            if todo and time.monotonic() > self.end:
                return False
            if todo:
                self.run_chain(chain, todo)
        return True

    def run_chain(self, chain: Chain, cells: Sequence[Cell]) -> None:
        of: Stream = self.streams(chain.seed, chain.size)
        self.row((chain.seed, chain.size, 0, "base", False, "base", 0, "test"), of, of.base, 0.0)
        if chain.init == "multitask":
            for count in (step for cell in cells for step in cell.at):
                begun = time.perf_counter()
                model = time_stream.multitask(of, of.order[:count], chain.steps)
                self.row((*chain, "multitask", count, "test"), of, model, time.perf_counter() - begun)
            return
        begun = time.perf_counter()
        experts = trained(of, chain, max(max(cell.at) for cell in cells))
        seconds = time.perf_counter() - begun
        for cell in cells:
            wanted = dict(zip(cell.at, cell.keys(), strict=True))
            if temporal.rule(cell.deploy).name == "ema":
                models = dict(enumerate(made(cell.deploy, of.base, experts[: max(cell.at)]), 1))
            else:
                models = {step: temporal.combined(cell.deploy, of.base, experts[:step]) for step in cell.at}
            for step, key in wanted.items():
                self.row(key, of, models[step], seconds)
                seconds = 0.0

    def row(self, key: tuple[Any, ...], of: Stream, model: Params, training: float) -> None:
        if key in self.done:
            return
        begun = time.perf_counter()
        scores = time_stream.scores(of, model, key[-1])
        row = dict(zip(KEY, key, strict=True)) | {
            "scores": {name: round(score, 5) for name, score in scores.items()},
            "seconds": {"training": round(training, 2), "scoring": round(time.perf_counter() - begun, 2)},
        }
        self.rows.append(row)
        self.done.add(key)
        keep(self.file, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--minutes", type=float, default=75)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # methods ask that their merges be evaluated, which is what happens here
    held: dict[tuple[int, str], Stream] = {}

    def streams(seed: int, size: str) -> Stream:
        if (seed, size) not in held:
            held[seed, size] = time_stream.stream(seed, size)
        return held[seed, size]

    runner, count, seeds = Runner(given.output / "time.jsonl", streams, given.minutes), 8, [*ORDERS]
    chosen = study(runner, MAIN, count, seeds)
    if chosen:
        told = Told(runner.rows, MAIN, count, seeds, chosen)
        write_tables(given.output / "time.md", "Merging over time: TIME on our own stream", time_told.tables(told))
        time_drawn.write(given.output, told)


def study(runner: Runner, main: tuple[str, int], count: int, seeds: Sequence[int]) -> Chosen | None:
    """Runs the choices, then what they decide, then growth; None: the time was over before all was chosen."""
    if not runner.run(weight_cells(main, count)):
        return None
    ways = {weight: ema("average", weight) for weight in WEIGHTS}
    weight = best((row for row in runner.rows if row["init"] == row["deploy"]), ways, count, "init")
    if not runner.run(factor_cells(main, count, weight)):
        return None
    chosen = choose(runner.rows, count, weight)
    runner.run(cells(main, count, chosen, seeds))
    runner.run(growth(main, count, chosen, seeds))
    return chosen


if __name__ == "__main__":
    main()
