"""How sure a mean over tasks and seeds is, and whether one method is better than another.

Values are `{seed: {task: number}}`, in any unit. Seeds and tasks are crossed: every seed sees the same tasks. So a
grid of `(S, T)` numbers is modelled as

    value[s, t] = mean + seed[s] + task[t] + rest[s, t]

with all three random. Everything of one seed moves together (it shares a base), and so does everything of one task;
the `S * T` numbers are not that many independent ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtr, stdtrit

Values = Mapping[int, Mapping[str, float]]  # by seed, then by task

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its interval; infinitely wide where one number is all there is.

    `p` is the two-sided probability of a mean at least so far from zero if the true one were zero.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    tasks: int

    @property
    def significant(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def normalised(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """A model's accuracies in per cent of the experts', by task; tasks whose expert is never right are left out."""
    return {task: 100 * value / experts[task] for task, value in accuracies.items() if experts.get(task, 0) > 0}


def grid(values: Values) -> Float[np.ndarray, "S T"]:
    """Seeds that have any value, by the tasks that all of these seeds have; both in order."""
    seeds = sorted(seed for seed, by_task in values.items() if by_task)
    common = set.intersection(*(set(values[seed]) for seed in seeds)) if seeds else set()
    return np.array([[values[seed][task] for task in sorted(common)] for seed in seeds], np.float64).reshape(
        len(seeds), len(common)
    )


def interval(values: Values) -> Interval:
    """The mean over seeds and tasks, with a 95 % interval for other seeds and other tasks of the same kind.

    The variance of the mean of a crossed grid is estimated by the mean squares of its margins:

        MS_S = T sum_s (mean[s] - mean)^2 / (S - 1)        MS_T = S sum_t (mean[t] - mean)^2 / (T - 1)
        variance = (MS_S + MS_T) / (S T)
        degrees of freedom = (MS_S + MS_T)^2 / (MS_S^2 / (S - 1) + MS_T^2 / (T - 1))        (Satterthwaite 1946)

    and a t interval is built on it. `rest` is counted twice here. The unbiased estimate subtracts it once, and can be
    negative, as every two-way clustered variance (Cameron, Gelbach and Miller 2011); left in, the interval errs on
    the wide side. In simulations of this model with 3 seeds and 6 or 8 tasks it holds the truth 93 to 99 times in
    100, for eight sets of the three variances; a bootstrap over seeds and tasks (Owen and Eckles 2012) 78 to 98 times,
    since three seeds are too few to draw from; a t interval over the tasks' means alone as rarely as 39 times, where
    seeds differ much.

    With one seed this is the t interval over tasks, which cannot see what another seed would change; with one task that
    over seeds. Tasks were chosen by hand, not drawn: "other tasks" means tasks such as these.
    """
    numbers = grid(values)
    seeds, tasks = numbers.shape
    if not numbers.size:
        return Interval(math.nan, -math.inf, math.inf, 1.0, seeds, tasks)
    mean = float(numbers.mean())
    squares, freedoms = [], []
    for axis, (across, along) in enumerate(((seeds, tasks), (tasks, seeds))):
        if across > 1:
            margins = numbers.mean(axis=1 - axis)
            squares.append(along * float(np.sum((margins - mean) ** 2)) / (across - 1))
            freedoms.append(across - 1)
    if not squares:
        return Interval(mean, -math.inf, math.inf, 1.0, seeds, tasks)
    error = math.sqrt(sum(squares) / numbers.size)
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, float(abs(mean) <= 1e-12), seeds, tasks)
    freedom = sum(squares) ** 2 / sum(square**2 / free for square, free in zip(squares, freedoms, strict=True))
    half = error * float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return Interval(mean, mean - half, mean + half, 2 * float(stdtr(freedom, -abs(mean) / error)), seeds, tasks)


def difference(a: Values, b: Values) -> dict[int, dict[str, float]]:
    """`a - b`, for the seeds and tasks that both have."""
    return {
        seed: {task: by_task[task] - b[seed][task] for task in by_task if task in b[seed]}
        for seed, by_task in a.items()
        if seed in b
    }


def paired(a: Values, b: Values) -> Interval:
    """The mean of `a - b` over pairs of the same seed and task: what is hard for both cancels.

    `significant` says that the interval excludes zero, for this one comparison. Where many methods are compared with
    one reference, about one in twenty equals would be called different: correct the `p` of a table by `holm`. Neither
    corrects for a reference that was chosen because it came out on top (it is flattered, and so are the differences to
    it), nor for looking at several tables, nor for the variants of a method that were tried.
    """
    return interval(difference(a, b))


def holm(probabilities: Mapping[str, float]) -> dict[str, float]:
    """Probabilities adjusted so that below 0.05 the chance of any false finding among all is below 0.05 (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(probabilities, key=lambda name: probabilities[name])):
        largest = max(largest, min(1.0, (len(probabilities) - rank) * probabilities[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in probabilities}


def same_sign(a: Values, b: Values) -> bool:
    """Whether the mean over tasks of `a - b` has one sign on every seed (a tie has none)."""
    signs = {np.sign(np.mean(list(by_task.values()))) for by_task in difference(a, b).values() if by_task}
    return len(signs) == 1 and 0 not in signs


class Ordering(NamedTuple):
    """How methods rank on each seed, and which pairs' order does not depend on it.

    Attributes:
        rankings: names, the best first, by seed; of the methods that every seed has.
        pairs: `(better, worse)` for every pair that has this order on every seed.
        significant: those of `pairs` whose paired difference excludes zero (not corrected for their number).
        total: how many pairs there are.
    """

    rankings: Mapping[int, Sequence[str]]
    pairs: frozenset[tuple[str, str]]
    significant: frozenset[tuple[str, str]]
    total: int


def ordering(methods: Mapping[str, Values]) -> Ordering:
    """Rankings by the mean over tasks, and the pairs of methods that are in the same order on every seed."""
    seeds = sorted({seed for values in methods.values() for seed in values})
    complete = {name: values for name, values in methods.items() if all(values.get(seed) for seed in seeds)}
    rankings = {}
    for seed in seeds:
        means = {name: float(np.mean(list(values[seed].values()))) for name, values in complete.items()}
        rankings[seed] = sorted(means, key=lambda name: (-means[name], name))
    pairs, significant, total = set(), set(), 0
    for a, b in itertools.combinations(complete, 2):
        total += 1
        if same_sign(complete[a], complete[b]):
            found = paired(complete[a], complete[b])
            pair = (a, b) if found.mean > 0 else (b, a)
            pairs.add(pair)
            if found.significant:
                significant.add(pair)
    return Ordering(rankings, frozenset(pairs), frozenset(significant), total)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equals share their mean; NaN if all of either are equal."""
    ranked = np.stack([_ranks(np.asarray(values, np.float64)) for values in (x, y)])
    if len(x) < 3 or np.any(np.ptp(ranked, axis=1) == 0):
        return math.nan
    return float(np.corrcoef(ranked)[0, 1])


def _ranks(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """The mean rank of each value among all: how many are below it, and half of its equals."""
    below = np.sum(values[None, :] < values[:, None], axis=1)
    equal = np.sum(values[None, :] == values[:, None], axis=1)
    return below + (equal - 1) / 2
