"""Masks: entry by entry, which experts have a say.

magmax      the delta of largest magnitude                                         MagMax, arXiv 2407.06322
consensus   the sum, where enough experts lean on it                               TALL masks, arXiv 2405.07813
sce         select, calculate, erase                                               FuseChat SCE, arXiv 2408.07990
ram         the mean over those that changed the entry                             RAM, arXiv 2601.13572
random_expert   the delta of an expert drawn at random: a control for all of these
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import check_number
from cfmerge.core.deltas import of_deltas
from cfmerge.core.numbers import Number
from cfmerge.core.part import Context, Method, Needs, Seen
from cfmerge.core.random import draws
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Measure, Order, Survey, reached, with_pieces
from cfmerge.linalg.selection import largest, magnitude_keys, steady
from cfmerge.methods._stack import total, weighted
from cfmerge.methods._thresholds import share_of


@register
def magmax(scale: Number = 0.5, ties: Literal["later", "first"] = "later") -> Method:
    """The delta of largest magnitude in each entry, times a scale.

    Args:
        scale: a factor of the merged delta.
        ties: which of two equal magnitudes: that of the "later" or of the "first" expert.

    Source: Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322.
    """
    check_number("magmax: scale", scale)

    def update(statistic: Array, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Array:
        item = weight * delta
        size, held = jnp.abs(item), jnp.abs(statistic)
        return jnp.where(size >= held if ties == "later" else size > held, item, statistic)

    return Method(
        "magmax",
        jnp.zeros_like,
        update,
        lambda statistic: (scale * statistic, {}),
        needs=Needs("entry", ordered=True),
        additive=False,
    )


@register
def consensus(threshold: Number = 0.4, agree: int = 2, scale: Number = 0.3) -> Method:
    """The sum of the deltas, in those entries that matter to enough experts.

    An entry matters to expert t if `|D_t| > threshold |N - D_t|`, `N` the sum of all deltas.

    Args:
        threshold: the published code tries 0.2 to 0.6.
        agree: to how many experts an entry must matter to be kept (all of them where there are fewer); 0 keeps all.
        scale: a factor of the sum, as in task arithmetic.

    Source: Wang et al., Localizing Task Information (TALL masks), ICML 2024, arXiv 2405.07813.
    """
    check_number("consensus: threshold", threshold, 0)
    check_number("consensus: agree", agree, 0)
    check_number("consensus: scale", scale)

    def agreed(base: Array, deltas: Float[Array, "T ..."], weights: Float[Array, " T"]) -> Float[Array, "..."]:
        items = weighted(deltas, weights)
        summed = total(items)
        votes = _counts(tall_masks(items, summed, threshold))
        return jnp.asarray(scale, summed.dtype) * jnp.where(votes >= min(agree, len(items)), summed, 0)

    return of_deltas(agreed, Needs("entry"))


def tall_masks(deltas: list[Array], summed: Array, threshold: Any) -> list[Array]:
    """In which entries each delta matters: `|D_t| > threshold |N - D_t|`."""
    return [jnp.abs(delta) > threshold * jnp.abs(summed - delta) for delta in deltas]


@register
def sce(density: Number = 1.0, uniform_below: Number = 0.0) -> Method:
    """Weights each expert by its energy in the entries where the experts differ most, and drops minority signs.

    select: the entries of largest variance over the experts; calculate: `w_t = ||D_t||^2 / sum_s ||D_s||^2` in
    these; erase: entries without the sign of `sum_t D_t`; the weighted mean of the rest.

    Args:
        density: share of the entries with any variance that is selected, in each tensor; 1 selects all entries.
        uniform_below: equal weights where the mean squares of the deltas sum to less: 1e-6 does as mergekit, in
            which ordinary fine-tuning stays below; 0 weights as published.

    Source: Wan et al., FuseChat, arXiv 2408.07990.
    """
    check_number("sce: density", density, 0, 1)
    check_number("sce: uniform_below", uniform_below, 0)

    def chosen(base: Array, stack: Float[Array, "T ..."], weights: Array) -> Float[Array, "..."]:
        size = _largest(stack)
        variance = _variance(stack, size)
        differing = jnp.sum(variance > 0, dtype=jnp.int32)
        selected = largest(magnitude_keys(variance), count(density, differing, variance.size))
        return _erased(_where(selected, stack), shares(_energies(selected, stack, size), size, variance.size))

    def count(density: Any, differing: Any, size: Any) -> Any:
        """How many entries are selected."""
        some = jnp.where(differing > 0, share_of(density, differing, "floor"), size)
        return jnp.where(jnp.asarray(density) >= 1, size, some)

    def shares(energies: Float[Array, " T"], size: Any, entries: Any) -> Float[Array, " T"]:
        """`w_t`, from `||D_t / size||^2` where entries are selected."""
        even = jnp.sum(energies) / entries * jnp.asarray(size) ** 2 < jnp.asarray(uniform_below, energies.dtype)
        return jnp.where(even, 1 / len(energies), linalg.ratio(energies, jnp.sum(energies)))

    def look(entries: Any, own: Sequence[Any]) -> Look:
        size = yield Measure(lambda seen: _largest(seen.deltas), joint=True, total="max")
        differing = yield Measure(
            lambda seen: jnp.sum(jnp.any(seen.deltas != seen.deltas[0], axis=0), dtype=jnp.int32), joint=True
        )

        def keys(seen: Seen) -> list[Array]:
            return [magnitude_keys(_variance(seen.deltas, jnp.asarray(size, seen.base.dtype)))]

        ordered = yield Order(keys, [(count(own[0], differing, entries),)], joint=True)

        def energies(seen: Seen) -> Array:
            selected = reached(keys(seen)[0], ordered.keys[0, 0], ordered.ends[0, 0], seen.contexts[0].start)
            return _energies(selected, seen.deltas, jnp.asarray(size, seen.base.dtype))

        return size, ordered, jnp.asarray((yield Measure(energies, joint=True))), entries

    def informed(found: Found) -> Method:
        size, ordered, energies, entries = found.model

        def pieces(base: Array, stack: Float[Array, "T ..."], weights: Array, start: Any) -> Array:
            keys = magnitude_keys(_variance(stack, jnp.asarray(size, base.dtype)))
            selected = reached(keys, ordered.keys[0, 0], ordered.ends[0, 0], start)
            own = shares(jnp.asarray(energies, base.dtype), jnp.asarray(size, base.dtype), entries)
            return _erased(_where(selected, stack), own)

        return of_deltas(pieces, needs.but(scope="entry"), name="sce", located=True)

    survey = Survey(look, informed, own=density, within="tensor")
    needs = Needs("tensor", weights="none")
    return with_pieces(of_deltas(chosen, needs), survey)


def _where(selected: Array, deltas: Float[Array, "T ..."]) -> list[Array]:
    return [jnp.where(selected, delta, 0) for delta in deltas]


def _erased(deltas: list[Array], shares: Float[Array, " T"]) -> Float[Array, "..."]:
    """The mean of the deltas that have the sign of their sum, weighted by the shares."""
    sign = jnp.where(total(deltas) >= 0, 1, -1)
    agree = [jnp.sign(delta) == sign for delta in deltas]
    summed = total(jnp.where(a, w * d, 0) for a, w, d in zip(agree, shares, deltas, strict=True))
    return linalg.ratio(summed, total(jnp.where(a, w, 0) for a, w in zip(agree, shares, strict=True)))


def _energies(selected: Array, deltas: Float[Array, "T ..."], size: Array) -> Float[Array, " T"]:
    """`||D_t / size||^2` of the selected entries."""
    return jnp.stack([jnp.sum(linalg.ratio(delta, size) ** 2) for delta in _where(selected, deltas)])


def _variance(deltas: Float[Array, "T ..."], size: Array) -> Float[Array, "..."]:
    """The variance over the experts, of deltas over a size, times their number."""
    moved = [linalg.ratio(delta - deltas[0], size) for delta in deltas]  # exactly 0 where all are the same
    mean = total(moved) / len(moved)
    return total(steady((each - mean) ** 2) for each in moved)


def _largest(deltas: Float[Array, "T ..."]) -> Array:
    return jnp.max(jnp.abs(deltas), initial=0)


@register
def ram(threshold: Number = 1e-5, relative: bool = False) -> Method:
    """The mean of the deltas that changed an entry, in each entry: a change of one expert alone is kept whole.

    Args:
        threshold: an expert has changed an entry if its delta there is larger than this.
        relative: the threshold is in units of the root mean square of the expert's delta in the tensor.

    Source: Reinforced Agent Merging (RAM), arXiv 2601.13572, as in mergekit.
    """
    check_number("ram: threshold", threshold, 0)

    def of_changed(base: Array, deltas: Float[Array, "T ..."], weights: Array) -> Float[Array, "..."]:
        active = _active(deltas, threshold, relative)
        summed = total(jnp.where(a, d, 0) for a, d in zip(active, deltas, strict=True))
        return summed / jnp.maximum(_counts(active), 1).astype(summed.dtype)

    return of_deltas(of_changed, Needs("tensor" if relative else "entry", weights="none"))


@register
def ram_plus(threshold: Number = 1e-5, r: Number = 0.1, alpha: Number = 0.2, relative: bool = False) -> Method:
    """`ram`, where what only one expert changed is amplified by how much else that expert shares with others.

    Those entries are multiplied by `1 + r min(rho, alpha)`, `rho` the number of the expert's entries that others
    changed too, over the number of those that only it changed, in the tensor.

    Args:
        threshold: an expert has changed an entry if its delta there is larger than this.
        r: how much is amplified.
        alpha: the largest rho that counts.
        relative: the threshold is in units of the root mean square of the expert's delta in the tensor.

    Source: Reinforced Agent Merging (RAM+), arXiv 2601.13572, as in mergekit.
    """
    check_number("ram_plus: threshold", threshold, 0)
    check_number("ram_plus: r", r)
    check_number("ram_plus: alpha", alpha, 0)

    def amplified(base: Array, deltas: Float[Array, "T ..."], weights: Array) -> Float[Array, "..."]:
        active = _active(deltas, threshold, relative)
        counts = _counts(active)
        dtype = deltas.dtype
        summed = jnp.zeros_like(deltas[0])
        for mask, delta in zip(active, deltas, strict=True):
            own, shared = mask & (counts == 1), mask & (counts > 1)
            rho = jnp.sum(shared, dtype=dtype) / jnp.maximum(jnp.sum(own, dtype=dtype), 1)
            factor = 1 + jnp.asarray(r, dtype) * jnp.minimum(rho, jnp.asarray(alpha, dtype))
            summed = summed + jnp.where(own, factor * delta, jnp.where(shared, delta, 0))
        return summed / jnp.maximum(counts, 1).astype(dtype)

    return of_deltas(amplified, Needs("tensor", weights="none"))


def _active(deltas: Float[Array, "T ..."], threshold: Any, relative: bool) -> list[Array]:
    def least(delta: Array) -> Array:
        absolute = jnp.asarray(threshold, delta.dtype)
        return absolute * linalg.norm(delta) / max(delta.size, 1) ** 0.5 if relative else absolute

    return [jnp.abs(delta) > least(delta) for delta in deltas]


def _counts(active: list[Array]) -> Array:
    return total(mask.astype(jnp.int32) for mask in active)


class Drawn(NamedTuple):
    """The delta of the expert with the largest draw so far."""

    delta: Float[Array, "..."]
    draw: Float[Array, "..."]


@register
def random_expert() -> Method:
    """The delta of an expert drawn at random for each entry, all with the same probability: a control.

    Any rule that chooses one expert for each entry should do better. Every expert draws a number for each entry
    from its own key, and the largest wins, so that the order of the experts makes no difference.

    Source: a control, not a published method.
    """

    def init(base: Float[Array, "..."]) -> Drawn:
        return Drawn(jnp.zeros_like(base), jnp.full_like(base, -1))

    def update(statistic: Drawn, delta: Array, weight: float | Array, context: Context) -> Drawn:
        draw = draws(context, delta)
        equal = (draw == statistic.draw) & (delta > statistic.delta)  # neither order may show
        wins = (draw > statistic.draw) | equal
        return Drawn(jnp.where(wins, delta, statistic.delta), jnp.where(wins, draw, statistic.draw))

    return Method(
        "random_expert",
        init,
        update,
        lambda statistic: (statistic.delta, {}),
        needs=Needs("entry", weights="none", random=True),
        additive=False,
    )
