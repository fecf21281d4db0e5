"""Weighted sums of deltas: averaging and task arithmetic.

With `N = sum_t w_t D_t` the average is `N / sum_t w_t` (Model Soups, arXiv 2203.05482) and task arithmetic is
`scale * N` (arXiv 2212.04089). Both are entrywise and additive, and take tensors of any shape.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge.methods._base import Method
from cfmerge.methods._registry import Number, check_number, register


class Sum(NamedTuple):
    """`total = sum_t w_t D_t` and `weight = sum_t w_t`."""

    total: Float[Array, "..."]
    weight: Float[Array, ""]


def init(base: Float[Array, "..."]) -> Sum:
    return Sum(jnp.zeros_like(base), jnp.zeros((), base.dtype))


def update(statistic: Sum, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Sum:
    return Sum(statistic.total + weight * delta, statistic.weight + weight)


@register
def average() -> Method:
    """The mean of the deltas, weighted by the experts' weights.

    Source: Wortsman et al., Model Soups, ICML 2022, arXiv 2203.05482.
    """

    def solve(statistic: Sum) -> Array:
        return statistic.total / jnp.where(statistic.weight == 0, 1, statistic.weight)

    return Method("average", init, update, solve, scope="entry", statistic="sum", normalises=True)


@register
def task_arithmetic(scale: Number = 0.3) -> Method:
    """The sum of the deltas, each times its weight, all times one scale.

    Args:
        scale: the scaling coefficient; 0.3 is the paper's for eight vision tasks, `1 / T` is the average.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    check_number("task_arithmetic: scale", scale)
    return Method(
        "task_arithmetic", init, update, lambda statistic: scale * statistic.total, scope="entry", statistic="sum"
    )
