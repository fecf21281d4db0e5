"""Methods that use something measured of each expert: Fisher merging, RegMean and LOT.

Fisher merging (Matena and Raffel, arXiv 2111.09832), entry by entry, with the diagonal `F_t = E[g^2]` of expert t's
Fisher information, `g` the gradient of the log-likelihood of one example:

    X = (sum_t w_t F_t * D_t) / (sum_t w_t F_t)

RegMean (Jin et al., arXiv 2212.09849), for one canonical weight with inputs `x` of expert t's own layer:

    Sigma_t = E[x x^T],  S_t = a Sigma_t + (1 - a) diag(Sigma_t),  G = sum_t w_t S_t,  K = sum_t w_t D_t S_t
    X = X_a + (K - X_a G)(G + rho I)^{-1},  X_a = sum_t w_t D_t / sum_t w_t,  rho = ridge trace(G) / in

which for `rho = 0` and a regular `G` is the paper's `K G^{-1}`, on deltas or on weights alike. The system is solved
with a unit diagonal: whatever the inputs' scales, its smallest eigenvalue is then at least `1 - a`.

LOT (Sun et al., arXiv 2505.23859): `S_t = Sigma_t` and `X = K pinv(G)`, on deltas.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check_number
from cfmerge.core.numbers import Number
from cfmerge.core.part import Context, Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.core.survey import Found, Look, Measure, Survey, xp_of
from cfmerge.covariance import boosted_diagonal
from cfmerge.errors import CfmergeError


def _moment(method: str, what: str, context: Context, shape: tuple[int, ...], dtype: Any) -> Array:
    """The moment of this expert, checked.

    Raises:
        CfmergeError: nothing was, or it has another shape.
    """
    if context.moment is None:
        raise CfmergeError(f"{method}: an expert comes without its {what}; give one for each expert (moments)")
    if context.moment.shape != shape:
        raise CfmergeError(f"{method}: {what} of shape {tuple(context.moment.shape)}, expected {shape}")
    return jnp.asarray(context.moment, dtype)


class FisherSums(NamedTuple):
    """`weighted = sum w_t F_t * D_t`, `fisher = sum w_t F_t`, `total = sum w_t D_t`, `weight = sum w_t`."""

    weighted: Float[Array, "..."]
    fisher: Float[Array, "..."]
    total: Float[Array, "..."]
    weight: Float[Array, ""]


@register
def fisher(
    floor: Number = 1e-6, below: Literal["average", "raise", "add"] = "average", normalise: bool = False
) -> Method:
    """The mean of the deltas, every entry weighted by the experts' diagonal Fisher information.

    Args:
        floor: the least Fisher that counts; 1e-6 is that of the authors' code.
        below: "average": entries whose mean Fisher over the experts is below the floor get the plain average;
            "raise": each expert's Fisher is raised to the floor, as in the authors' code; "add": the floor is added to
            each, and to its norm, as some libraries do.
        normalise: divide each expert's Fisher by its norm over the whole model (scaled so that these factors sum to
            one), as the authors' code does by default: for experts whose Fishers differ in scale.

    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832.
    """
    check_number("fisher: floor", floor, 0)
    if not normalise:
        return _fisher(floor, below, None)

    def measure(delta: Float[Array, "..."], context: Context) -> Float[Array, ""]:
        return jnp.sum(_moment("fisher", "diagonal Fisher", context, delta.shape, delta.dtype) ** 2)

    def look(entries: int, own: Sequence[Any]) -> Look:
        """Each expert's factor, `(1 / ||F_t||) / sum_s (1 / ||F_s||)`; 0 where its Fisher is zero."""
        squares = yield Measure(measure)
        xp = xp_of(squares, floor)
        norms = xp.sqrt(squares) + (floor if below == "add" else 0)
        inverse = xp.where(norms > 0, 1 / xp.where(norms > 0, norms, 1), 0)
        return inverse / xp.maximum(inverse.sum(), np.finfo(np.float32).tiny)

    return _fisher(floor, below, (), Survey(look, lambda found: _fisher(floor, below, found)))


def _fisher(floor: Number, below: str, found: Found | tuple[()] | None, survey: Survey | None = None) -> Method:
    """Fisher merging with the factors that were found: None if there are none, () if they are yet to be."""

    def init(base: Float[Array, "..."]) -> FisherSums:
        zero = jnp.zeros_like(base)
        return FisherSums(zero, zero, zero, jnp.zeros((), base.dtype))

    def update(
        statistic: FisherSums, delta: Float[Array, "..."], weight: float | Array, context: Context
    ) -> FisherSums:
        if found == ():
            raise CfmergeError("fisher: normalise=True needs the norms over the whole model; merge the whole model")
        information = _moment("fisher", "diagonal Fisher", context, delta.shape, delta.dtype)
        if below == "raise":
            information = jnp.maximum(information, as_array(floor, delta.dtype))
        if below == "add":
            information = information + as_array(floor, delta.dtype)
        if isinstance(found, Found):
            information = information * jnp.asarray(found.model, delta.dtype)[context.number]
        return FisherSums(
            statistic.weighted + weight * information * delta,
            statistic.fisher + weight * information,
            statistic.total + weight * delta,
            statistic.weight + weight,
        )

    def solve(statistic: FisherSums) -> tuple[Float[Array, "..."], Report]:
        weighted, information, total, weight = statistic
        mean = linalg.weighted_mean(information, weight)
        least = jnp.asarray(jnp.finfo(mean.dtype).tiny, mean.dtype)
        if below == "average":
            least = jnp.maximum(least, as_array(floor, mean.dtype))
        counts = mean >= least
        merged = jnp.where(counts, weighted / jnp.where(counts, information, 1), linalg.weighted_mean(total, weight))
        return merged, {"below_floor": jnp.mean(~counts, dtype=mean.dtype)}

    return Method(
        "fisher",
        init,
        update,
        solve,
        needs=Needs("entry", weights="positive", normalises=True, moments="fisher"),
        notes=FISHER_NOTES,
        survey=survey,
    )


