"""Sign consensus: of each entry, only the deltas of the elected sign are merged; and the chains that end in it.

P. Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708. For one entry, with `d_t = w_t D_t` after trimming:

    s = sgn(sum_t d_t)                       the sign of larger total mass is elected
    A = {t: sgn(d_t) = s}                    zeros never agree
    X = sum_{t in A} d_t / sum_{t in A} w_t  the mean of those that agree (w_t = 1 in the paper); 0 without any

`ties`, `dare_ties`, `della`, `breadcrumbs_ties` are a sparsifier, this, and a scale; `dare_linear`, `della_linear`
and `breadcrumbs` a sparsifier and a weighted sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.chain import chain
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number, PerExpert
from cfmerge.core.part import Method, Needs, Seen, Transform
from cfmerge.core.registry import register
from cfmerge.core.survey import Look, Measure, Survey, xp_of
from cfmerge.methods._stack import ratio, total, weighted
from cfmerge.methods.sparsify import Count, Norm, drop, drop_by_rank, outliers, trim
from cfmerge.methods.sparsify import scale as scaled
from cfmerge.methods.sums import average, task_arithmetic

Elect = Literal["mass", "norm_fraction", "norm_mass"]
Combine = Literal["mean", "sum", "max"]
Zero = Literal["drop", "positive", "majority"]
Rescale = Literal["inverse", "none", "l1", "l2", "linf"]


class Census(NamedTuple):
    """Each expert's squared norm, and the sign that is elected in more entries, of the whole model."""

    energies: Any = None  # (T,)
    majority: Any = None


@register
def disjoint_mean(elect: Elect = "mass", combine: Combine = "mean", zero: Zero = "drop") -> Method:
    """The mean of the deltas that have the elected sign, entry by entry.

    Args:
        elect: whose sign: "mass", that of the sum; "norm_fraction", that of the delta that is largest relative to
            its expert's norm over the model; "norm_mass", that of the sum of signed squares over squared norms.
        combine: of those that agree: "mean", their weighted mean; "sum"; or "max", the largest magnitude.
        zero: what is elected where the votes cancel: "drop", nothing; "positive"; or "majority", the sign that is
            elected in more entries of the model, and the negative one if there is none.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.
    """

    def votes(deltas: Array, items: list[Array], energies: Array | None) -> Array:
        if elect == "mass":
            return jnp.sign(total(items))
        norms = energies if energies is not None else jnp.stack([jnp.sum(delta**2) for delta in deltas])
        shares = [ratio(delta, jnp.sqrt(norm)) ** 2 for delta, norm in zip(deltas, norms, strict=True)]
        if elect == "norm_mass":
            return jnp.sign(total(share * jnp.sign(item) for share, item in zip(shares, items, strict=True)))
        winner, sign = shares[0], jnp.sign(items[0])
        for share, item in zip(shares[1:], items[1:], strict=True):
            sign = jnp.where(share > winner, jnp.sign(item), sign)
            winner = jnp.maximum(share, winner)
        return sign

    def merged(census: Census, deltas: Array, weights: Array) -> Array:
        items = weighted(deltas, weights)
        sign = votes(deltas, items, census.energies)
        if zero == "positive":
            sign = jnp.where(sign == 0, 1, sign)
        if zero == "majority":
            majority = jnp.sum(sign) if census.majority is None else census.majority
            sign = jnp.where(sign == 0, jnp.where(majority > 0, 1, -1).astype(sign.dtype), sign)
        agree = [(jnp.sign(item) == sign) & (item != 0) for item in items]
        if combine == "max":
            return sign * _maximum([jnp.where(a, jnp.abs(i), 0) for a, i in zip(agree, items, strict=True)])
        summed = total(jnp.where(a, i, 0) for a, i in zip(agree, items, strict=True))
        if combine == "sum":
            return summed
        weight = total(jnp.where(a, w, 0) for a, w in zip(agree, weights, strict=True))
        size = total(jnp.where(a, jnp.abs(w), 0) for a, w in zip(agree, weights, strict=True))
        cancels = jnp.abs(weight) <= 8 * jnp.finfo(summed.dtype).eps * size
        return summed / jnp.where(cancels, 1, weight)

    def look(entries: int, own: Sequence[Any]) -> Look:
        census = Census()
        if elect != "mass":
            census = Census((yield Measure(lambda delta: jnp.sum(delta**2))))
        if zero == "majority":

            def measure(seen: Seen) -> Array:
                energies = None if census.energies is None else jnp.asarray(census.energies, seen.deltas.dtype)
                signs = votes(seen.deltas, weighted(seen.deltas, seen.weights), energies)
                return jnp.sum(signs.astype(jnp.int32), dtype=jnp.int32)

            signs = yield Measure(measure, joint=True)
            census = census._replace(majority=xp_of(signs).sign(signs))
        return census

    def made(census: Census) -> Method:
        def known(base: Array, deltas: Array, weights: Array) -> Array:
            energies = None if census.energies is None else jnp.asarray(census.energies).astype(deltas.dtype)
            return merged(census._replace(energies=energies), deltas, weights)

        return of_deltas(known, Needs("entry"))

    plain = made(Census())
    if elect == "mass" and zero != "majority":
        return plain
    return dataclasses.replace(plain, survey=Survey(look, lambda found: made(found.model)))


