"""PCB-Merging: parameters compete within their expert and with the same parameter of the others.

G. Du et al., Parameter Competition Balancing, NeurIPS 2024, arXiv 2410.02396, as in the published code. On the flat
model, for `T` experts, with `q_c` quantiles of an expert's entries over the whole model:

    |D|c = clip(|D_t|, q_c, q_{1-c}),     v_t = (|D|c - q_c) / (q_{1-c} - q_c),     Dc_t = sgn(D_t) |D|c
    intra = exp(T v_t^2),     inter = tanh(D_t sum_s D_s),     score = intra inter
    b_t = (max(score, q) - q) / (max score - q),     q the quantile of the scores that `ratio` of them exceed
    X = scale sum_t w_t b_t Dc_t / sum_t b_t

The paper's text has softmax forms instead; the code is what its numbers come from. tanh is almost linear in products
of deltas, so the scores' order decides, not their size. `exp(T v^2 - T)` is used below: `b` is the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check, check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Method, Needs, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Look, Order, Ordered, Survey
from cfmerge.linalg.selection import key_dtype, kth_largest, magnitude_keys, magnitude_of, value_keys, value_of
from cfmerge.methods._stack import total

Inter = Literal["deltas", "ranks"]


class Quantiles(NamedTuple):
    """Order statistics of each expert: of its magnitudes (upper and lower clip), and of its scores (largest, q)."""

    magnitudes: Ordered
    scores: Ordered


@register
def pcb(ratio: float = 0.1, clip: float = 1e-4, scale: Number = 1.2, inter: Inter = "deltas") -> Method:
    """The mean of the deltas, each entry weighted by how it competes within its expert and with the other experts.

    All quantiles are of the whole model; of a tensor that is merged by itself, its own.

    Args:
        ratio: share of each expert's entries that compete; the others get no weight.
        clip: share of each expert's entries whose magnitude is clipped, at either end.
        scale: a factor of the merged delta; the authors search it.
        inter: the tensor that multiplies each delta, to see whether it agrees with the others: "deltas", their sum; or
            "ranks", the sum of their signed v, as in the authors' script for vision models (there with a clip of
            0.01 and a ratio of 0.05).

    Source: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024, arXiv 2410.02396.
    """
    check(0 < ratio <= 1, f"pcb: ratio must lie in (0, 1], got {ratio}")
    check(0 <= clip < 0.5, f"pcb: clip must lie in [0, 0.5), got {clip}")
    check_number("pcb: scale", scale)

    def clips(size: int) -> tuple[int, int]:
        """Ranks from the largest of the upper and the lower clip."""
        return size - max(int(size * (1 - clip) - 1), 0), size - int(size * clip)

    def best(size: int) -> tuple[int, int]:
        """Ranks from the largest of the largest score and of q."""
        return 1, size - min(int(size * (1 - ratio)), size - 1)

    def merged(quantiles: Quantiles | None, base: Array, deltas: Array, weights: Array) -> Float[Array, "..."]:
        if quantiles is None:
            limits = [_limits(magnitude_keys(delta), clips(delta.size), magnitude_of) for delta in deltas]
        else:
            limits = _found(quantiles.magnitudes, magnitude_of)
        scores, clipped = _scores(deltas, limits, inter)
        if quantiles is None:
            limits = [_limits(value_keys(score), best(score.size), value_of) for score in scores]
        else:
            limits = _found(quantiles.scores, value_of)
        shares = [_share(*each) for each in zip(scores, limits, deltas, strict=True)]
        summed = total(w * b * c for w, b, c in zip(weights, shares, clipped, strict=True))
        return jnp.asarray(scale, summed.dtype) * summed / jnp.maximum(total(shares), 1e-12)

    def look(entries: int, own: Sequence[Any]) -> Look:
        magnitudes = yield Order(magnitude_keys, [clips(entries)] * len(own), ties=False)

        def keys(seen: Seen) -> list[Array]:
            scores, _ = _scores(seen.deltas, _found(magnitudes, magnitude_of), inter)
            return [value_keys(score) for score in scores]

        return Quantiles(magnitudes, (yield Order(keys, [best(entries)] * len(own), joint=True, ties=False)))

    def made(quantiles: Quantiles | None) -> Method:
        return of_deltas(functools.partial(merged, quantiles), Needs("entry"), name="pcb")

    return dataclasses.replace(made(None), survey=Survey(look, lambda found: made(found.model), rows=True))


Pair = tuple[Array, Array]  # the larger one first


def _scores(deltas: Array, limits: Sequence[Pair], inter: Inter) -> tuple[list[Array], list[Array]]:
    """The scores, and the clipped deltas."""
    T = len(deltas)
    limits = [
        (high.astype(delta.dtype), low.astype(delta.dtype)) for (high, low), delta in zip(limits, deltas, strict=True)
    ]
    clipped = [jnp.clip(jnp.abs(delta), low, high) for delta, (high, low) in zip(deltas, limits, strict=True)]
    v = [linalg.ratio(c - low, high - low) for c, (high, low) in zip(clipped, limits, strict=True)]
    signs = [jnp.sign(delta) for delta in deltas]
    others = total(deltas) if inter == "deltas" else total(sign * x for sign, x in zip(signs, v, strict=True))
    scores = [jnp.exp(T * (x**2 - 1)) * jnp.tanh(delta * others) for x, delta in zip(v, deltas, strict=True)]
    return scores, [sign * c for sign, c in zip(signs, clipped, strict=True)]


def _share(score: Array, limits: Pair, delta: Array) -> Array:
    """`b`, 0 at q whatever the rounding; where no score exceeds q, all that reach it (and are not zero) count alike."""
    highest, q = (limit.astype(score.dtype) for limit in limits)
    alike = ((score >= q) & (delta != 0)).astype(score.dtype)
    share = jnp.clip(linalg.ratio(score - q, highest - q), 0, 1)
    share = jnp.where(share > 64 * jnp.finfo(share.dtype).eps, share, 0)
    return jnp.where(highest > q, share, alike)


def _limits(keys: Array, ranks: tuple[int, int], value: Callable[[Array], Array]) -> Pair:
    first, second = (value(kth_largest(keys, rank)) for rank in ranks)
    return first, second


def _found(known: Ordered, value: Callable[[Array], Array]) -> list[Pair]:
    return [(value(high), value(low)) for high, low in jnp.asarray(known.keys).astype(key_dtype())]
