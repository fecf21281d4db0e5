"""Estimates of a layer's input covariance `Sigma_t = E[x x^T]`, here from one expert's delta alone.

A delta is read as a sum of per-sample gradients `e x^T`, its rows as samples of `x`; so `D^T D` is, up to a
scale, an estimate of `Sigma` (ACE-Merging, arXiv 2603.02945, section 3). Only the input side is used.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def centred(delta: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """`J D` with `J = I - 1 1^T / out`: each column less its mean over the outputs.

    The estimate of ACE-Merging is the Gram of these rows, `C = (J D)^T (J D)`, of trace `||J D||^2`.
    """
    return delta - jnp.mean(delta, axis=0, keepdims=True)


def energy(delta: Float[Array, "out in"]) -> Float[Array, ""]:
    """`||D||^2`, the squared Frobenius norm."""
    return jnp.sum(delta * delta)
