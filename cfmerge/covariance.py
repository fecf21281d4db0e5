"""Estimates of a layer's input covariance `Sigma_t = E[x x^T]`: from one expert's delta alone, or from activations.

A delta is read as a sum of per-sample gradients `e x^T`, its rows as samples of `x`; so `D^T D` is, up to a
scale, an estimate of `Sigma` (ACE-Merging, arXiv 2603.02945, section 3). Only the input side is used. All functions are
pure, and work under `jit`, `vmap` and `grad`; `cfmerge.least_squares` merges a layer with what they return.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge import linalg


def centred(delta: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """`J D` with `J = I - 1 1^T / out`: each column less its mean over the outputs.

    The estimate of ACE-Merging is the Gram of these rows, `C = (J D)^T (J D)`, of trace `||J D||^2`.

    Example:
        >>> covariance.centred(jnp.array([[1.0, 2.0], [3.0, 6.0]])).tolist()
        [[-1.0, -2.0], [1.0, 2.0]]
    """
    return delta - jnp.mean(delta, axis=0, keepdims=True)


def energy(delta: Float[Array, "..."]) -> Float[Array, ""]:
    """`||D||^2`, the squared Frobenius norm.

    Example:
        >>> float(covariance.energy(jnp.array([[1.0, 2.0], [2.0, 0.0]])))
        9.0
    """
    return jnp.sum(delta * delta)


class Estimate(NamedTuple):
    """`S = rows^T rows`, an estimate of `Sigma` from the delta `D`.

    Attributes:
        rows: any matrix whose Gram is `S`.
        left: `D rows^T`, so that `D S = left rows`, where it is at hand.
        error: relative error of what was left out of the delta.

    Example:
        >>> own = covariance.Estimate(jnp.array([[1.0, 0.0, 2.0]]))      # from rows of one's own
        >>> covariance.dense(own).shape
        (3, 3)
    """

    rows: Float[Array, "r in"]
    left: Float[Array, "out r"] | None = None
    error: Float[Array, ""] | float = 0.0


def of_delta(delta: Float[Array, "out in"]) -> Estimate:
    """`S = D^T D` (ACTMat, arXiv 2604.01329; WUDI, arXiv 2503.08099).

    Example:
        >>> covariance.dense(covariance.of_delta(jnp.array([[1.0, 2.0]]))).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    return Estimate(delta)


def of_centred(delta: Float[Array, "out in"]) -> Estimate:
    """`S = (J D)^T (J D)`, the Gram of the `centred` rows (ACE-Merging, arXiv 2603.02945, equation of `C_t`).

    Example:
        >>> covariance.dense(covariance.of_centred(jnp.array([[1.0, 2.0], [3.0, 6.0]]))).tolist()
        [[2.0, 4.0], [4.0, 8.0]]
    """
    return Estimate(centred(delta))


def of_rank(delta: Float[Array, "out in"], rank: int) -> Estimate:
    """`S = D^T D` of a delta of rank at most `rank`, from that many rows; for merged LoRA adapters.

    Example:
        >>> delta = jnp.outer(jnp.arange(4.0), jnp.arange(5.0))
        >>> covariance.of_rank(delta, 1).rows.shape
        (1, 5)
    """
    if rank >= min(delta.shape):
        return Estimate(delta)
    left, right, error = linalg.low_rank_factors(delta, rank)
    return Estimate(right, linalg.matmul(left, linalg.matmul(right, right.T)), error)


def of_largest(delta: Float[Array, "out in"], share: float | Array | np.ndarray) -> Estimate:
    """`S = trim(D)^T trim(D)`, where `round(share * entries)` entries, the largest, are kept (TACT, arXiv 2604.01329).

    Entries that tie with the least of them are kept too.

    Example:
        >>> covariance.of_largest(jnp.array([[1.0, -4.0], [3.0, 2.0]]), 0.5).rows.tolist()
        [[0.0, -4.0], [3.0, 0.0]]
    """
    magnitude = jnp.abs(delta)
    size = delta.size
    count = jnp.round(share * size) if isinstance(share, jax.core.Tracer) else round(float(share) * size)
    threshold = linalg.kth_largest(magnitude, jnp.clip(count, 1, size))
    return Estimate(jnp.where((magnitude >= threshold) & (jnp.asarray(count) > 0), delta, 0))


def of_power(delta: Float[Array, "out in"], exponent: float | Array | np.ndarray) -> Estimate:
    """`S = (D^T D)^p` on the row space, from the delta's singular values: they are never squared.

    Example:
        >>> covariance.dense(covariance.of_power(jnp.diag(jnp.array([4.0, 9.0])), 0.5)).round(5).tolist()
        [[4.0, 0.0], [0.0, 9.0]]
    """
    u, s, vt = linalg.thin_svd(delta)
    keep = s > max(delta.shape) * jnp.finfo(s.dtype).eps * s[0]
    root = jnp.where(keep, jnp.where(keep, s, 1) ** jnp.asarray(exponent, s.dtype), 0)
    return Estimate(root[:, None] * vt, u * (s * root))


def scaled(estimate: Estimate, factor: float | Float[Array, ""]) -> Estimate:
    """`factor S`; the factor is not negative.

    Example:
        >>> covariance.scaled(covariance.of_delta(jnp.array([[3.0, 4.0]])), 4.0).rows.tolist()
        [[6.0, 8.0]]
    """
    size = linalg.root(jnp.asarray(factor, estimate.rows.dtype))
    return Estimate(size * estimate.rows, None if estimate.left is None else size * estimate.left, estimate.error)


def unit_trace(estimate: Estimate) -> Estimate:
    """`S / trace(S)`, and zero where `S` is: every expert counts alike, however far it moved (WUDI, ACE's gate).

    Example:
        >>> found = covariance.unit_trace(covariance.of_delta(jnp.array([[3.0, 4.0], [0.0, 5.0]])))
        >>> float(jnp.trace(covariance.dense(found)).round(5))
        1.0
    """
    return scaled(estimate, linalg.ratio(1.0, energy(estimate.rows)))


def dense(estimate: Estimate) -> Float[Array, "in in"]:
    """`S` itself.

    Example:
        >>> covariance.dense(covariance.of_delta(jnp.eye(2))).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return linalg.gram(estimate.rows)


def from_activations(activations: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
    """`X^T X / tokens`, of the inputs that a layer was seen to have.

    Example:
        >>> covariance.from_activations(jnp.array([[1.0, 2.0], [1.0, -2.0]])).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    return linalg.gram(activations) / max(activations.shape[0], 1)


def boosted_diagonal(covariance: Float[Array, "in in"], a: float | Array) -> Float[Array, "in in"]:
    """`a Sigma + (1 - a) diag(Sigma)`: the off-diagonal entries times `a` (RegMean, arXiv 2212.09849).

    Example:
        >>> covariance.boosted_diagonal(jnp.array([[2.0, 1.0], [1.0, 2.0]]), 0.5).tolist()
        [[2.0, 0.5], [0.5, 2.0]]
    """
    return jnp.where(jnp.eye(covariance.shape[0], dtype=bool), covariance, a * covariance)
