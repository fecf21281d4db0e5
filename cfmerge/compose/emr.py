"""EMR-Merging: one vector for all tasks; for each task a mask of one bit an entry, and one number.

C. Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024, arXiv 2405.17461. Entry by
entry, with `D_t` the deltas:

    gamma = sgn(sum_t D_t)                                      elect: 0 stays 0, as in the paper
    D_uni = gamma max{|D_t| : gamma D_t > 0}                    0 without any
    M_t   = [gamma D_t > 0]                                     mask
    lambda_t = sum |D_t| / sum |M_t D_uni|                      rescale: over the whole model
    task t:  W_0 + lambda_t M_t D_uni

`lambda_t` restores the length in L1; it does not minimise the distance to `D_t`, as the paper says. The number that
does is `<|D_t|, |M_t D_uni|> / ||M_t D_uni||^2` (`rescale="l2"`). The authors' scripts for eight ViTs take, in place of
the sums, the sum over the tensors of each tensor's mean (`scope="tensor_mean"`), so that a bias weighs as much as a
matrix.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cfmerge.compose.slots import composer
from cfmerge.core.deltas import of_deltas
from cfmerge.core.part import Composer, Needs, Report, Seen
from cfmerge.core.registry import register
from cfmerge.core.survey import Look, Measure, Survey, xp_of

Rescale = Literal["l1", "l2", "none"]


@register
def emr(rescale: Rescale = "l1", scope: Literal["model", "tensor_mean"] = "model") -> Composer:
    """The elected vector of all tasks, with a mask and a number for each task.

    Args:
        rescale: each task's number: "l1", the paper's; "l2", which minimises the distance to the expert; "none", 1.
        scope: the sums behind it: over the "model", as the paper says, or "tensor_mean", as the paper's scripts do.

    Source: Huang et al., EMR-Merging, NeurIPS 2024, arXiv 2405.17461.
    """

    def elected(base: Array, deltas: Float[Array, "T ..."], weights: Array) -> tuple[Mapping[str, Array], Report]:
        unified, masks = unify(deltas)
        return {"shared": unified, "masks": masks}, {}

    def measure(seen: Seen) -> dict[str, Any]:
        unified, masks = unify(seen.deltas)
        own, kept = (_rows(jnp.abs(x)) for x in (seen.deltas, jnp.where(masks, unified, 0)))
        sums = jnp.sum(own, 1), jnp.sum(kept, 1), jnp.sum(own * kept, 1), jnp.sum(kept**2, 1), float(own.shape[1])
        return Sums(*sums)._asdict()

    def look(entries: int, own: Sequence[Any]) -> Look:
        if rescale == "none":
            return np.ones(len(own))
        if scope == "model":
            return scales(Sums(**(yield Measure(measure, joint=True))), rescale)
        pieces = yield Measure(measure, joint=True, by_tensor=True)
        return scales(means({place: Sums(**own) for place, own in pieces.items()}), rescale)

    plain = composer(of_deltas(elected, Needs("entry", weights="none")))
    return dataclasses.replace(plain, survey=Survey(look, lambda found: plain, rows=scope == "model"))


def unify(deltas: Float[Array, "T ..."]) -> tuple[Float[Array, "..."], Bool[Array, "T ..."]]:
    """`D_uni` and the masks `M_t`.

    The sum is compensated, so that its sign does not depend on the order of the experts.

    Example:
        >>> unified, masks = unify(jnp.array([[1.0, 1.0], [1.0, -10.0]]))
        >>> unified.tolist(), masks.tolist()
        ([1.0, -10.0], [[True, False], [True, True]])
    """
    total, lost = deltas[0], jnp.zeros_like(deltas[0])
    for delta in deltas[1:]:
        summed = total + delta
        part = summed - total
        lost = lost + ((total - (summed - part)) + (delta - part))  # the rounding error of the sum, exactly
        total = summed
    gamma = jnp.sign(total + lost)
    masks = gamma * deltas > 0
    return gamma * jnp.max(jnp.where(masks, jnp.abs(deltas), 0), axis=0), masks


class Sums(NamedTuple):
    """Sums over entries, `(T,)` each: `|D_t|`, `|M_t D_uni|`, the product of both, the square of the second.

    Attributes:
        entries: over how many.
    """

    own: Any
    kept: Any
    both: Any
    square: Any
    entries: Any


def scales(sums: Sums, rescale: Rescale) -> Any:
    """`lambda_t` of every task, `(T,)`; 0 where nothing is kept.

    Example:
        >>> sums = Sums(np.array([2.0, 11.0]), np.array([1.0, 11.0]), np.array([1.0, 101.0]), np.array([1.0, 101.0]), 2)
        >>> scales(sums, "l1").tolist(), scales(sums, "l2").tolist()
        ([2.0, 1.0], [1.0, 1.0])
    """
    above, below = (sums.own, sums.kept) if rescale == "l1" else (sums.both, sums.square)
    xp = xp_of(above, below)
    return xp.where(below > 0, above / xp.where(below > 0, below, 1), 0)


def means(pieces: Mapping[tuple[str, int], Sums]) -> Sums:
    """The sum over tensors of their means, out of the sums over pieces `(tensor, first entry)` of them."""
    tensors: dict[str, Sums] = {}
    for (name, _), sums in pieces.items():
        before = tensors.get(name)
        tensors[name] = sums if before is None else Sums(*(a + b for a, b in zip(before, sums, strict=True)))
    each = [[value / sums.entries for value in sums] for sums in tensors.values()]
    return Sums(*(sum(column) for column in zip(*each, strict=True)))


def _rows(stack: Array) -> Array:
    """Every expert's entries in a row."""
    return stack.reshape(stack.shape[0], -1)
