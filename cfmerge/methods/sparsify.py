"""Sparsifiers: transforms that keep some entries of each delta, by size, by chance or by both.

    trim            the largest `|D|`                                     TIES, arXiv 2306.01708, step 1
    trim_deviation  those further than some standard deviations from the mean       (options of TIES'
    trim_energy     the largest that together hold a share of `||D||^2`              published code)
    outliers        the largest but for the very largest                  Breadcrumbs, arXiv 2312.06795
    drop            each with probability `1 - p`, over `1 - p`           DARE, arXiv 2311.03099
    drop_by_rank    with a probability that grows with the rank in its row, over that      DELLA, arXiv 2406.11617
    scale           all, times a number

`drop` and `drop_by_rank` leave the mean over draws what it was: `E[D m / q] = D` for a mask `m` of mean `q`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check, check_number
from cfmerge.core.numbers import Number, PerExpert
from cfmerge.core.part import NO_CONTEXT, Context, Needs, Transform
from cfmerge.core.random import draws
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Order, Ordered, Survey, reached, with_pieces
from cfmerge.linalg import selection
from cfmerge.linalg.selection import magnitude_keys
from cfmerge.methods._thresholds import share_of

Norm = Literal["none", "l1", "l2", "linf"]
Count = Literal["ceil", "floor", "round", "some", "official"]


@register
def scale(factor: Number = 1.0) -> Transform:
    """Deltas times a number: each delta in front of a method, the merged delta behind it.

    Args:
        factor: the number.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    check_number("scale: factor", factor)
    return Transform("scale", lambda delta: jnp.asarray(factor, delta.dtype) * delta, joint=True)


@register
def trim(
    density: PerExpert = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
    count: Count = "ceil",
    rescale: Norm = "none",
) -> Transform:
    """Keeps the entries of largest magnitude.

    Args:
        density: share of the entries that are kept.
        scope: "tensor": that share of every tensor; "model": that share of the whole model, by one threshold for each
            expert, found exactly in passes over the model before the merge. A tensor merged by itself is the whole
            model.
        count: how the share becomes a number of entries: "ceil", "floor" or "round", of entries that tie those of
            lower index; "some", floor but one at least, as mergekit 0.1.5; or "official", TIES' published code:
            floor + 1, and all that tie.
        rescale: the norm of each tensor that is restored afterwards: "l1", "l2", "linf", or "none".

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.
    """
    check_number("trim: density", density, 0, 1)

    def wanted(density: Any, size: Any) -> Any:
        return _count(density, size, count)

    def apply(delta: Float[Array, "..."]) -> Float[Array, "..."]:
        keys, many = magnitude_keys(delta), wanted(density, delta.size)
        if count == "official":
            kept, _ = selection.around(keys, selection.reaching(many))
        else:
            kept = selection.largest(keys, many)
        return _rescaled(delta, jnp.where(kept, delta, 0), rescale)

    def look(entries: Any, own: Sequence[Any]) -> Look:
        asked = [(wanted(density, entries),) for density in own]
        ordered = yield Order(magnitude_keys, asked, ties=count != "official")
        return Found(ordered._replace(ends=None), ordered.ends) if scope == "model" else ordered

    def informed(found: Found) -> Transform:
        ordered = found.model if scope == "tensor" else found.model._replace(ends=found.tensor)

        def applied(delta: Float[Array, "..."], context: Context = NO_CONTEXT) -> Float[Array, "..."]:
            key, end = (None if own is None else jnp.asarray(own)[context.number, 0] for own in ordered)
            kept = reached(magnitude_keys(delta), key, end, context.start)
            return _rescaled(delta, jnp.where(kept, delta, 0), rescale)

        return Transform("trim", applied, needs=Needs("entry" if rescale == "none" else "tensor"))

    survey = Survey(look, informed, own=density, within=scope, rows=True)
    if scope == "model":
        return Transform("trim", apply, needs=informed(Found(Ordered(0))).needs, survey=survey)
    whole = Transform("trim", apply, needs=Needs("tensor"))
    return with_pieces(whole, survey) if rescale == "none" else whole


def _count(density: Any, size: Any, count: Count) -> Any:
    if count == "some":
        many, least = share_of(density, size, "floor"), (density > 0) & (size > 0)
        return max(many, int(least)) if isinstance(many, int) else jnp.maximum(many, jnp.asarray(least, many.dtype))
    if count != "official":
        return share_of(density, size, count)
    many = share_of(density, size, "floor") + 1
    return min(many, int(size)) if isinstance(many, int) else jnp.minimum(many, size)