FISHER_NOTES = {
    "below_floor": (
        lambda value: value > 0.5,
        "the Fisher is below the floor in {value:.0%} of the entries, which get the plain average; use a smaller "
        "floor, or normalise=True",
    ),
}


class Normal(NamedTuple):
    """The normal equations: `gram = sum w_t S_t`, `cross = sum w_t D_t S_t`, `total = sum w_t D_t`, `weight`."""

    gram: Float[Array, "in in"]
    cross: Float[Array, "out in"]
    total: Float[Array, "out in"]
    weight: Float[Array, ""]


def _init(base: Float[Array, "out in"]) -> Normal:
    n = base.shape[1]
    zero = jnp.zeros_like(base)
    return Normal(jnp.zeros((n, n), base.dtype), zero, zero, jnp.zeros((), base.dtype))


def _add(
    statistic: Normal, delta: Float[Array, "out in"], covariance: Float[Array, "in in"], weight: float | Array
) -> Normal:
    return Normal(
        statistic.gram + weight * covariance,
        statistic.cross + weight * linalg.matmul(delta, covariance),
        statistic.total + weight * delta,
        statistic.weight + weight,
    )


@register
def regmean(a: Number = 0.9, ridge: Number = 0.0) -> Method:
    """Least squares on the outputs of each layer, for the inputs that each expert has seen (Grams are given).

    Args:
        a: the factor of the Grams' off-diagonal entries; 0.9 is the paper's (0.1 for DeBERTa); 1 leaves them,
            0 weighs each input by itself.
        ridge: shrinkage to the mean of the deltas, relative to the mean eigenvalue of the experts' Grams; the paper
            has none.

    Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv 2212.09849.
    """
    check_number("regmean: a", a, 0, 1)
    check_number("regmean: ridge", ridge, 0)

    def update(statistic: Normal, delta: Float[Array, "out in"], weight: float | Array, context: Context) -> Normal:
        n = delta.shape[1]
        covariance = _moment("regmean", "input Gram", context, (n, n), delta.dtype)
        return _add(statistic, delta, boosted_diagonal(covariance, as_array(a, delta.dtype)), weight)

    def solve(statistic: Normal) -> tuple[Float[Array, "out in"], Report]:
        gram, cross, total, weight = statistic
        n = gram.shape[0]
        rho = as_array(ridge, gram.dtype) * jnp.trace(gram) / n
        diagonal = jnp.diagonal(gram)
        used = diagonal + rho > jnp.finfo(gram.dtype).tiny
        scale = jnp.where(used, 1 / jnp.sqrt(jnp.where(used, diagonal + rho, 1)), 0)

        anchor = linalg.weighted_mean(total, weight)
        system = (gram * scale[:, None]) * scale
        system = jnp.where(jnp.eye(n, dtype=bool), 1, system)
        residual = (cross - linalg.matmul(anchor, gram)) * scale
        solution, held = linalg.solve_right(residual, system)
        least = jnp.min(jnp.where(used, ((1 - as_array(a, gram.dtype)) * diagonal + rho) * scale**2, 1))
        return anchor + solution * scale, {
            "ridge_ratio": least / linalg.largest_eigenvalue(system),
            "no_cholesky": ~held,
            "unused_inputs": n - jnp.sum(used),
        }

    return Method(
        "regmean",
        _init,
        update,
        solve,
        needs=Needs(weights="positive", normalises=True, moments="input_gram"),
        by_rows=True,
        notes=REGMEAN_NOTES,
    )


REGMEAN_NOTES = {
    "no_cholesky": (
        bool,
        "the Cholesky factorisation failed; solved by eigenvalues with a floor: the Grams are of deficient rank, "
        "or not Grams; use a smaller a, or a ridge",
    ),
    "unused_inputs": (bool, "{value:.0f} inputs are zero in all Grams: these columns get the mean of the deltas"),
}


@register
def lot(cutoff: Number | None = None) -> Method:
    """Least squares on the outputs of each layer, by a pseudo-inverse: nothing changes where no input points.

    Args:
        cutoff: eigenvalues of the experts' summed Gram up to this, relative to the largest, count as zero; none: the
            number of inputs times the machine epsilon. Directions that the Grams do not reach stay at the base.

    Source: Sun et al., Towards Minimizing Feature Drift in Model Merging, NeurIPS 2025, arXiv 2505.23859.
    """
    check_number("lot: cutoff", cutoff, 0, 1)

    def update(statistic: Normal, delta: Float[Array, "out in"], weight: float | Array, context: Context) -> Normal:
        n = delta.shape[1]
        return _add(statistic, delta, _moment("lot", "input Gram", context, (n, n), delta.dtype), weight)

    def solve(statistic: Normal) -> tuple[Float[Array, "out in"], Report]:
        n = statistic.gram.shape[0]
        floor = None if cutoff is None else as_array(cutoff, statistic.gram.dtype)
        inverse, kept, least = linalg.pseudo_inverse(statistic.gram, floor)
        return linalg.matmul(statistic.cross, inverse), {"rank": kept, "cut": n - kept, "ridge_ratio": least}

    needs = Needs(weights="positive", moments="input_gram")
    return Method("lot", _init, update, solve, needs=needs, notes=LOT_NOTES)


LOT_NOTES = {
    "cut": (
        bool,
        "{value:.0f} directions of the inputs were cut: the Grams do not reach them, and they stay at the base",
    ),
}
