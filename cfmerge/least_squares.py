"""Weighted least squares on one layer: estimate input covariances, accumulate sums, solve for the merged delta.

For one canonical weight, with deltas `D_t` (out x in), weights `w_t`, input covariances `S_t` (in x in; estimated from
the deltas by `cfmerge.covariance`, measured, or a user's own), an anchor `X_a` and a ridge `rho = ridge trace(G)/in`:

    min_X  sum_t w_t tr((X - D_t) S_t (X - D_t)^T) + rho ||X - X_a||^2

    G = sum_t w_t S_t,   K = sum_t w_t D_t S_t
    X = X_a + (K - X_a G)(G + rho I)^{-1}            with the pseudo-inverse of G where no ridge is given

The sums are additive over experts: they are joined, and experts are forgotten. While all estimates together have
fewer rows `R` than inputs, `init(base, rows=True)` keeps the rows instead of `in x in` matrices. With
`F = [sqrt(w_t) F_t]`, `S_t = F_t^T F_t`, `G = F^T F`, and `Z = [sqrt(w_t) D_t F_t^T]`, `K = Z F`, the solution is

    X = X_a + (Z - X_a F^T)(F F^T + rho I)^{-1} F.

All functions are pure, and work under `jit`, `vmap` (a batch of layers) and `grad`. See docs/least_squares.md.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.covariance import Estimate, energy
from cfmerge.errors import CfmergeError

Anchor = Literal["zero", "mean", "sum"]
Numbers = Array | np.ndarray
Report = dict[str, Array]
CUT = 2.0**-23  # times in: singular to float32, whatever the precision that is computed in


class Grams(NamedTuple):
    """`G`, `K`, and `kappa = sum_t w_t tr(D_t S_t D_t^T)`."""

    gram: Float[Array, "n n"]
    cross: Float[Array, "m n"]
    kappa: Float[Array, ""]


class Rows(NamedTuple):
    """One expert: `S_t = rows^T rows`, `left = D_t rows^T`, and the relative error of the estimate."""

    rows: Float[Array, "r n"]
    left: Float[Array, "m r"]
    weight: Float[Array, ""]
    error: Float[Array, ""]


class Sums(NamedTuple):
    """The sums over the experts.

    Attributes:
        total: `sum_t w_t D_t`.
        weight: `sum_t w_t`.
        energy: `sum_t w_t ||D_t||^2`.
        samples: the number of rows that the covariances are estimated from; `out` for each one that is not zero.
        experts: the sums `Grams`, of a size that does not depend on the number of experts; or each expert's `Rows`.
    """

    total: Float[Array, "m n"]
    weight: Float[Array, ""]
    energy: Float[Array, ""]
    samples: Float[Array, ""]
    experts: Grams | tuple[Rows, ...]


def init(base: Float[Numbers, "out in"], *, rows: bool = False) -> Sums:
    """The sums over no experts.

    Args:
        base: any array of the weight's shape and dtype, such as the base's weight.
        rows: keep each estimate's rows instead of Grams; cheaper while they are fewer than the inputs.

    Example:
        >>> sums = least_squares.init(jnp.zeros((3, 4)))
        >>> sums.experts.gram.shape, sums.experts.cross.shape
        ((4, 4), (3, 4))
    """
    total = jnp.zeros_like(jnp.asarray(base))
    zero = jnp.zeros((), total.dtype)
    return Sums(total, zero, zero, zero, () if rows else _no_grams(total))


def _no_grams(like: Float[Array, "m n"]) -> Grams:
    n = like.shape[1]
    return Grams(jnp.zeros((n, n), like.dtype), jnp.zeros_like(like), jnp.zeros((), like.dtype))


def add(
    sums: Sums,
    delta: Float[Numbers, "out in"],
    covariance: Estimate | Float[Numbers, "n k"],
    weight: float | Float[Numbers, ""] = 1.0,
) -> Sums:
    """The sums with one expert more.

    Args:
        delta: `D_t`, the expert's weight less the base's.
        covariance: `S_t`, an estimate such as `covariance.of_delta(delta)`, or a matrix `(in, in)`, symmetric and
            positive semi-definite. Its scale against the other experts' matters; see `covariance.unit_trace`.
        weight: `w_t`; a negative one forgets an expert.

    Raises:
        CfmergeError: a shape that does not fit, or, among rows, a matrix or a negative weight.

    Example:
        >>> base, delta = jnp.zeros((3, 4)), jnp.arange(12.0).reshape(3, 4)
        >>> sums = least_squares.add(least_squares.init(base), delta, covariance.of_delta(delta), weight=2.0)
        >>> sums = least_squares.add(sums, -delta, jnp.eye(4))          # a covariance of one's own
        >>> float(sums.weight)
        3.0
    """
    m, n = sums.total.shape
    estimate = covariance if isinstance(covariance, Estimate) else None
    shape = covariance.rows.shape if isinstance(covariance, Estimate) else jnp.shape(covariance)
    if jnp.shape(delta) != (m, n):
        raise CfmergeError(f"least_squares.add: the delta has shape {jnp.shape(delta)}, the sums are of {(m, n)}")
    if len(shape) != 2 or shape[1] != n or (estimate is None and shape[0] != n):
        wanted = f"({n}, {n}), as (in, in)" if estimate is None else f"(any, {n}), as (rows, in)"
        raise CfmergeError(f"least_squares.add: the covariance has shape {shape}, expected {wanted}")
    delta, w = (jnp.asarray(given, sums.total.dtype) for given in (delta, weight))
    experts: Grams | tuple[Rows, ...]
    if isinstance(sums.experts, Grams):
        experts, size = _with_gram(sums.experts, delta, covariance, w)
    else:
        experts, size = _with_rows(sums.experts, delta, estimate, weight)
    samples = sums.samples + jnp.where(size > 0, jnp.sign(w), 0) * m
    return Sums(sums.total + w * delta, sums.weight + w, sums.energy + w * energy(delta), samples, experts)


def _with_gram(grams: Grams, delta: Array, covariance: Estimate | Numbers, w: Array) -> tuple[Grams, Array]:
    """The Grams with one expert more, and the trace of its covariance."""
    if isinstance(covariance, Estimate):
        rows, left = covariance.rows, covariance.left
        gram = linalg.gram(rows)
        cross = linalg.times_gram(delta, rows, gram) if left is None else linalg.matmul(left, rows)
    else:
        gram = jnp.asarray(covariance, delta.dtype)
        cross = linalg.matmul(delta, gram)
    kappa = jnp.sum(cross * delta)
    return Grams(grams.gram + w * gram, grams.cross + w * cross, grams.kappa + w * kappa), jnp.trace(gram)


def _with_rows(
    experts: tuple[Rows, ...], delta: Array, estimate: Estimate | None, weight: float | Numbers
) -> tuple[tuple[Rows, ...], Array]:
    """The experts' rows with one more, and the trace of its covariance."""
    if estimate is None:
        raise CfmergeError("least_squares.add: these sums keep rows, which a matrix has none of; use init(base)")
    if not isinstance(weight, jax.core.Tracer) and float(weight) < 0:
        raise CfmergeError("least_squares.add: these sums keep rows, which cannot be forgotten; use init(base)")
    left = linalg.matmul(delta, estimate.rows.T) if estimate.left is None else estimate.left
    w, error = jnp.asarray(weight, delta.dtype), jnp.asarray(estimate.error, delta.dtype)
    return (*experts, Rows(estimate.rows, left, w, error)), energy(estimate.rows)


