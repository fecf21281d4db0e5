"""CART: deltas about their mean, at low rank.

J. Choi et al., Revisiting Weight Averaging for Model Merging, arXiv 2412.12153. With weights `w_t` (1 in the paper)

    A = sum_t w_t D_t / sum_t w_t
    X = A + scale sum_t w_t topk(D_t - A),     topk the best approximation of rank k

Deltas about their mean share fewer directions than deltas about the base. At full rank and equal weights the sum is
zero: it is the cut that leaves something, and the scale that makes up for it.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.joint import Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs
from cfmerge.core.registry import register


def rank_of(fraction: float, shape: tuple[int, ...]) -> int:
    """That share of `min(m, n)`, rounded down, and at least 1."""
    return max(1, int(fraction * min(shape) + 1e-9))


@register
def cart(scale: Number = 1.0, rank_fraction: float = 0.08) -> Method:
    """The mean of the deltas, plus the leading directions of what each expert has of its own.

    Args:
        scale: a factor of the sum of the experts' own parts (the paper's lambda); usually tuned.
        rank_fraction: the share of min(out, in) that is kept of each, at least rank 1; the paper uses up to 0.5.

    Source: Choi et al., Revisiting Weight Averaging for Model Merging, arXiv 2412.12153.
    """
    check_number("cart: scale", scale)
    check(0 < rank_fraction <= 1, f"cart: rank_fraction must lie in (0, 1], got {rank_fraction}")

    def about_mean(
        base: Array, deltas: Float[Array, "T m n"], weights: Float[Array, " T"], dense: tuple[int, int] | None = None
    ) -> Float[Array, "m n"]:
        mean = linalg.weighted_mean(linalg.weighted_sum(weights, deltas), jnp.sum(weights))
        k = min(rank_of(rank_fraction, dense or mean.shape), *mean.shape)
        own = lax.map(lambda delta: linalg.truncated(delta - mean, k), deltas)
        return mean + as_array(scale, mean.dtype) * linalg.weighted_sum(weights, own)

    def on_cores(basis: Joint) -> Any:
        return functools.partial(about_mean, dense=basis.shape)

    return of_deltas(about_mean, Needs(normalises=True), joint=on_cores)
