"""Sign consensus: chains that end in an election of signs, and their linear kin.

`ties`, `dare_ties`, `della` and `breadcrumbs_ties` are a sparsifier, the `disjoint_mean` of the deltas that have the
elected sign, and a scale; `dare_linear`, `della_linear` and `breadcrumbs` a sparsifier and a weighted sum.
"""

from typing import Any, Literal, NamedTuple

from cfmerge.core.chain import chain
from cfmerge.core.numbers import Number, PerExpert
from cfmerge.core.part import Method, Transform
from cfmerge.core.registry import register
from cfmerge.methods.election import Combine, Elect, Zero, disjoint_mean
from cfmerge.methods.sparsify import Count, Norm, drop, drop_by_rank, outliers, trim
from cfmerge.methods.sparsify import scale as scaled
from cfmerge.methods.sums import average, task_arithmetic

Rescale = Literal["inverse", "none", "l1", "l2", "linf"]


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
        scale: a factor of the merged delta; none: 1, in fusion_bench's variant 0.3.
        variant: whose rules hold where nothing else is said. "paper": density of the whole model; "official", the
            published code: the same, one entry more and all that tie, cancelled votes go to the majority;
            "mergekit": density of each tensor, rounded down, cancelled votes are positive; "fusion_bench": the
            official rules, but the sum instead of the mean.
        scope: density of the "model" or of each "tensor"; none: the variant's.
        count: how density becomes a number of entries, see `trim`; none: the variant's.
        elect: whose sign is elected, see `disjoint_mean`.
        combine: "mean", "sum" or "max" of those that agree; none: the variant's.
        zero: the sign that is elected where votes cancel, see `disjoint_mean`; none: the variant's.
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
        scale: a factor of the sum, as in task arithmetic.
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
        scale: a factor of the merged delta.
        rescale: "inverse", see `drop`; mergekit: "l1".
        combine: "mean", "sum" (mergekit's default) or "max" of those that agree.
        zero: the sign that is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

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
        scale: a factor of the merged delta.
        rescale: "inverse", see `drop_by_rank`; mergekit: "l1".
        combine: "mean", "sum" or "max" of those that agree.
        zero: the sign that is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

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
        scale: a factor of the sum, as in task arithmetic.
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
        scale: a factor of the sum, as in task arithmetic.
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
        scale: a factor of the merged delta.
        rescale: the norm of each tensor that is restored: "l1", "l2", "linf", or "none".
        combine: "mean", "sum" (mergekit's default) or "max" of those that agree.
        zero: the sign that is elected where votes cancel, see `disjoint_mean`; mergekit: "positive".

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795, with the vote of TIES as mergekit.
    """
    return chain(outliers(density, gamma, rescale), disjoint_mean("mass", combine, zero), scaled(scale))