def full(sums: Sums) -> Sums:
    """The same sums with Grams in place of rows.

    Example:
        >>> delta = jnp.ones((2, 5))
        >>> sums = least_squares.add(least_squares.init(delta, rows=True), delta, covariance.of_delta(delta))
        >>> least_squares.full(sums).experts.gram.shape
        (5, 5)
    """
    if isinstance(sums.experts, Grams):
        return sums
    grams = _no_grams(sums.total)
    for rows, left, w, _ in sums.experts:
        gram, cross, kappa = linalg.gram(rows), linalg.matmul(left, rows), jnp.sum(left * left)
        grams = Grams(grams.gram + w * gram, grams.cross + w * cross, grams.kappa + w * kappa)
    return sums._replace(experts=grams)


def join(a: Sums, b: Sums) -> Sums:
    """The sums over the experts of both.

    Example:
        >>> delta = jnp.ones((2, 3))
        >>> one = least_squares.add(least_squares.init(delta), delta, jnp.eye(3))
        >>> float(least_squares.join(one, one).weight)
        2.0
    """
    if not isinstance(a.experts, Grams) and not isinstance(b.experts, Grams):
        scalars = (a.weight + b.weight, a.energy + b.energy, a.samples + b.samples)
        return Sums(a.total + b.total, *scalars, (*a.experts, *b.experts))
    return jax.tree.map(jnp.add, full(a), full(b))


def forget(sums: Sums, others: Sums) -> Sums:
    """The sums as if the experts of `others` had never been added, up to rounding; with Grams.

    Example:
        >>> delta = jnp.ones((2, 3))
        >>> one = least_squares.add(least_squares.init(delta), delta, jnp.eye(3))
        >>> float(least_squares.forget(least_squares.join(one, one), one).weight)
        1.0
    """
    return jax.tree.map(jnp.subtract, full(sums), full(others))


def stacked(experts: tuple[Rows, ...]) -> tuple[Float[Array, "R n"], Float[Array, "m R"]]:
    """`F` and `Z`, with `G = F^T F` and `K = Z F`."""
    roots = [jnp.sqrt(jnp.maximum(expert.weight, 0)) for expert in experts]
    f = jnp.concatenate([root * expert.rows for root, expert in zip(roots, experts, strict=True)])
    return f, jnp.concatenate([root * expert.left for root, expert in zip(roots, experts, strict=True)], axis=1)


