"""What the tests of spectral methods share: compiled merges, and the equations' parts in plain NumPy."""

import functools

import jax
import numpy as np

RNG = np.random.default_rng(7)
M, N = 9, 12
DELTAS = [RNG.standard_normal((M, N)) for _ in range(3)]


@functools.lru_cache
def solver(method):
    """`(base, deltas, weights) -> (merged delta, report)`, compiled."""

    @jax.jit
    def solve(base, deltas, weights):
        statistic = method.init(base)
        for delta, weight in zip(deltas, weights, strict=True):
            statistic = method.see(statistic, delta, weight)
        return method.solve(statistic)

    return solve


def solved(method, deltas, base=None, weights=None):
    with jax.enable_x64(True):
        base = np.zeros(deltas[0].shape) if base is None else np.asarray(base, np.float64)
        return solver(method)(
            base, [np.asarray(d, np.float64) for d in deltas], list(map(float, weights or [1.0] * len(deltas)))
        )


def merged(method, deltas, base=None, weights=None):
    """The merged delta."""
    return np.asarray(solved(method, deltas, base, weights)[0])


def report(method, deltas, base=None):
    return {name: float(value) for name, value in solved(method, deltas, base)[1].items()}


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-300))


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix, cutoff=1e-10):
    u, s, vt = svd(matrix)
    keep = s > cutoff * s[0]
    return (u * keep) @ vt


def top(matrix, k):
    u, s, vt = svd(matrix)
    return u[:, :k], s[:k], vt[:k]


def of_rank(rank, seed, shape=(M, N)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
