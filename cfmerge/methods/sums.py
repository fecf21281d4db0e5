"""Weighted sums of deltas: averages, task arithmetic, and sums with weights of their own.

With `N = sum_t w_t D_t` and `w = sum_t w_t`

    average           N / w                          Model Soups, arXiv 2203.05482
    task_arithmetic   scale N                        arXiv 2212.04089
    linear            (sum_t w_t W_t) / w - W_0      = N / w; not normalised: N + (w - 1) W_0
    metagpt           sum_t lambda_t D_t             lambda_t = n_t / sum n_t, n_t the energy of expert t; 2406.11385
    expo              (1 + alpha) D_1                = W_1 + alpha (W_1 - W_0) - W_0; arXiv 2404.16792

All are entrywise and take tensors of any shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check_number
from cfmerge.core.numbers import Number
from cfmerge.core.part import Context, Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Measure, Survey
from cfmerge.covariance import energy


class Sum(NamedTuple):
    """`total = sum_t w_t D_t` and `weight = sum_t w_t`."""

    total: Float[Array, "..."]
    weight: Float[Array, ""]


def init(base: Float[Array, "..."]) -> Sum:
    return Sum(jnp.zeros_like(base), jnp.zeros((), base.dtype))


def update(statistic: Sum, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Sum:
    return Sum(statistic.total + weight * delta, statistic.weight + weight)


def mean(statistic: Sum) -> Float[Array, "..."]:
    """`total / weight`, or the total where the weights sum to 0."""
    return linalg.weighted_mean(statistic.total, statistic.weight)


@register
def average() -> Method:
    """The mean of the deltas, weighted by the experts' weights.

    Source: Wortsman et al., Model Soups, ICML 2022, arXiv 2203.05482.
    """
    return _sum("average", mean, normalises=True)


def _sum(name: str, merged: Callable[[Sum], Array], **needs: Any) -> Method:
    """The method of a merged delta that follows from the sum."""
    own = Needs("entry", **needs)
    return Method(name, init, update, lambda sums: (merged(sums), {}), needs=own, statistic="sum", joint=True)


@register
def task_arithmetic(scale: Number = 0.3, normalise: bool = False) -> Method:
    """The sum of the deltas, each times its weight, all times one scale.

    Args:
        scale: the scaling coefficient; 0.3 is the paper's for eight vision tasks, `1 / T` is the average.
        normalise: divide by the sum of the weights too (mergekit's `normalize`).

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    check_number("task_arithmetic: scale", scale)

    def merged(statistic: Sum) -> Array:
        return as_array(scale, statistic.total.dtype) * (mean(statistic) if normalise else statistic.total)

    return _sum("task_arithmetic", merged, normalises=normalise)


class SumWithBase(NamedTuple):
    base: Float[Array, "..."]
    sum: Sum


@register
def linear(normalise: bool = True) -> Method:
    """The weighted sum of the experts' full weights.

    Args:
        normalise: divide by the sum of the weights, which gives `average`. Without it the base counts too:
            experts with weights that sum to 0.9 lose a tenth of it.

    Source: Wortsman et al., Model Soups, ICML 2022, arXiv 2203.05482.
    """
    if normalise:
        return _sum("linear", mean, normalises=True)

    def solve(statistic: SumWithBase) -> tuple[Array, Report]:
        base, (total, weight) = statistic
        return total + (weight - 1) * base, {}

    return Method(
        "linear",
        lambda base: SumWithBase(base, init(base)),
        lambda statistic, delta, weight=1.0: SumWithBase(statistic.base, update(statistic.sum, delta, weight)),
        solve,
        needs=Needs("entry"),
        additive=False,  # the base is not a sum over experts
    )


@register
def metagpt() -> Method:
    """The sum of the deltas, each times its expert's share of the squared norm of all deltas of the whole model.

    Without a survey of the model (in `update` alone) the shares are those of the tensor.

    Source: Zhou et al., MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic, EMNLP 2024,
        arXiv 2406.11385.
    """

    def look(entries: int, own: Sequence[Any]) -> Look:
        energies = yield Measure(energy)
        return energies / _nonzero(energies.sum())

    def informed(found: Found) -> Method:
        def update_by_share(statistic: Sum, delta: Array, weight: float | Array, context: Context) -> Sum:
            return update(statistic, delta, jnp.asarray(found.model, delta.dtype)[context.number])

        return Method("metagpt", init, update_by_share, lambda sums: (sums.total, {}), needs=needs, joint=True)

    def update_alone(statistic: Sum, delta: Array, weight: float | Array = 1.0) -> Sum:
        return update(statistic, delta, energy(delta))

    needs = Needs("entry", weights="none")
    return Method(
        "metagpt",
        init,
        update_alone,
        lambda sums: (mean(sums), {}),
        needs=needs,
        survey=Survey(look, informed, rows=True),
        joint=True,
    )


def _nonzero(value: Any) -> Any:
    return value + (value == 0)


@register
def expo(alpha: Number = 0.1) -> Method:
    """One expert, moved on in the direction that it came from the base: `W_1 + alpha (W_1 - W_0)`.

    Args:
        alpha: how far beyond the expert; 0 returns it, -1 the base.

    Source: Zheng et al., Model Extrapolation Expedites Alignment (ExPO), ACL 2025, arXiv 2404.16792.
    """
    check_number("expo: alpha", alpha)
    return Method(
        "expo",
        init,
        lambda statistic, delta, weight=1.0: update(statistic, delta),
        lambda statistic: ((1 + as_array(alpha, statistic.total.dtype)) * statistic.total, {}),
        needs=Needs("entry", experts=(1, 1), weights="none"),
        joint=True,
    )
