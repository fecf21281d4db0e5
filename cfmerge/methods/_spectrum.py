"""Consequences of one eigendecomposition of the Gram: filters, rank rules, grids of ridges, cross-validation.

With `G = Q diag(l) Q^T` every member of the family is `X = X_a + (K - X_a G) Q diag(h(l)/l) Q^T` (see
`_least_squares`). The filters and rank rules are those of SWUDI and ASWUDI (arXiv 2606.07289), whose Gram has trace
`T`, so that their numbers mean the same whatever the deltas' size.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array
from cfmerge.core.numbers import Number
from cfmerge.core.part import Report
from cfmerge.least_squares import CUT, Anchor, Grams, Sums, anchor_of, stacked


class Spectrum(NamedTuple):
    """`X = anchor + (coordinates * phi) basis` for the filter `h(l) = l phi`; see `spectrum`.

    Attributes:
        values: `l`, ascending; those that are zero because there are fewer rows than inputs are left out.
        coordinates, basis: `(m, k)` and `(k, n)`, such that the directions of `basis` are the eigenvectors' of `G`.
        energies: `||(K - X_a G) q_j||^2`.
        kappa: `sum_t w_t a_t tr((D_t - X_a) S_t (D_t - X_a)^T)`.
        samples: number of rows `R` that the estimates are made from.
        inputs: of a dense delta.
    """

    values: Float[Array, " k"]
    coordinates: Float[Array, "m k"]
    basis: Float[Array, "k n"]
    energies: Float[Array, " k"]
    kappa: Float[Array, ""]
    samples: Float[Array, ""]
    anchor: Float[Array, "m n"] | None
    inputs: int

    def filtered(self, phi: Float[Array, " k"]) -> Float[Array, "m n"]:
        """`X_a + (K - X_a G) Q diag(phi) Q^T`."""
        change = linalg.matmul(self.coordinates * phi, self.basis)
        return change if self.anchor is None else self.anchor + change

    def ridge(self, relative: Number) -> Float[Array, ""]:
        """`rho = relative trace(G)/n`."""
        return as_array(relative, self.values.dtype) * jnp.sum(self.values) / self.inputs

    def told(self, phi: Float[Array, " k"]) -> Report:
        """`ridge_ratio`, and the filter's effective rank `sum_j h(l_j)`."""
        tiny = jnp.finfo(phi.dtype).tiny
        gain = jnp.max(self.values) * jnp.max(phi)
        return {
            "ridge_ratio": jnp.where(gain > 0, 1 / jnp.maximum(gain, tiny), 1),
            "effective_rank": jnp.sum(self.values * phi),
        }


def spectrum(sums: Sums, anchor: Anchor | Array = "zero", shape: tuple[int, int] | None = None) -> Spectrum:
    """One eigendecomposition of `G` (or of `F F^T`), from which any filter and any ridge follow at little cost.

    Args:
        shape: of the dense deltas, where the sums are over their cores in a joint basis.
    """
    outputs, inputs = shape or sums.total.shape
    target = anchor_of(sums, anchor)
    if isinstance(sums.experts, Grams):
        gram, cross, kappa = sums.experts
        values, vectors = linalg.symmetric_eigen(gram)
        values = jnp.maximum(values, 0)
        coordinates, basis = linalg.matmul(cross, vectors), vectors.T
        if target is not None:
            there = linalg.matmul(target, vectors)
            kappa = kappa + jnp.sum(there * (there * values - 2 * coordinates))
            coordinates = coordinates - there * values
        energies = jnp.sum(coordinates * coordinates, axis=0)
    else:
        f, z = stacked(sums.experts)
        values, vectors = linalg.symmetric_eigen(linalg.matmul(f, f.T))
        values = jnp.maximum(values, 0)
        difference = z if target is None else z - linalg.matmul(target, f.T)
        kappa = jnp.sum(difference * difference)
        coordinates, basis = linalg.matmul(difference, vectors), linalg.matmul(vectors.T, f)
        energies = values * jnp.sum(coordinates * coordinates, axis=0)
    samples = sums.samples * (outputs / sums.total.shape[0])
    return Spectrum(values, coordinates, basis, energies, kappa, samples, target, inputs)