def _maximum(items: list[Array]) -> Array:
    largest = items[0]
    for item in items[1:]:
        largest = jnp.maximum(largest, item)
    return largest


class Variant(NamedTuple):
    """Where implementations of TIES differ."""

    scope: Literal["tensor", "model"]
    counted: Count
    zero: Zero
    combine: Combine
    scale: float = 1.0


VARIANTS = {
    "paper": Variant("model", "ceil", "drop", "mean"),
    "official": Variant("model", "official", "majority", "mean"),
    "mergekit": Variant("tensor", "floor", "positive", "mean"),
    "fusion_bench": Variant("model", "official", "majority", "sum", 0.3),
}


@register
def ties(
    density: PerExpert = 0.2,
    scale: Number | None = None,
    variant: Literal["paper", "official", "mergekit", "fusion_bench"] = "paper",
    scope: Literal["tensor", "model"] | None = None,
    count: Count | None = None,
    elect: Elect = "mass",
    combine: Combine | None = None,
    zero: Zero | None = None,
    rescale: Norm = "none",
) -> Method:
    """Keeps each delta's largest entries, and takes the mean of those that have the elected sign.

    Args:
        density: share of each expert's entries that is kept.
        scale: of the merged delta; none: 1, in fusion_bench's variant 0.3.
        variant: whose rules hold where nothing else is said. "paper": density of the whole model; "official", the
            published code: the same, one entry more and all that tie, cancelled votes go to the majority;
            "mergekit": density of each tensor, rounded down, cancelled votes are positive; "fusion_bench": the
            official rules, but the sum instead of the mean.
        scope: density of the "model" or of each "tensor"; none: the variant's.
        count: how density becomes a number of entries, see `trim`; none: the variant's.
        elect: whose sign is elected, see `disjoint_mean`.
        combine: "mean", "sum" or "max" of those that agree; none: the variant's.
        zero: what is elected where votes cancel, see `disjoint_mean`; none: the variant's.
        rescale: the norm of each tensor that trimming restores: "l1" (an option of mergekit), "l2", "linf", "none".

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.
    """
    rules = VARIANTS[variant]
    trimmed = trim(density, scope or rules.scope, count or rules.counted, rescale)
    voted = disjoint_mean(elect, combine or rules.combine, zero or rules.zero)
    return chain(trimmed, voted, scaled(rules.scale if scale is None else scale))


def _linear(sparse: Transform, scale: Any, normalise: bool) -> Method:
    return chain(sparse, average(), scaled(scale)) if normalise else chain(sparse, task_arithmetic(scale))


@register
def dare_linear(
    p: PerExpert = 0.9, scale: Number = 0.3, rescale: Rescale = "inverse", normalise: bool = False
) -> Method:
    """Task arithmetic on deltas whose entries are dropped at random.

    Args:
        p: the probability of an entry to be dropped.
        scale: of the sum, as in task arithmetic.
        rescale: "inverse", see `drop`; mergekit: "l1".
        normalise: the weighted mean instead of the sum.

    Source: Yu et al., Language Models are Super Mario (DARE), ICML 2024, arXiv 2311.03099.
    """
    return _linear(drop(p, rescale), scale, normalise)


