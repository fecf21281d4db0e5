"""The rules of PEFT's `add_weighted_adapter` under their own names, and how far they are off the sum of the deltas.

For adapters `D_t = s_t B_t A_t` with weights `w_t` (Hugging Face PEFT 0.21, `combination_type`)

    peft_cat       X = sum_t w_t D_t                                           "cat": exact
    peft_svd       X = the best approximation of rank r of that sum            "svd"
    peft_linear    X = (sum_t b_t B_t)(sum_t a_t A_t),  b_t = sqrt|w_t s_t|,  a_t = sign(w_t s_t) b_t       "linear"

`peft_linear` is not the sum: its product has every cross term `B_s A_t` besides. It takes the adapters' own factors.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check
from cfmerge.core.part import NO_CONTEXT, Context, Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.methods.sums import Sum, init, update

OFF = {
    "off_sum": (
        lambda value: value > 0.01,
        "the merged delta is up to {value:.0%} of its length off the weighted sum of the deltas, which peft_cat and "
        "task_arithmetic(scale=1) give",
    )
}


def _off(merged: Array, total: Array) -> Report:
    """`||X - N|| / ||N||`, N the weighted sum."""
    return {"off_sum": lax.stop_gradient(linalg.ratio(linalg.norm(merged - total), linalg.norm(total)).reshape(()))}


@register
def peft_cat() -> Method:
    """The weighted sum of the deltas, as PEFT's "cat": adapters' factors side by side.

    Source: Hugging Face PEFT, LoraModel.add_weighted_adapter, combination_type="cat".
    """
    return Method(
        "peft_cat", init, update, lambda sums: (sums.total, {}), needs=Needs("entry"), statistic="sum", joint=True
    )


class Ranked(NamedTuple):
    """The weighted sum, and the ranks of the factors as the number of zeros."""

    sum: Sum
    ranks: tuple[Array, ...]


@register
def peft_svd(rank: int | None = None) -> Method:
    """The weighted sum of the deltas cut to a rank, as PEFT's "svd".

    Args:
        rank: of the merged delta; none: the largest rank of the adapters, which dense deltas do not tell.

    Source: Hugging Face PEFT, LoraModel.add_weighted_adapter, combination_type="svd".
    """
    check(rank is None or rank >= 1, f"peft_svd: rank must be at least 1, got {rank}")

    def add(statistic: Ranked, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Ranked:
        check(
            rank is not None or context.factors is not None,
            "peft_svd: some experts are no adapters, which alone tell a rank; give that of the result, such as "
            "peft_svd(rank=16)",
        )
        own = () if context.factors is None else (jnp.zeros(context.factors[1].shape[0], delta.dtype),)
        return Ranked(update(statistic.sum, delta, weight), (*statistic.ranks, *own))

    def solve(statistic: Ranked) -> tuple[Array, Report]:
        total = statistic.sum.total
        k = rank or max(len(own) for own in statistic.ranks)
        merged = linalg.truncated(total, min(k, *total.shape))
        return merged, _off(merged, total)

    return Method(
        "peft_svd",
        lambda base: Ranked(init(base), ()),
        add,
        solve,
        needs=Needs("matrix", factors="used"),
        additive=False,
        notes=OFF,
        joint=True,
    )


class Halves(NamedTuple):
    """An expert's factors, each with the root of its scale, its weight, and its delta."""

    left: Float[Array, "m r"]
    right: Float[Array, "r n"]
    weight: Float[Array, ""]
    delta: Float[Array, "m n"]


@register
def peft_linear() -> Method:
    """The product of the adapters' weighted factors, as PEFT's "linear": NOT the sum of the deltas. For compatibility.

    All experts must be adapters of one rank.

    Source: Hugging Face PEFT, LoraModel.add_weighted_adapter, combination_type="linear".
    """

    def add(
        statistic: tuple[Halves, ...], delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> tuple[Halves, ...]:
        check(
            context.factors is not None,
            "peft_linear takes the factors of adapters, B and A, and these are deltas; use peft_cat, the sum",
        )
        left, right = context.factors  # type: ignore[misc]
        return (*statistic, Halves(left, right, jnp.asarray(weight, delta.dtype), delta))

    def solve(statistic: tuple[Halves, ...]) -> tuple[Array, Report]:
        ranks = sorted({len(one.right) for one in statistic})
        check(len(ranks) == 1, f"peft_linear: adapters must have one rank, found ranks {ranks}; use peft_cat, the sum")
        roots = [linalg.root(jnp.abs(one.weight)) for one in statistic]
        left = sum(root * one.left for root, one in zip(roots, statistic, strict=True))
        right = sum(jnp.sign(one.weight) * root * one.right for root, one in zip(roots, statistic, strict=True))
        merged = linalg.matmul(left, right)  # type: ignore[arg-type]
        return merged, _off(merged, sum(one.weight * one.delta for one in statistic))  # type: ignore[arg-type]

    return Method(
        "peft_linear",
        lambda base: (),
        add,
        solve,
        needs=Needs("matrix", factors="required"),
        additive=False,
        notes=OFF,
        joint=True,
    )
