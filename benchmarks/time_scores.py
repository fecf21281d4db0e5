"""Scores of `time_study.py` by what was run, and what is made of them."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from time_stream import HELD_OUT

from cfmerge import temporal

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95 % interval of so many replicates
Row = Mapping[str, Any]


class Score(NamedTuple):
    """Knowledge accumulation, zero-shot retention, and their geometric mean; per cent."""

    ka: float
    zs: float
    gm: float


def score(row: Row) -> Score:
    """A row's score: over adaptation tasks, those to come too, and over held-out ones."""
    held = [name for name in row["scores"] if name in HELD_OUT]
    own = [name for name in row["scores"] if name not in HELD_OUT]
    ka, zs = temporal.knowledge_accumulation(row["scores"], own), temporal.zero_shot_retention(row["scores"], held)
    return Score(100 * ka, 100 * zs, 100 * temporal.geometric_mean(ka, zs))


class Told:
    """Scores by what was run.

    Attributes:
        main: size and steps of the main setting.
        count: tasks in the stream.
        seeds: replicates.
        chosen: weight and factors, a `time_study.Chosen`.
    """

    def __init__(self, rows: Iterable[Row], main: tuple[str, int], count: int, seeds: Sequence[int], chosen: Any):
        self.main, self.count, self.seeds, self.chosen = main, count, seeds, chosen
        self.rows = [row for row in rows if row["split"] == "test"]
        names = ("seed", "size", "steps", "init", "replay", "deploy", "step")
        self.scores = {tuple(row[name] for name in names): score(row) for row in self.rows}

    def at(
        self,
        init: str,
        deploy: str,
        replay: bool = False,
        step: int | None = None,
        setting: tuple[str, int] | None = None,
    ) -> dict[int, Score]:
        """By replicate, after the last task of the main setting unless others are named."""
        size, steps = setting or self.main
        step = self.count if step is None else step
        found = {s: self.scores.get((s, size, steps, init, replay, deploy, step)) for s in self.seeds}
        return {seed: one for seed, one in found.items() if one}

    def base(self, size: str | None = None) -> dict[int, Score]:
        return self.at("base", "base", step=0, setting=(size or self.main[0], 0))

    def multitask(self, step: int | None = None, setting: tuple[str, int] | None = None) -> dict[int, Score]:
        return self.at("multitask", "multitask", step=step, setting=setting)

    @property
    def mean(self) -> str:
        """The EMA by interpolation at the chosen weight."""
        rule: str = self.chosen.of_ema("average")
        return rule

    @property
    def names(self) -> list[str]:
        """Techniques."""
        return ["average", *self.chosen.ema]


def over(found: Mapping[int, Score], what: str = "gm") -> float:
    """The mean over replicates."""
    return float(np.mean([getattr(one, what) for one in found.values()])) if found else math.nan


def shown(found: Mapping[int, Score], what: str = "gm") -> str:
    return f"{over(found, what):.1f}" if found else ""


def each(found: Mapping[int, Score]) -> str:
    """The GM of every replicate."""
    return ", ".join(f"{one.gm:.1f}" for one in found.values())


def less(one: Mapping[int, Score], other: Mapping[int, Score]) -> str:
    """The mean difference of GM in the replicates that both have, with a 95 % interval where there are several."""
    both = [one[seed].gm - other[seed].gm for seed in one if seed in other]
    if not both:
        return ""
    if len(both) == 1:
        return f"{both[0]:+.1f}"
    half = T_95[len(both)] * float(np.std(both, ddof=1)) / math.sqrt(len(both))
    return f"{np.mean(both):+.1f} [{np.mean(both) - half:+.1f}, {np.mean(both) + half:+.1f}]"


CELLS = {"base + ema": ("base", "ema"), "last + ema": ("last", "ema"), "ema + ema": ("ema", "ema"),
         "base + all": ("base", "all"), "last + all": ("last", "all"), "ema + all": ("ema", "all")}  # fmt: skip


def of_technique(told: Told, name: str, init: str, deploy: str, replay: bool = False) -> dict[int, Score]:
    """Scores where the technique makes both what begins and what is deployed."""
    ema, every = told.chosen.of_ema(name), told.chosen.of_all(name)
    rules = {"base": "base", "last": "last", "ema": ema, "all": every}
    return told.at(rules[init], rules[deploy], replay)


def cube(told: Told) -> np.ndarray:
    """GM `(replicates, inits, deploys, techniques)` for init in (base, last, ema) and deploy in (last, ema, all)."""
    inits, deploys = ("base", "last", "ema"), ("last", "ema", "all")
    values = [
        [[[of_technique(told, name, i, d).get(seed, Score(*[math.nan] * 3)).gm for name in told.names] for d in deploys]
         for i in inits]
        for seed in told.seeds
    ]  # fmt: skip
    return np.array(values)


AXES = ("replicate", "init", "deploy", "technique")


def variance(cells: np.ndarray) -> dict[str, float]:
    """Shares of the sum of squares about the mean, of main effects and interactions, in per cent."""
    effects: dict[tuple[int, ...], np.ndarray] = {}
    for size in range(cells.ndim + 1):
        for axes in itertools.combinations(range(cells.ndim), size):
            others = tuple(axis for axis in range(cells.ndim) if axis not in axes)
            effects[axes] = cells.mean(axis=others, keepdims=True) - sum(
                effects[lower] for lower in effects if set(lower) < set(axes)
            )
    squares = {
        axes: float(np.sum(np.broadcast_to(effect, cells.shape) ** 2)) for axes, effect in effects.items() if axes
    }
    whole = sum(squares.values())
    return {" x ".join(AXES[axis] for axis in axes): 100 * one / whole for axes, one in squares.items()}