@register
def dare_ties(
    p: PerExpert = 0.9,
    scale: Number = 1.0,
    rescale: Rescale = "inverse",
    combine: Combine = "mean",
    zero: Zero = "drop",
) -> Method:
    """The mean of the deltas of the elected sign, after entries were dropped at random; nothing is trimmed.

    Args:
        p: the probability of an entry to be dropped.
        scale: of the merged delta.
        rescale: "inverse", see `drop`; mergekit: "l1".
        combine: "mean", "sum" (mergekit's default) or "max" of those that agree.
        zero: what is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

    Source: Yu et al., Language Models are Super Mario (DARE), ICML 2024, arXiv 2311.03099.
    """
    return chain(drop(p, rescale), disjoint_mean("mass", combine, zero), scaled(scale))


@register
def della(
    density: PerExpert = 0.5,
    epsilon: PerExpert = 0.05,
    scale: Number = 1.0,
    rescale: Rescale = "inverse",
    combine: Combine = "mean",
    zero: Zero = "drop",
) -> Method:
    """The mean of the deltas of the elected sign, after entries were dropped at random, small ones more often.

    Args:
        density: the mean probability of an entry to be kept.
        epsilon: half the range of the probabilities within a row; mergekit: 0.15.
        scale: of the merged delta.
        rescale: "inverse", see `drop_by_rank`; mergekit: "l1".
        combine: "mean", "sum" or "max" of those that agree.
        zero: what is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

    Source: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """
    return chain(drop_by_rank(density, epsilon, rescale), disjoint_mean("mass", combine, zero), scaled(scale))


@register
def della_linear(
    density: PerExpert = 0.5,
    epsilon: PerExpert = 0.05,
    scale: Number = 0.3,
    rescale: Rescale = "inverse",
    normalise: bool = False,
) -> Method:
    """Task arithmetic on deltas whose entries are dropped at random, small ones more often.

    Args:
        density: the mean probability of an entry to be kept.
        epsilon: half the range of the probabilities within a row; mergekit: 0.15.
        scale: of the sum, as in task arithmetic.
        rescale: "inverse", see `drop_by_rank`; mergekit: "l1".
        normalise: the weighted mean instead of the sum.

    Source: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """
    return _linear(drop_by_rank(density, epsilon, rescale), scale, normalise)


@register
def breadcrumbs(
    density: PerExpert = 0.9,
    gamma: PerExpert = 0.01,
    scale: Number = 0.3,
    rescale: Norm = "none",
    normalise: bool = False,
) -> Method:
    """Task arithmetic on deltas without their smallest and their very largest entries.

    Args:
        density: share of the entries of each tensor that is kept.
        gamma: share of the largest that are dropped, see `outliers`.
        scale: of the sum, as in task arithmetic.
        rescale: the norm of each tensor that is restored: "l1", "l2", "linf", or "none".
        normalise: the weighted mean instead of the sum.

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795.
    """
    return _linear(outliers(density, gamma, rescale), scale, normalise)


@register
def breadcrumbs_ties(
    density: PerExpert = 0.9,
    gamma: PerExpert = 0.01,
    scale: Number = 1.0,
    rescale: Norm = "none",
    combine: Combine = "mean",
    zero: Zero = "drop",
) -> Method:
    """The mean of the deltas of the elected sign, without their smallest and their very largest entries.

    Args:
        density: share of the entries of each tensor that is kept.
        gamma: share of the largest that are dropped, see `outliers`.
        scale: of the merged delta.
        rescale: the norm of each tensor that is restored: "l1", "l2", "linf", or "none".
        combine: "mean", "sum" (mergekit's default) or "max" of those that agree.
        zero: what is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795, with the vote of TIES as mergekit.
    """
    return chain(outliers(density, gamma, rescale), disjoint_mean("mass", combine, zero), scaled(scale))
