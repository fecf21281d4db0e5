"""Estimates of a layer's input covariance `Sigma_t = E[x x^T]`: from one expert's delta alone, or from activations.

A delta is read as a sum of per-sample gradients `e x^T`, its rows as samples of `x`; so `D^T D` is, up to a
scale, an estimate of `Sigma` (ACE-Merging, arXiv 2603.02945, section 3). Only the input side is used.
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
    """
    return delta - jnp.mean(delta, axis=0, keepdims=True)


def energy(delta: Float[Array, "..."]) -> Float[Array, ""]:
    """`||D||^2`, the squared Frobenius norm."""
    return jnp.sum(delta * delta)


class Estimate(NamedTuple):
    """`S = rows^T rows`, an estimate of `Sigma` from the delta `D`.

    Attributes:
        rows: any matrix whose Gram is `S`.
        left: `D rows^T`, so that `D S = left rows`, where it is at hand.
        error: relative error of what was left out of the delta.
    """

    rows: Float[Array, "r in"]
    left: Float[Array, "out r"] | None = None
    error: Float[Array, ""] | float = 0.0


def of_delta(delta: Float[Array, "out in"]) -> Estimate:
    """`S = D^T D` (ACTMat, WUDI)."""
    return Estimate(delta)


def of_rank(delta: Float[Array, "out in"], rank: int) -> Estimate:
    """`S = D^T D` of a delta of rank at most `rank`, from that many rows."""
    if rank >= min(delta.shape):
        return Estimate(delta)
    left, right, error = linalg.low_rank_factors(delta, rank)
    return Estimate(right, linalg.matmul(left, linalg.matmul(right, right.T)), error)


def of_largest(delta: Float[Array, "out in"], share: float | Array | np.ndarray) -> Estimate:
    """`S = trim(D)^T trim(D)`, where `round(share * entries)` entries, the largest, are kept (TACT)."""
    magnitude = jnp.abs(delta)
    size = delta.size
    count = jnp.round(share * size) if isinstance(share, jax.core.Tracer) else round(float(share) * size)
    threshold = linalg.kth_largest(magnitude, jnp.clip(count, 1, size))
    return Estimate(jnp.where((magnitude >= threshold) & (jnp.asarray(count) > 0), delta, 0))


def of_power(delta: Float[Array, "out in"], exponent: float | Array | np.ndarray) -> Estimate:
    """`S = (D^T D)^p` on the row space, from the delta's singular values: they are never squared."""
    u, s, vt = linalg.thin_svd(delta)
    keep = s > max(delta.shape) * jnp.finfo(s.dtype).eps * s[0]
    root = jnp.where(keep, jnp.where(keep, s, 1) ** jnp.asarray(exponent, s.dtype), 0)
    return Estimate(root[:, None] * vt, u * (s * root))


def from_activations(activations: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
    """`X^T X / tokens`, of the inputs that a layer was seen to have."""
    return linalg.gram(activations) / max(activations.shape[0], 1)


def boosted_diagonal(covariance: Float[Array, "in in"], a: float | Array) -> Float[Array, "in in"]:
    """`a Sigma + (1 - a) diag(Sigma)`: the off-diagonal entries times `a` (RegMean, arXiv 2212.09849)."""
    return jnp.where(jnp.eye(covariance.shape[0], dtype=bool), covariance, a * covariance)
