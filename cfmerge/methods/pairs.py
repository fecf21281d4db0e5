"""Methods of a base and one expert: which entries of the delta are taken, and how far.

nearswap: `W_0 + w D` with `w = min(t / |D|, 1)` entrywise, which is

    X = clip(D, -t, t).

arcee_fusion: entries are kept where they matter most, judged by their row as a distribution,

    score = |D| KL(softmax(W_1 row) || softmax(W_0 row)),   X = D where score >= median + 1.5 (q_75 - q_25), else 0.

With `p = softmax(W_1 row)` and `y = D - p.D` the divergence is `log(sum p exp(-y))`, and, since `p.y = 0`,
`log(1 + sum p (exp(-y) - 1 + y))`: all terms are positive, so small deltas lose nothing to cancellation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge.core.checks import as_array, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Report
from cfmerge.core.registry import register


@register
def nearswap(t: Number = 1e-4) -> Method:
    """The expert where it is within `t` of the base, and the base moved by `t` towards it elsewhere.

    Args:
        t: the largest change of an entry.

    Source: mergekit 0.1.4, nearswap (used for the QuartetAnemoi-70B merge, 2024).
    """
    check_number("nearswap: t", t, 0)

    def update(statistic: Array, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Array:
        most = as_array(t, delta.dtype)
        return statistic + jnp.clip(delta, -most, most)

    return Method(
        "nearswap",
        jnp.zeros_like,
        update,
        lambda statistic: (statistic, {}),
        needs=Needs("entry", experts=(1, 1), weights="none"),
    )


@register
def arcee_fusion(iqr: Number = 1.5) -> Method:
    """One expert's entries where they score far above the tensor's median, the base elsewhere.

    Args:
        iqr: how many interquartile ranges above the median the score must be.

    Source: mergekit 0.1.4, arcee_fusion (Arcee AI), which takes the quantiles of a sample of large tensors.
    """
    check_number("arcee_fusion: iqr", iqr)

    def fused(base: Float[Array, "..."], deltas: Float[Array, "1 ..."], weights: Array) -> tuple[Array, Report]:
        (delta,) = deltas
        score = jnp.abs(delta) * row_divergence(base, delta)
        ranked = jnp.sort(score.reshape(-1))
        low, median, high = (ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
        keep = score >= median + as_array(iqr, delta.dtype) * (high - low)
        return jnp.where(keep, delta, 0), {"kept": jnp.mean(keep, dtype=delta.dtype)}

    return of_deltas(fused, Needs("tensor", experts=(1, 1), weights="none"))


def row_divergence(base: Float[Array, "... n"], delta: Float[Array, "... n"]) -> Float[Array, "... 1"]:
    """`KL(softmax(base + delta) || softmax(base))` along the last axis."""
    if not base.ndim:
        return jnp.zeros_like(base)
    p = jax.nn.softmax(base + delta, axis=-1)
    y = delta - jnp.sum(p * delta, axis=-1, keepdims=True)
    near = jnp.max(jnp.abs(y), axis=-1, keepdims=True) < 0.5
    small = jnp.where(near, y, 0)
    series = jnp.ones_like(small)
    for k in range(12, 2, -1):  # exp(-y) - 1 + y = y^2/2 (1 - y/3 (1 - y/4 (...)))
        series = 1 - small / k * series
    of_small = jnp.log1p(jnp.sum(p * small * small / 2 * series, axis=-1, keepdims=True))
    large = jax.nn.logsumexp(jnp.where(near, 0, -y), b=p, axis=-1, keepdims=True)
    return jnp.where(near, of_small, jnp.maximum(large, 0))