@register
def trim_deviation(factor: PerExpert = 1.0) -> Transform:
    """Keeps the entries further from the tensor's mean than some standard deviations.

    Args:
        factor: how many standard deviations.

    Source: published code of Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708 (option "std").
    """
    check_number("trim_deviation: factor", factor, 0)

    def apply(delta: Float[Array, "..."]) -> Float[Array, "..."]:
        size = jnp.max(jnp.abs(delta))
        unit = linalg.ratio(delta, size)
        far = jnp.abs(unit - jnp.mean(unit))
        variance = jnp.sum(far**2) / max(delta.size - 1, 1)
        return jnp.where(far**2 > jnp.asarray(factor, delta.dtype) ** 2 * variance, delta, 0)

    return Transform("trim_deviation", apply, needs=Needs("tensor"))


@register
def trim_energy(share: PerExpert = 0.9, keep_last: bool = False) -> Transform:
    """Keeps the fewest entries of largest magnitude that hold a share of the tensor's squared norm.

    Args:
        share: the share of the squared norm that is kept. Entries that tie with the last are kept.
        keep_last: keeps the tensor's last entry whatever its size, as the published code does by a slip.

    Source: published code of Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708 (option "nf").
    """
    check_number("trim_energy: share", share, 0, 1)

    def apply(delta: Float[Array, "..."]) -> Float[Array, "..."]:
        keys = magnitude_keys(delta)
        energies = lax.stop_gradient(linalg.ratio(delta, jnp.max(jnp.abs(delta)))) ** 2
        least = jnp.asarray(share, delta.dtype) * jnp.sum(energies)
        kept, _ = selection.around(keys, lambda mask: jnp.sum(jnp.where(mask, energies, 0)) >= least)
        kept &= least > 0
        if keep_last:
            kept |= (jnp.arange(delta.size) == delta.size - 1).reshape(delta.shape)
        return jnp.where(kept, delta, 0)

    return Transform("trim_energy", apply, needs=Needs("tensor"))


@register
def outliers(density: PerExpert = 0.9, gamma: PerExpert = 0.01, rescale: Norm = "none") -> Transform:
    """Drops the entries of largest magnitude as well as the smallest, in each tensor.

    Args:
        density: share of the entries that are kept.
        gamma: share of the largest that are dropped; fewer, where the density would not be met. A tensor of fewer
            than 1 / gamma entries loses none of them, so 0 is `trim`.
        rescale: the norm of each tensor that is restored afterwards: "l1", "l2", "linf", or "none".

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795; shares and rounding of mergekit.
    """
    check_number("outliers: density", density, 0, 1)
    check_number("outliers: gamma", gamma, 0, 1)

    def ranks(density: Any, gamma: Any, size: Any) -> tuple[Any, Any]:
        kept, top = share_of(density, size, "floor"), share_of(gamma, size, "floor")
        top = jnp.minimum(top, size - kept)
        return top, top + kept

    def apply(delta: Float[Array, "..."]) -> Float[Array, "..."]:
        keys = magnitude_keys(delta)
        top, upto = ranks(density, gamma, delta.size)
        inside = selection.largest(keys, upto) & ~selection.largest(keys, top)
        return _rescaled(delta, jnp.where(inside, delta, 0), rescale)

    def look(entries: Any, own: Sequence[Any]) -> Look:
        return (yield Order(magnitude_keys, [ranks(density, gamma, entries) for density, gamma in own]))

    def informed(found: Found) -> Transform:
        def applied(delta: Float[Array, "..."], context: Context) -> Float[Array, "..."]:
            keys = magnitude_keys(delta)
            (top, upto), (top_end, end) = (jnp.asarray(own)[context.number] for own in found.model)
            inside = reached(keys, upto, end, context.start) & ~reached(keys, top, top_end, context.start)
            return jnp.where(inside, delta, 0)

        return Transform("outliers", applied)

    survey = Survey(look, informed, own=(density, gamma), within="tensor")
    whole = Transform("outliers", apply, needs=Needs("tensor"))
    return with_pieces(whole, survey) if rescale == "none" else whole


