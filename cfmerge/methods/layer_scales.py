"""Layer scales: transforms behind a method that multiply the merged delta by a number for each layer.

lines   alpha + beta depth,  depth from 0 (first layer) to 1 (last)                  LiNeS, arXiv 2410.17146
larv    a tier for each matrix: less where the merge has little to say, more elsewhere    LARV, arXiv 2602.09413
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check_number
from cfmerge.core.numbers import Number
from cfmerge.core.part import Needs, Seen, Transform
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Measure, Survey, xp_of
from cfmerge.covariance import energy
from cfmerge.methods._stack import total


@register
def lines(alpha: Number | None = None, beta: Number = 0.5, depth: Number = 0.0) -> Transform:
    """Scales the merged delta by a number that grows linearly with the depth of the layer.

    The first layer, and what lies outside the layers, is multiplied by alpha; the last by alpha + beta.

    Args:
        alpha: the first layer's factor. None: the published rule, `||sum_t w_t D_t|| / (||X|| sum_t w_t)` with X
            the merged delta, norms of the whole model; a tensor merged by itself is the whole model.
        beta: how much larger the last layer's factor is; the authors tune it.

    Source: Wang et al., LiNeS, ICLR 2025, arXiv 2410.17146.
    """
    check_number("lines: alpha", alpha)
    check_number("lines: beta", beta)

    def scaled(merged: Array, first: Any) -> Array:
        return (jnp.asarray(first, merged.dtype) + jnp.asarray(beta, merged.dtype) * depth) * merged

    if alpha is not None:
        return Transform("lines", lambda merged: scaled(merged, alpha), joint=True)

    def measure(merged: Array, seen: Seen) -> dict[str, Array]:
        summed = total(weight * delta for weight, delta in zip(seen.weights, seen.deltas, strict=True))
        one = jnp.ones((), jnp.int32)
        return {"total": energy(summed), "merged": energy(merged), "weight": jnp.sum(seen.weights), "tensors": one}

    def rule(found: Any) -> Any:
        """The first layer's factor; `weight` is of all tensors, of which each had the same experts."""
        weight = found["weight"] / found["tensors"]
        nothing = (found["merged"] == 0) | (weight == 0)
        factor = (found["total"] / (found["merged"] + nothing)) ** 0.5 / (weight + (weight == 0))
        return factor * (1 - nothing) + nothing

    def look(entries: int, own: Sequence[Any]) -> Look:
        return rule((yield Measure(measure, joint=True)))

    return Transform(
        "lines",
        lambda merged, seen: scaled(merged, rule(measure(merged, seen))),
        needs=Needs("entry", seen=True),
        survey=Survey(look, lambda found: Transform("lines", lambda merged: scaled(merged, found.model)), rows=True),
    )


@register
def larv(low: Number = 0.8, high: Number = 1.2, tiers: Literal[2, 3] = 3) -> Transform:
    """Suppresses the merged delta of matrices that score low, and amplifies those that score high.

    After the published idea, without its constants, which we could not confirm. Published: a data-free score for
    each layer from an effective-rank contrast `e = r(W_0) / r(X)`, with `r` the exponential of the entropy of the
    squared singular values, and from the conflict of the experts; two or three tiers of the score; shallow layers,
    which score low, are suppressed. Ours: the conflict `c = 1 - ||sum_t w_t D_t|| / sum_t ||w_t D_t||`; the score
    `e (1 - c)`; tiers of equal size by rank over the model's matrices; the factors. Vectors keep their size.

    Args:
        low: factor of the lowest tier.
        high: factor of the highest tier.
        tiers: 3 leaves the middle third as it is; 2 has halves only.

    Source: LARV, arXiv 2602.09413 (in part: see above).
    """
    check_number("larv: low", low)
    check_number("larv: high", high)

    def measure(merged: Array, seen: Seen) -> dict[str, Array]:
        if merged.ndim != 2:
            return {"score": jnp.zeros((), merged.dtype), "matrix": jnp.zeros((), jnp.int32)}
        contrast = linalg.ratio(effective_rank(seen.base), effective_rank(merged))
        items = [weight * delta for weight, delta in zip(seen.weights, seen.deltas, strict=True)]
        together, apart = linalg.norm(total(items)), total(linalg.norm(item) for item in items)
        return {"score": contrast * linalg.ratio(together, apart).reshape(()), "matrix": jnp.ones((), jnp.int32)}

    def look(entries: int, own: Sequence[Any]) -> Look:
        measured = yield Measure(measure, joint=True, by_tensor=True)
        xp = xp_of(measured)
        score, matrix = (xp.stack([one[name] for one in measured.values()]) for name in ("score", "matrix"))
        count = xp.sum(matrix)
        order = xp.argsort(xp.where(matrix > 0, score, np.inf), stable=True)  # tensors that are no matrix come last
        third = xp.argsort(order) * tiers // xp.maximum(count, 1)  # 0 .. tiers - 1
        tier = xp.where(third == 0, -1, third - tiers + 2)
        tier = xp.where((matrix > 0) & (count > 1), tier, 0).astype(np.int32)
        return Found(None, dict(zip(measured, tier, strict=True)))

    def informed(found: Found) -> Transform:
        def apply(merged: Float[Array, "..."]) -> Float[Array, "..."]:
            tier = 0 if found.tensor is None else found.tensor
            factor = jnp.where(tier < 0, low, jnp.where(tier > 0, high, 1))
            return jnp.asarray(factor, merged.dtype) * merged

        return Transform("larv", apply, needs=Needs("tensor"))

    return Transform("larv", lambda merged: merged, needs=Needs("tensor", behind=True), survey=Survey(look, informed))


def effective_rank(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """`exp(entropy of s^2 / ||s||^2)` of the singular values s; 0 of the zero matrix."""
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    unit = linalg.unit(rows)
    values = jnp.maximum(linalg.symmetric_eigen(linalg.gram(unit.T))[0], 0)
    entropy = -jnp.sum(values * jnp.log(jnp.where(values > 0, values, 1)))
    return jnp.where(jnp.sum(values) > 0, jnp.exp(entropy), 0)