def inverse(values: Float[Array, " k"], inputs: int, rtol: Number | None = None) -> Float[Array, " k"]:
    """`1/l` where `l > rtol max(l)`, else 0: the pseudo-inverse; `rtol` is `n` times float32's epsilon by default."""
    cut = (inputs * CUT if rtol is None else as_array(rtol, values.dtype)) * jnp.max(values)
    keep = values > cut
    return jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)


def ridge_filter(values: Array, rho: Array) -> Array:
    total = values + rho
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def ridge_path(
    sums: Sums, ridges: Sequence[float] | Float[Array, " k"], anchor: Anchor | Array = "zero"
) -> Float[Array, "k m n"]:
    """The merged deltas for a grid of relative ridges, from one eigendecomposition.

    Args:
        sums: of any method of this family.
        ridges: relative to the mean eigenvalue of the Gram.
        anchor: "zero", "mean", "sum", or a merged delta.

    Example:
        >>> method, delta = methods.anchored(), jnp.arange(6.0).reshape(2, 3)
        >>> sums = method.update(method.init(delta), delta)
        >>> methods.ridge_path(sums, [0.01, 0.1, 1.0], anchor="mean").shape
        (3, 2, 3)
    """
    found = spectrum(sums, anchor)
    return lax.map(lambda r: found.filtered(ridge_filter(found.values, found.ridge(r))), jnp.asarray(ridges))


def gcv(
    sums: Sums | Spectrum, ridges: Sequence[float] | Float[Array, " k"], anchor: Anchor | Array = "zero"
) -> Float[Array, " k"]:
    """Generalised cross-validation of a grid of relative ridges; the smallest value is the one to choose.

        RSS(rho) = kappa + sum_j ||Y_j||^2 (l_j/(l_j+rho)^2 - 2/(l_j+rho)),   Y = (K - X_a G) Q
        df(rho)  = sum_j l_j/(l_j+rho),   GCV = (RSS/R) / (1 - df/R)^2

    Design and targets are made from the same deltas, so it sees the variance of the estimate, not its bias.

    Args:
        sums: of any method of this family, or its `spectrum`.
        ridges: relative to the mean eigenvalue of the Gram.
        anchor: "zero", "mean", "sum", or a merged delta (a spectrum has its own).

    Example:
        >>> method, delta = methods.anchored(), jnp.arange(6.0).reshape(2, 3)
        >>> sums = method.update(method.update(method.init(delta), delta), delta[::-1])
        >>> ridges = [0.01, 0.1, 1.0]
        >>> ridges[int(jnp.argmin(methods.gcv(sums, ridges)))] in ridges
        True
    """
    found = sums if isinstance(sums, Spectrum) else spectrum(sums, anchor)
    known = found.values > found.inputs * CUT * jnp.max(found.values)
    explained = jnp.where(known, found.energies / jnp.where(known, found.values, 1), 0)
    count = jnp.maximum(found.samples, 1)
    spare = jnp.maximum(count - jnp.sum(known), 0)  # RSS and df are formed without cancellation: h -> 1 - h
    rest = jnp.where(spare > 0, jnp.maximum(found.kappa - jnp.sum(explained), 0), 0)

    def score(ridge: Array) -> Array:
        rho = found.ridge(ridge)
        left = jnp.where(known, rho * ridge_filter(found.values, rho), 0)
        rss = rest + jnp.sum(explained * left**2)
        free = (spare + jnp.sum(left)) / count
        return jnp.where(free > 0, rss / count / jnp.where(free > 0, free, 1) ** 2, jnp.inf)  # nothing to judge by

    return jax.vmap(score)(jnp.asarray(ridges))


# --- filters and ranks --------------------------------------------------------------------------------------------