@register
def drop(p: PerExpert = 0.9, rescale: Literal["inverse", "none", "l1", "l2", "linf"] = "inverse") -> Transform:
    """Drops entries at random and scales up the others.

    Args:
        p: the probability to be dropped.
        rescale: "inverse": times 1 / (1 - p), so that the mean over draws is the delta itself; "l1", "l2", "linf":
            to the norm that the tensor had (mergekit: "l1"); "none".

    Source: Yu et al., Language Models are Super Mario (DARE), ICML 2024, arXiv 2311.03099.
    """
    check_number("drop: p", p, 0, 1)

    def apply(delta: Float[Array, "..."], context: Context) -> Float[Array, "..."]:
        drawn = draws(context, delta)
        kept = jnp.where(drawn >= jnp.asarray(p, drawn.dtype), delta, 0)
        if rescale == "inverse":
            return linalg.ratio(kept, 1 - jnp.asarray(p, delta.dtype))
        return _rescaled(delta, kept, rescale)

    return Transform("drop", apply, needs=Needs("entry" if rescale in {"inverse", "none"} else "tensor", random=True))


@register
def drop_by_rank(
    density: PerExpert = 0.5,
    epsilon: PerExpert = 0.05,
    rescale: Literal["inverse", "none", "l1", "l2", "linf"] = "inverse",
) -> Transform:
    """Drops entries at random, small ones more often, and scales up the others.

    The probability to be kept grows linearly with the rank of the magnitude within its row, from density - epsilon
    to density + epsilon; equal magnitudes share their mean rank. A vector is one row.

    Args:
        density: the mean probability to be kept.
        epsilon: half the range of the probabilities; density +- epsilon must lie between 0 and 1.
        rescale: "inverse": each entry over its own probability, so that the mean over draws is the delta itself;
            "l1", "l2", "linf": to the norm that the tensor had (mergekit: "l1", and 0.15 for epsilon); "none".

    Source: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """
    check_number("drop_by_rank: density", density, 0, 1)
    check_number("drop_by_rank: epsilon", epsilon, 0, 1)
    if isinstance(density, int | float) and isinstance(epsilon, int | float):
        check(
            density - epsilon > 0 and density + epsilon <= 1,
            f"drop_by_rank: density - epsilon must be positive and density + epsilon at most 1, "
            f"got {density} and {epsilon}",
        )

    def apply(delta: Float[Array, "..."], context: Context) -> Float[Array, "..."]:
        rank = ranks_of(delta) if context.rank is None else context.rank
        keep = keep_probabilities(rank.astype(delta.dtype), density, epsilon)
        kept = jnp.where(draws(context, delta) < keep, delta, 0)
        return linalg.ratio(kept, keep) if rescale == "inverse" else _rescaled(delta, kept, rescale)

    whole = Transform("drop_by_rank", apply, needs=Needs("tensor", random=True))
    if rescale not in {"inverse", "none"}:
        return whole
    in_entries = Needs("entry", random=True, ranks=True)
    return dataclasses.replace(whole, pieces=lambda: dataclasses.replace(whole, needs=in_entries))


def ranks_of(delta: Float[Array, "..."]) -> Float[Array, "..."]:
    """`rank / (n - 1)` of the magnitudes, ranks from 0 in rows of n entries."""
    rows = delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)
    n = rows.shape[1]
    share = jnp.asarray(selection.middle_ranks(magnitude_keys(rows))) / (n - 1) if n > 1 else jnp.full(rows.shape, 0.5)
    return share.reshape(delta.shape)


def keep_probabilities(rank: Float[Array, "..."], density: Any, epsilon: Any) -> Float[Array, "..."]:
    """DELLA's `density - epsilon + 2 epsilon rank / (n - 1)`, given the rank over n - 1."""
    low, spread = jnp.asarray(density - epsilon, rank.dtype), jnp.asarray(2 * epsilon, rank.dtype)
    return jnp.clip(low + spread * rank, 0, 1)


def _rescaled(before: Array, after: Array, norm: str) -> Array:
    """The entries that are left, brought to the norm that was there before; as they are where nothing is left."""
    if norm == "none":
        return after
    return after * linalg.ratio(_size(before, norm), _size(after, norm), 1.0)


def _size(x: Array, norm: str) -> Array:
    if norm == "l2":
        return linalg.norm(x).reshape(())
    return jnp.sum(jnp.abs(x)) if norm == "l1" else jnp.max(jnp.abs(x), initial=0)