def anchor_of(sums: Sums, anchor: Anchor | Float[Numbers, "out in"]) -> Float[Array, "out in"] | None:
    """The anchor `X_a`: None for zero, the mean or the sum of the deltas, or the array itself."""
    if not isinstance(anchor, str):
        return jnp.asarray(anchor, sums.total.dtype)
    if anchor == "mean":
        return linalg.weighted_mean(sums.total, sums.weight)
    return sums.total if anchor == "sum" else None


def solve(
    sums: Sums,
    ridge: float | Float[Numbers, ""] | None = None,
    anchor: Anchor | Float[Numbers, "out in"] = "zero",
    rtol: float | Float[Numbers, ""] | None = None,
) -> tuple[Float[Array, "out in"], Report]:
    """The merged delta `X`, and a report on the solve.

    Args:
        ridge: relative to the mean eigenvalue of `G`, which is `trace(G)/in`; none: the pseudo-inverse. 0 is for
            covariances that leave no direction out.
        anchor: what the ridge draws to: "zero", the "mean" or the "sum" of the deltas, or a merged delta. In
            directions where the covariances are zero the merged delta is the anchor.
        rtol: eigenvalues up to this share of the largest count as zero in the pseudo-inverse; none: `in` times
            float32's epsilon.

    Returns:
        The merged delta `(out, in)`, and `{name: scalar}`: `ridge_ratio`, the smallest eigenvalue that was divided by
        over the largest; `no_cholesky`, whether the Cholesky factorisation failed, so that eigenvalues with a floor
        took its place; `growth`, how long the merged delta is, in units of the sum of as many unrelated deltas: more
        than 2 says that the covariances are small where the deltas differ, and asks for a larger ridge.

    Raises:
        CfmergeError: no experts, or a ridge that is negative.

    Example:
        >>> delta = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
        >>> sums = least_squares.add(least_squares.init(delta), delta, jnp.eye(3))
        >>> merged, report = least_squares.solve(sums, ridge=1.0)          # halfway to zero
        >>> merged[0].round(5).tolist(), bool(report["no_cholesky"])
        ([0.5, 1.0, 0.0], False)
    """
    if ridge is not None and not isinstance(ridge, jax.core.Tracer) and not float(ridge) >= 0:
        raise CfmergeError(f"least_squares.solve: ridge must not be negative, got {ridge}")
    if sums.experts == ():
        raise CfmergeError("least_squares.solve: the sums hold no experts; add one first")
    target, n = anchor_of(sums, anchor), sums.total.shape[1]
    if isinstance(sums.experts, Grams):
        gram, cross, _ = sums.experts
        sides, f = gram, None
    else:
        f, cross = stacked(sums.experts)
        gram, sides = linalg.matmul(f, f.T), f.T

    rho = _absolute(0.0 if ridge is None else ridge, gram, n)
    whole = f is None and ridge is not None  # (K + rho X_a)(G + rho I)^{-1}: no product X_a G
    if target is not None:
        cross = cross + rho * target if whole else cross - linalg.matmul(target, sides)
    if ridge is None:
        inverse, _, least = linalg.pseudo_inverse(gram, jnp.asarray(n * CUT if rtol is None else rtol, gram.dtype))
        merged, told = linalg.matmul(cross, inverse), {"ridge_ratio": least, "no_cholesky": jnp.zeros((), bool)}
    else:
        merged, told = _by_cholesky(cross, gram, rho)
    merged = merged if f is None else linalg.matmul(merged, f)
    merged = merged if target is None or whole else target + merged
    return merged, told | {"growth": growth(merged, sums.energy, sums.weight, sums.samples / sums.total.shape[0])}


def _absolute(ridge: float | Numbers, gram: Array, inputs: int) -> Float[Array, ""]:
    """`rho = ridge trace(gram)/inputs`; 1 where the Gram is zero, so that the anchor is what is left."""
    trace = jnp.trace(gram)
    return jnp.where(trace > 0, jnp.asarray(ridge, gram.dtype) * trace / inputs, 1)


def _by_cholesky(right: Array, gram: Array, rho: Array) -> tuple[Array, Report]:
    """`right (gram + rho I)^{-1}`."""
    system = gram + rho * jnp.eye(len(gram), dtype=gram.dtype)
    solution, held = linalg.solve_right(right, system)
    largest = jnp.maximum(linalg.largest_eigenvalue(system), jnp.finfo(gram.dtype).tiny)
    return solution, {"ridge_ratio": rho / largest, "no_cholesky": ~held}


GROWN = 2.0  # `growth` above which a merge is not trusted


def growth(merged: Array, energy: Array, weight: Array, experts: Array) -> Float[Array, ""]:
    """`||X|| / sqrt(T mean ||D_t||^2)`: at most about 1 of a merge that keeps every expert's part once."""
    unrelated = linalg.root(experts * linalg.weighted_mean(energy, weight))
    return lax.stop_gradient(linalg.ratio(linalg.norm(merged).reshape(()), unrelated))
