"""Model Stock: how far from the base towards the mean of the experts, read off the angles between their deltas.

D.-H. Jang, S. Yun, D. Han, Model Stock, ECCV 2024, arXiv 2403.19522. Per tensor, with `T` experts and `c` the mean
over their pairs of the cosine between two deltas,

    t = T c / (1 + (T - 1) c),     X = t (1/T) sum_t D_t.

Fine-tuned weights scatter about a centre, at equal distances and angles; this is the point nearest to that centre
on the plane through base and experts. With `u_t = D_t / ||D_t||` the cosines of all pairs add up to
`(||sum u_t||^2 - sum ||u_t||^2) / 2`: two sums over experts are all that is kept.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.deltas import of_deltas
from cfmerge.core.part import Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Survey, with_pieces
from cfmerge.methods._sphere import look_at_extent


class Units(NamedTuple):
    """`total = sum D_t`, `units = sum u_t`, how many experts, and how many changed the tensor (or the filter)."""

    total: Float[Array, "..."]
    units: Float[Array, "..."]
    experts: Float[Array, ""]
    changed: Float[Array, "..."]


@register
def model_stock(
    filter_wise: bool = False, angle: Literal["cosine", "degrees"] = "cosine", clamp: bool = True
) -> Method:
    """The mean of the deltas, shrunk by a ratio in [0, 1] that follows from the angles between them.

    Args:
        filter_wise: one ratio for each output (row) instead of one for the tensor.
        angle: for more than two experts, "cosine" averages the cosines of their pairs, as the paper and mergekit do;
            "degrees" averages the angles, as fusion_bench does, and keeps all deltas for it.
        clamp: a negative mean cosine leaves the tensor at the base. Without it the ratio is negative too (the
            result moves away from the experts), with a pole at a cosine of -1 / (T - 1).

    Source: Jang, Yun and Han, Model Stock, ECCV 2024, arXiv 2403.19522.
    """

    def over(delta: Array) -> tuple[int, ...]:
        return tuple(range(1 if filter_wise and delta.ndim > 1 else 0, delta.ndim))

    def init(base: Float[Array, "..."]) -> Any:
        if angle == "degrees":
            return ()
        zero = jnp.zeros_like(base)
        return Units(zero, zero, jnp.zeros((), base.dtype), jnp.sum(zero, axis=over(base), keepdims=True))

    def update(statistic: Any, delta: Float[Array, "..."], weight: float | Array = 1.0) -> Any:
        if angle == "degrees":
            return (*statistic, delta)
        u = linalg.unit(delta, over(delta))
        changed = jnp.any(u != 0, axis=over(delta), keepdims=True)
        total, units, count, before = statistic
        return Units(total + weight * delta, units + weight * u, count + weight, before + weight * changed)

    def solve(statistic: Any) -> tuple[Array, Report]:
        if angle == "degrees":
            count = jnp.asarray(len(statistic), statistic[0].dtype)
            total = sum(statistic)
            return shrunk(total, count, _cosine_of_mean_angle(_cosines(jnp.stack(statistic), over(total)), total.ndim))
        total, units, count, changed = statistic
        pairs = count * (count - 1)
        among = jnp.sum(units * units, axis=over(total), keepdims=True) - changed
        return shrunk(total, count, jnp.where(pairs > 0, among / jnp.where(pairs > 0, pairs, 1), 1))

    def shrunk(total: Array, count: Array, cosine: Array) -> tuple[Array, Report]:
        below = 1 + (count - 1) * cosine
        defined = jnp.abs(below) > 16 * jnp.finfo(total.dtype).eps
        ratio = jnp.where(defined, count * cosine / jnp.where(defined, below, 1), 0)
        if clamp:
            ratio = jnp.where(cosine > 0, jnp.minimum(ratio, 1), 0)
        opposed = (cosine < 0) if clamp else ~defined
        return ratio * total / jnp.maximum(count, 1), {
            "cosine": jnp.mean(cosine),
            "ratio": jnp.mean(ratio),
            "clamped": jnp.mean(opposed, dtype=total.dtype),
        }

    def informed(found: Found) -> Method:
        def piece(base: Array, deltas: Float[Array, "T ..."], weights: Array) -> tuple[Array, Report]:
            cosines, count = jnp.asarray(found.model.cosines, base.dtype), len(deltas)
            if angle == "degrees":
                cosine = _cosine_of_mean_angle(cosines[None], base.ndim)
            else:
                cosine = (jnp.sum(cosines) - jnp.trace(cosines)) / (count * (count - 1))
            return shrunk(jnp.sum(deltas, axis=0), jnp.asarray(count, base.dtype), cosine)

        return of_deltas(piece, needs.but(scope="entry"), notes=NOTES)

    def look() -> Look:
        extent, _ = yield from look_at_extent(lambda seen: seen._replace(base=jnp.zeros_like(seen.base)))
        return extent

    needs = Needs("tensor", experts=(2, None), weights="none")
    method = Method(
        "model_stock",
        init,
        update,
        solve,
        needs=needs,
        additive=angle == "cosine",
        statistic=("model_stock", filter_wise) if angle == "cosine" else None,
        notes=NOTES,
        joint=not filter_wise,  # angles between whole deltas do not depend on the basis
    )
    survey = Survey(lambda entries, own: look(), informed, within="tensor")
    return method if filter_wise else with_pieces(method, survey)


NOTES = {
    "clamped": (
        lambda value: value > 0,
        "the deltas point away from each other in {value:.3g} of the tensor's filters (1: everywhere): their ratio "
        "was clamped to 0, which leaves them at the base",
    )
}


def _cosines(deltas: Float[Array, "experts ..."], over: tuple[int, ...]) -> Float[Array, "filters experts experts"]:
    """The cosines of all pairs, of each filter; that with a zero delta is 0."""
    experts, shape = len(deltas), deltas.shape[1:]
    filters = 1 if 0 in over or not shape else shape[0]
    units = linalg.unit(deltas.reshape(experts, filters, -1), -1).swapaxes(0, 1)
    return linalg.matmul(units, units.swapaxes(1, 2))


def _cosine_of_mean_angle(cosines: Float[Array, "filters experts experts"], ndim: int) -> Array:
    """The cosine of the mean angle over all pairs, of each filter of a tensor with so many axes."""
    filters, experts, _ = cosines.shape
    first, second = jnp.triu_indices(experts, 1)
    pairs = jnp.clip(cosines[:, first, second], -1, 1)
    angles = 2 * jnp.arctan2(linalg.root(1 - pairs), linalg.root(1 + pairs))
    mean = jnp.sum(angles, axis=1) / max(len(first), 1)
    return jnp.cos(mean).reshape((filters,) + (1,) * (ndim - 1) if ndim else ())
