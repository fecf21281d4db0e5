"""SMILE as a composer: what is kept of every expert of a linear layer; see `smile` for the equations."""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.compose.slots import in_slots, outside, resized
from cfmerge.compose.smile import check_gate, is_dense, leading_parts, rank_for, sizes
from cfmerge.core.checks import check
from cfmerge.core.joint import Joint
from cfmerge.core.part import Composer, Needs
from cfmerge.core.registry import register
from cfmerge.core.survey import Measure

UNSETTLED = 1 << 30  # a rank by share, before the look that settles it: all of it


@register
def smile(
    rank: int | float | None = 32,
    gate: int = 16,
    top_k: int = 1,
    router: Literal["delta", "expert"] = "delta",
    others: Literal["base", "mean"] = "base",
    experts: int = 1,
) -> Composer:
    """Low-rank experts and routers for every linear layer.

    Args:
        rank: of the experts; below 1 the share of each layer's squared singular values that is kept; none: dense.
        gate: the dimensions of the router, below every layer's input width.
        top_k: how many experts a token goes through.
        router: whose leading right singular vectors route: those of the "delta" or of the "expert" itself.
        others: all that is no linear layer: as in the "base", or the "mean" of the experts.
        experts: the number of experts.

    Source: Tang et al., SMILE, TPAMI 2026, arXiv 2408.10174.
    """
    check(top_k >= 1, f"smile: top_k must be at least 1, not {top_k}")
    known = rank is None or is_share(rank) or (float(rank).is_integer() and rank != 0)
    check(known, f"smile: rank must be a number of dimensions, a share below 1, or none; found {rank}")
    fixed = None if rank is None else UNSETTLED if is_share(rank) else int(rank)

    def composer(basis: Joint | None = None) -> Composer:
        def keep(base: Array, delta: Float[Array, "m n"]) -> Mapping[str, Array]:
            m, n = delta.shape if basis is None else basis.shape
            check_gate(gate, n)
            k, g = sizes(m, n, fixed, gate)
            up, down, route = leading_parts(delta, fixed, gate, base + delta if router == "expert" else None)
            if k is None or down is None:
                return {"up": up, "router": resized(route, 0, g)}
            return {"up": resized(up, 1, k), "down": resized(down, 0, k), "router": resized(route, 0, g)}

        adapters = composer if router == "delta" and not is_dense(fixed) else False
        needs = Needs("matrix", weights="none", factors="used" if adapters else "")
        return in_slots(keep, experts, needs, based=router == "expert", joint=adapters, out_of=outside)

    return composer()


def is_share(rank: float | int | None) -> bool:
    """Whether a rank is a share of the squared singular values, which a look at the deltas settles."""
    return rank is not None and 0 < rank < 1


def energy_rank(share: float | int) -> Measure:
    """The measure of a delta: the least rank that keeps that share of its squared singular values, at least 1."""

    def of(delta: Float[Array, "m n"]) -> Array:
        values, _ = linalg.symmetric_eigen(linalg.gram(delta if delta.shape[0] > delta.shape[1] else delta.T))
        return jnp.maximum(rank_for(linalg.root(jnp.maximum(values[::-1], 0)), share), 1)

    return Measure(of, by_tensor=True)
