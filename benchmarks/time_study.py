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

Added later: every weight for every init in all replicates, when ema + ema at every weight had been seen in replicate 0
and 0.1, the least, was chosen. Factors below 0.3, when 0.3, until then the least, was the choice of six techniques of
seven offline. Weights with replay, when last + ema was above ema + ema in replicate 0. The order of the cells of growth
changed several times as time ran out.

Seen before all this was fixed: scores of the medium base in replicate 0, and of four of its experts and their merges,
at three learning rates (1e-3, 5e-4, 2.5e-4: the first, the vision zoo's, makes the best experts, and stayed).

Rows are appended to `time.jsonl` as they come; a later call goes on where the rows end, and experts are in the cache.
"""

import argparse
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import msgspec
import time_cells
import time_drawn
import time_stream
import time_told
from time_cells import KEY, Cell, Chain, Chosen, Row, key_of
from time_scores import Told
from time_stream import ORDERS, Params, Stream
from zoo_models import keep, kept, write_tables

from cfmerge import temporal

# as a sum's last bits depend on the number of threads, and a cached expert is found by the bits that it began at
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def advanced(how: str, base: Params, before: Params, experts: Sequence[Params]) -> Params:
    """The model that a rule makes of the experts, from its model of all but the newest: an EMA merges two."""
    rule = temporal.rule(how)
    if rule.name != "ema" or (len(experts) == 1 and rule.seed == "first"):
        return temporal.combined(rule, base, experts)
    pair = msgspec.structs.replace(rule, seed="first")
    return temporal.combined(pair, base, [before, experts[-1]], seed=len(experts))


def made(how: str, base: Params, experts: Sequence[Params]) -> Iterator[Params]:
    """The models that a rule makes after each expert."""
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
    os.environ.setdefault("XLA_FLAGS", ONE_CORE)  # before the first array
    warnings.simplefilter("ignore")  # methods ask that their merges be evaluated, which is what happens here
    held: dict[tuple[int, str], Stream] = {}

    def streams(seed: int, size: str) -> Stream:
        if (seed, size) not in held:
            held[seed, size] = time_stream.stream(seed, size)
        return held[seed, size]

    runner, count, seeds = Runner(given.output / "time.jsonl", streams, given.minutes), 8, [*ORDERS]
    chosen = study(runner, time_cells.MAIN, count, seeds)
    if chosen:
        told = Told(runner.rows, time_cells.MAIN, count, seeds, chosen)
        write_tables(given.output / "time.md", "Merging over time: TIME on our own stream", time_told.tables(told))
        time_drawn.write(given.output, told)


def study(runner: Runner, main: tuple[str, int], count: int, seeds: Sequence[int]) -> Chosen | None:
    """Runs the choices, then what they decide, then growth; None: the time was over before all was chosen."""
    if not runner.run(time_cells.weight_cells(main, count)):
        return None
    weight = time_cells.choose_weight(runner.rows, count)
    if not runner.run(time_cells.factor_cells(main, count, weight)):
        return None
    chosen = time_cells.choose(runner.rows, count, weight)
    runner.run([*time_cells.main_cells(main, count, chosen, seeds), *time_cells.fewer_tasks(main, count, seeds)])
    runner.run(later(main, count, chosen, seeds))
    return chosen


def later(main: tuple[str, int], count: int, chosen: Chosen, seeds: Sequence[int]) -> list[Cell]:
    """The cells after the main setting, by what they are worth and what they cost."""
    *cheap, dear = time_stream.SIZES
    budgets = time_stream.BUDGETS
    growth, weights = partial(time_cells.growth, count, chosen), partial(time_cells.other_weights, main, count)
    found = [cell for size in cheap for cell in growth(seeds[0], size, budgets, sequential=False)]
    found += growth(seeds[0], dear, budgets[:1], sequential=False)
    found += [*weights(seeds, time_cells.WEIGHTS[1:3], False), *weights(seeds, [time_cells.USUAL], True)]
    found += [cell for cell in growth(seeds[0], dear, budgets[1:], sequential=False) if cell.chain.init != "base"]
    found += [cell for seed in seeds for size in cheap for cell in growth(seed, size, budgets)]
    found += [cell for replay in (False, True) for cell in weights(seeds, time_cells.WEIGHTS, replay)]
    found += time_cells.other_inits(main, count, chosen, seeds)
    return found + growth(seeds[0], dear, budgets)


if __name__ == "__main__":
    main()
