"""EMR-Merging: one vector for all tasks; for each task a mask of one bit an entry, and one number.

C. Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024, arXiv 2405.17461. Entry by
entry, with `D_t` the deltas:

    gamma = sgn(sum_t D_t)                                      elect: 0 stays 0, as in the paper
    D_uni = gamma max_t (gamma D_t)_+                           the largest magnitude of that sign; 0 without any
    M_t   = [gamma D_t > 0]                                     mask
    lambda_t = sum |D_t| / sum |M_t D_uni|                      rescale: over the whole model
    task t:  W_0 + lambda_t M_t D_uni

`lambda_t` restores the length in L1; it does not minimise the distance to `D_t`, as the paper says. The number that
does is `<|D_t|, |M_t D_uni|> / ||M_t D_uni||^2` (`rescale="l2"`). The authors' scripts for eight ViTs take, in place of
the sums, the sum over the tensors of each tensor's mean (`scope="tensor_mean"`), so that a bias weighs as much as a
matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from cfmerge import linalg
from cfmerge.compose.slots import ENTRIES
from cfmerge.core.part import Composer, Report
from cfmerge.core.registry import register

Rescale = Literal["l1", "l2", "none"]
Scope = Literal["model", "tensor_mean"]
PLACES = ("above", "below")


# For each kind of number the sums above and below the line, over the entries: of |D_t| and |M_t D_uni|.
TERMS: Mapping[str, tuple[Callable[[Array, Array], Array], ...]] = {
    "l1": (lambda own, kept: own, lambda own, kept: kept),
    "l2": (lambda own, kept: own * kept, lambda own, kept: kept * kept),
    "none": (),
}


@register
def emr(rescale: Rescale = "l1", scope: Scope = "model") -> Composer:
    """The elected vector of all tasks, with a mask and a number for each task.

    Args:
        rescale: each task's number: "l1", the paper's; "l2", which minimises the distance to the expert; "none", 1.
        scope: the sums behind it: over the "model", as the paper says, or "tensor_mean", as the paper's scripts do.

    Source: Huang et al., EMR-Merging, NeurIPS 2024, arXiv 2405.17461.
    """

    def update(deltas: tuple[Array, ...], delta: Array, weight: float | Array = 1.0) -> tuple[Array, ...]:
        return (*deltas, delta)

    def solve(deltas: tuple[Array, ...]) -> tuple[Mapping[str, Array], Report]:
        unified, masks = unify(deltas)
        return {"shared": unified, "masks": jnp.stack(masks)}, _materialised(_sums, list(deltas), unified, masks)

    def _sums(deltas: Sequence[Array], unified: Array, masks: Sequence[Array]) -> dict[str, Array]:
        size = jnp.abs(unified)
        return {
            f"{place}[{t}]": jnp.sum(term(jnp.abs(delta), jnp.where(mask, size, 0)))
            for t, (delta, mask) in enumerate(zip(deltas, masks, strict=True))
            for place, term in zip(PLACES, TERMS[rescale], strict=False)
        }

    return Composer("emr", lambda base: (), update, solve, needs=ENTRIES, additive=False, sums=True)


def unify(deltas: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], list[Bool[Array, "..."]]]:
    """`D_uni` and the masks `M_t`.

    The sum is compensated, so that its sign does not depend on the order of the experts.

    Example:
        >>> unified, masks = unify([jnp.array([1.0, 1.0]), jnp.array([1.0, -10.0])])
        >>> unified.tolist(), [mask.tolist() for mask in masks]
        ([1.0, -10.0], [[True, False], [True, True]])
    """
    total, lost = deltas[0], jnp.zeros_like(deltas[0])
    for delta in deltas[1:]:
        summed = total + delta
        part = summed - total
        lost = lost + ((total - (summed - part)) + (delta - part))  # the rounding error of the sum, exactly
        total = summed
    gamma = jnp.sign(total + lost)
    along = [gamma * delta for delta in deltas]
    largest = jnp.zeros_like(gamma)
    for own in along:
        largest = jnp.maximum(largest, own)
    return gamma * largest, [own > 0 for own in along]


def _materialised(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, behind a loop of one step: XLA would compute the arguments anew for every sum."""
    return jax.tree.map(lambda leaf: leaf[0], lax.scan(lambda held, _: (held, function(*held)), arguments, None, 1)[1])


def scales(reports: Mapping[str, Report], entries: Mapping[str, int], tasks: int, scope: Scope) -> list[Any]:
    """`lambda_t` of every task; 0 where nothing is kept, 1 where nothing was summed.

    Args:
        reports: `{tensor: {"above[t]": sum, "below[t]": sum}}`, as `emr` reports them.
        entries: of each tensor.

    Example:
        >>> scales({"x": {"above[0]": 2.0, "below[0]": 1.0}}, {"x": 2}, 1, "model")
        [2.0]
    """

    def total(key: str) -> Any:
        own = ((name, report[key]) for name, report in reports.items() if key in report)
        return sum(value / (entries[name] if scope == "tensor_mean" else 1) for name, value in own)

    summed = any("above" in key for report in reports.values() for key in report)
    return [ratio(total(f"above[{t}]"), total(f"below[{t}]")) if summed else 1.0 for t in range(tasks)]


def ratio(above: Any, below: Any) -> Any:
    """The ratio, 0 where the lower is zero; of numbers as a number."""
    if isinstance(below, jax.Array):
        return linalg.ratio(above, below)
    return above / below if below else 0.0
