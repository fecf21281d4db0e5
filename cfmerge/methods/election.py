"""Sign election: in each entry, only the deltas of the elected sign are merged.

P. Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708. For one entry, with `d_t = w_t D_t` after trimming:

    s = sgn(sum_t d_t)                       the sign of larger total mass is elected
    A = {t: sgn(d_t) = s}                    zeros never agree
    X = sum_{t in A} d_t / sum_{t in A} w_t  the mean of those that agree (w_t = 1 in the paper); 0 without any
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge import linalg
from cfmerge.core.deltas import of_deltas
from cfmerge.core.part import Method, Needs, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Look, Measure, Survey, xp_of
from cfmerge.methods._stack import total, weighted

Elect = Literal["mass", "norm_fraction", "norm_mass"]
Combine = Literal["mean", "sum", "max"]
Zero = Literal["drop", "positive", "majority"]


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
        combine: a combination of the deltas that agree: "mean", their weighted mean; "sum"; or "max", the largest
            magnitude.
        zero: the sign that is elected where the votes cancel: "drop", nothing; "positive"; or "majority", the sign that
            is elected in more entries of the model, and the negative one if there is none.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.
    """

    def votes(deltas: Array, items: list[Array], energies: Array | None) -> Array:
        if elect == "mass":
            return jnp.sign(total(items))
        norms = energies if energies is not None else jnp.stack([jnp.sum(delta**2) for delta in deltas])
        shares = [linalg.ratio(delta, jnp.sqrt(norm)) ** 2 for delta, norm in zip(deltas, norms, strict=True)]
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
    return dataclasses.replace(plain, survey=Survey(look, lambda found: made(found.model), rows=True))


def _maximum(items: list[Array]) -> Array:
    largest = items[0]
    for item in items[1:]:
        largest = jnp.maximum(largest, item)
    return largest
