"""The runs of `time_study.py`: chains of experts, rules that models are deployed by, and the choices before them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from time_scores import score

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


def ema(technique: str, weight: float, factor: float = 1.0) -> str:
    text, weighted = TECHNIQUES[technique]
    if technique == "average":
        return f"ema(weight={weight})"
    return f"ema(technique='{text} >> scale(factor={factor})'{f', weight={weight}' if weighted else ''})"


def offline(technique: str, factor: float = 1.0) -> str:
    return "all" if technique == "average" else f"all(technique='{TECHNIQUES[technique][0]} >> scale(factor={factor})')"


class Chosen(NamedTuple):
    """The choices by validation images: the EMA's weight, and each technique's factors."""

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


def main_cells(main: tuple[str, int], count: int, chosen: Chosen, seeds: Sequence[int]) -> list[Cell]:
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
    return found


def other_weights(
    main: tuple[str, int], count: int, seeds: Sequence[int], weights: Sequence[float], replay: bool
) -> list[Cell]:
    """Weights of an EMA that makes what is deployed, and in one of three also what begins."""
    found = list[Cell]()
    for weight, seed in itertools.product(weights, seeds):
        how = ema("average", weight)
        found += [Cell(Chain(seed, *main, init, replay), how, (count,)) for init in ("base", "last", how)]
    return found


def other_inits(main: tuple[str, int], count: int, chosen: Chosen, seeds: Sequence[int]) -> list[Cell]:
    """Tasks that begin at the base merged with the newest expert, or at all experts merged."""
    paint, mean, found = f"paint(weight={chosen.weight})", chosen.of_ema("average"), list[Cell]()
    for seed in seeds:
        pairs = ((paint, paint), ("all", "all"), ("all", mean), ("all", "last"))
        found += [Cell(Chain(seed, *main, init, False), deploy, every(count)) for init, deploy in pairs]
    return found


def fewer_tasks(main: tuple[str, int], count: int, seeds: Sequence[int]) -> list[Cell]:
    """The base trained at once on all tasks that have come so far: `multitask` for a rule."""
    return [Cell(Chain(seed, *main, "multitask", False), "multitask", tuple(range(2, count + 1, 2))) for seed in seeds]


def growth(
    count: int, chosen: Chosen, seed: int, size: str, budgets: Sequence[int], sequential: bool = True
) -> list[Cell]:
    """Budgets of a size; `sequential`: sequential training with replay too."""
    mean, found = chosen.of_ema("average"), list[Cell]()
    for steps in budgets:
        found.append(Cell(Chain(seed, size, steps, mean, False), mean, every(count)))
        found.append(Cell(Chain(seed, size, steps, "multitask", False), "multitask", (count,)))
        found += [Cell(Chain(seed, size, steps, "base", False), deploy, every(count)) for deploy in ("all", "last")]
        found += [Cell(Chain(seed, size, steps, "last", True), "last", every(count))] if sequential else []
    return found


def best(rows: Iterable[Row], rules: dict[Any, str], count: int, where: str) -> Any:
    """The choice whose rule has the highest GM on validation images after the last task."""
    gm = {row[where]: score(row).gm for row in rows if row["split"] == "validation" and row["step"] == count}
    return max(rules, key=lambda choice: gm[rules[choice]])


def choose_weight(rows: Sequence[Row], count: int) -> float:
    """The weight of an EMA for both init and deploy."""
    both = [row for row in rows if row["init"] == row["deploy"]]
    found: float = best(both, {weight: ema("average", weight) for weight in WEIGHTS}, count, "init")
    return found


def choose(rows: Sequence[Row], count: int, weight: float) -> Chosen:
    """The factors, with experts that begin at the base."""
    begun = [row for row in rows if row["init"] == "base"]
    names = [name for name in TECHNIQUES if name != "average"]
    return Chosen(
        weight,
        {name: best(begun, {f: ema(name, weight, f) for f in FACTORS}, count, "deploy") for name in names},
        {name: best(begun, {f: offline(name, f) for f in FACTORS}, count, "deploy") for name in names},
    )
