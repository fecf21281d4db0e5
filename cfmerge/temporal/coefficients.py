"""Rules that are weighted sums: the coefficient of each expert, and how a running model follows the experts.

Interpolation and task arithmetic give `r = theta_0 + sum_s c_s D_s`. A pair (running, new) is merged with the factors
(a, b), by interpolation `(1-w, w)`, by task arithmetic with scale s `(s, s)`; so, for experts 1 .. t,

    ema    c_s = b a^(t-s), or, seeded by the first expert, c_1 = a^(t-1)
    paint  c_t = b
    all    c_s = w_s / sum(w) by interpolation, s w_s by task arithmetic

A running model with coefficients c follows to others, c', by

    r' = theta_0 + rho (r - theta_0) + sum_s (c'_s - rho c_s) D_s,      rho = c'_u / c_u, u the newest that both have

and reads those experts alone whose term is not zero: the newest where one has come; the oldest, and the second, where
a window slides (`r <- d r + (1-d) theta_(k+1) + d^(k+1) (theta_1 - theta_0)` is this for the mean of a training run);
the one that is forgotten. Where all would have to be read it is made anew.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cfmerge.core.numbers import is_number
from cfmerge.methods import Method
from cfmerge.temporal.rules import All, Ema, Paint, Rule

ROUNDING = 1e-12  # relative to the largest coefficient: less is what rounding has left of zero
Coefficients = Mapping[int, float]  # by the expert's number


class Step(NamedTuple):
    """How a running model follows: its own factor (None: it is made anew), and those of the experts that are read."""

    running: float | None
    experts: Coefficients


def factors(method: Method, weights: Sequence[float]) -> list[float] | None:
    """The factor of each expert's delta, where the method is a weighted sum with one scale; else None."""
    if method.name in {"average", "linear"} and method.needs.normalises:
        scale, normalised = 1.0, True
    elif method.name == "task_arithmetic" and is_number(method.parameters["scale"]):
        scale, normalised = float(method.parameters["scale"]), method.parameters["normalise"]
    else:
        return None
    total = sum(weights) if normalised else 1.0
    return [scale * weight / total for weight in weights]


def coefficients(rule: Rule, experts: Sequence[int]) -> dict[int, float] | None:
    """The coefficients of the experts, whose numbers are given oldest first; None: the rule is no weighted sum."""
    count = len(experts)
    match rule:
        case All():
            elements = count + rule.with_base
            found = factors(rule.method, rule.weights(elements))
            return None if found is None else dict(zip(experts, found[elements - count :], strict=True))
        case Ema() | Paint():
            pair = factors(rule.method, rule.weights)
            if pair is None:
                return None
            a, b = pair
            if isinstance(rule, Paint):
                return {experts[-1]: b}
            found = [b * a ** (count - s) for s in range(1, count + 1)]
            if rule.seed == "first":
                found[0] = a ** (count - 1)
            return dict(zip(experts, found, strict=True))
        case _:
            return None


def step(kept: Coefficients | None, wanted: Coefficients, there: set[int] | None = None) -> Step:
    """The step from a running model with coefficients `kept` (None: there is none) to those that are wanted.

    >>> from cfmerge.temporal.coefficients import step
    >>> step({1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}, {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25})  # a window slides
    Step(running=1.0, experts={5: 0.25, 1: -0.25})

    Args:
        there: the experts that can be read; None: all.
    """
    anew = Step(None, _nonzero(wanted, wanted))
    common = [number for number in wanted if (kept or {}).get(number)]
    if kept is None or not common:
        return anew
    rho = wanted[common[-1]] / kept[common[-1]]
    numbers = dict.fromkeys([*wanted, *kept])
    terms = {number: wanted.get(number, 0.0) - rho * kept.get(number, 0.0) for number in numbers}
    follows = Step(rho, _nonzero(terms, wanted))
    possible = [way for way in (anew, follows) if there is None or set(way.experts) <= there]
    return min(possible or [follows], key=lambda way: len(way.experts))


def _nonzero(terms: Coefficients, wanted: Coefficients) -> dict[int, float]:
    least = ROUNDING * max(map(abs, wanted.values()), default=0.0)
    return {number: term for number, term in terms.items() if abs(term) > least}