Rule = Literal[
    "participation_sqrt",
    "participation",
    "entropy",
    "entropy_squared",
    "cumulative",
    "stable_rank",
    "gavish_donoho",
    "gavish_donoho_released",
    "all",
]


def rank_of(values: Float[Array, " n"], rule: Rule, share: Number, shape: tuple[int, int], count: Array) -> Array:
    """How many of the largest eigenvalues a rule keeps, at least one.

    Args:
        values: all `n` eigenvalues, ascending and positive.
        rule: participation `ceil((sum l)^2 / sum l^2)`, of the root spectrum with "_sqrt"; entropy
            `ceil(exp H(l / sum l))`, of the squared spectrum with "_squared"; "cumulative": the fewest that hold
            `share` of the sum; stable rank `ceil(sum l^2 / max l^2)`; Gavish and Donoho's threshold.
        shape: of one delta.
        count: number of rows that the Gram is made from.
    """
    if rule == "all":
        return jnp.asarray(len(values))
    if rule.startswith("gavish_donoho"):
        return jnp.maximum(_gavish_donoho(values, shape, count, rule == "gavish_donoho_released"), 1)
    if rule == "cumulative":
        held = jnp.cumsum(values[::-1]) / jnp.sum(values)
        return jnp.minimum(jnp.sum(held < as_array(share, values.dtype)) + 1, len(values))
    if rule.startswith("entropy"):
        p = values**2 if rule == "entropy_squared" else values
        p = p / jnp.sum(p)
        size = jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))))
    elif rule == "stable_rank":
        size = jnp.sum(values**2) / values[-1] ** 2
    else:
        y = jnp.sqrt(values) if rule == "participation_sqrt" else values
        size = jnp.sum(y) ** 2 / jnp.sum(y**2)
    return jnp.clip(jnp.ceil(size).astype(jnp.int32), 1, len(values))


def _gavish_donoho(values: Array, shape: tuple[int, int], count: Array, released: bool) -> Array:
    """Singular values above `lambda*(beta) / sqrt(median of Marchenko-Pastur)` times their median (arXiv 1305.5870).

    The singular values are those of the stacked rows, `count` by `n`. The released code takes `beta` from the shape
    of one delta, a guess for the median, and the median of all `n` roots, null directions included.
    """
    n = len(values)
    y = jnp.sqrt(values)
    if released:
        beta = jnp.asarray(min(shape) / max(shape), y.dtype)
        guess = jnp.where(beta < 0.9999, jnp.sqrt(jnp.maximum((1 - beta) ** 2 + beta, 1e-3)), (2 + 3**0.5) ** 0.5)
        median = y[(n - 1) // 2]
    else:
        count = jnp.maximum(count, 1).astype(y.dtype)
        beta = jnp.minimum(count, n) / jnp.maximum(count, n)
        guess = jnp.sqrt(marchenko_pastur_median(beta))
        filled = jnp.minimum(count, n).astype(jnp.int32)
        median = (y[n - filled + (filled - 1) // 2] + y[n - filled + filled // 2]) / 2
    best = jnp.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + jnp.sqrt(beta**2 + 14 * beta + 1)))
    return jnp.sum(y > best / guess * median).astype(jnp.int32)


def marchenko_pastur_median(beta: float | Array, points: int = 4096) -> Array:
    """The median of the Marchenko-Pastur law of ratio `0 < beta <= 1` and unit variance.

    With `x = 1 + beta - 2 sqrt(beta) cos(u)` its density is `2 sin(u)^2 / (pi x) du` on `[0, pi]`, which is smooth.
    """
    beta = jnp.asarray(beta)
    edges = jnp.linspace(0, jnp.pi, points + 1, dtype=beta.dtype)
    middle = (edges[1:] + edges[:-1]) / 2

    def place(u: Array) -> Array:
        return 1 + beta - 2 * jnp.sqrt(beta) * jnp.cos(u)

    below = jnp.cumsum(jnp.sin(middle) ** 2 / place(middle))
    return place(jnp.interp(0.5, below / below[-1], edges[1:]))
