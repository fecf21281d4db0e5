"""Problems for the least-squares family, and what its formulas are in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np


def problem(seed=0, m=6, n=9, experts=3, scale=0.1):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((m, n)) for _ in range(experts)]


def gather(deltas, method, weights=None):
    """The statistic, in the deltas' precision."""
    statistic = method.init(jnp.zeros_like(jnp.asarray(deltas[0])))
    for delta, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True):
        statistic = method.see(statistic, jnp.asarray(delta), weight)
    return statistic


def solve(deltas, method, weights=None):
    """The merged delta in float64."""
    with jax.enable_x64(True):
        return np.asarray(method.solve(gather(deltas, method, weights))[0])


def told(deltas, method, weights=None):
    with jax.enable_x64(True):
        report = method.solve(gather(deltas, method, weights))[1]
        return {name: float(value) for name, value in report.items()}


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-300))


def sums(deltas, estimates, weights=None):
    weights = weights or [1.0] * len(deltas)
    gram = sum(w * s for w, s in zip(weights, estimates, strict=True))
    cross = sum(w * d @ s for w, d, s in zip(weights, deltas, estimates, strict=True))
    return gram, cross, sum(w * d for w, d in zip(weights, deltas, strict=True))


def by_energy(deltas):
    return [d.T @ d / np.sum(d**2) for d in deltas]


def ridged(gram, cross, ridge, anchor):
    rho = ridge * np.trace(gram) / len(gram)
    return anchor + (cross - anchor @ gram) @ np.linalg.inv(gram + rho * np.eye(len(gram)))
