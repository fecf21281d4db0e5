r"""Optimal transport between two histograms: exact, or smoothed by an entropy (Sinkhorn).

    T = argmin <T, C>   over T >= 0 with T 1 = alpha, T^T 1 = beta                                    exact
    T = argmin <T, C> + reg sum T (log T - 1)   over the same                                         Sinkhorn

Exact transport of uniform histograms is an assignment: with n elements here and m there, each is repeated until both
have lcm(n, m). Other histograms, and widths whose common multiple is large, are a linear program (HiGHS, by scipy):
two seconds for 512 x 512.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.align.assignment import assign
from cfmerge.errors import CfmergeError

COSTS = ("euclidean", "squared", "cosine")
LARGEST = 4096  # common multiple of two widths up to which uniform transport is an assignment
ROUNDS = 20_000  # of Sinkhorn
CLOSE = 1e-4  # what Sinkhorn's row sums may be off by, relative to the mean


def costs(kind: str, inner: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The costs `(n, m)` of two sets of rows, out of their inner products and squared norms.

    >>> costs("euclidean", np.array([[3.0]]), np.array([9.0]), np.array([1.0]))
    array([[2.]])
    """
    if kind == "cosine":
        lengths = np.sqrt(np.outer(own, other))
        return 1 - np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
    squared = np.maximum(own[:, None] + other - 2 * inner, 0)
    return squared if kind == "squared" else np.sqrt(squared)


def transport(cost: np.ndarray, alpha: np.ndarray, beta: np.ndarray, reg: float | None = None) -> np.ndarray:
    """The transport plan `(n, m)` of least cost, whose rows sum to `alpha` and whose columns sum to `beta`.

        >>> transport(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.full(4, 0.25), np.full(2, 0.5))
        array([[0.25, 0.  ],
               [0.25, 0.  ],
               [0.  , 0.25],
               [0.  , 0.25]])

    Args:
        cost: `(n, m)`.
        alpha: the histogram of the rows, which sums to 1.
        beta: the histogram of the columns, which sums to 1.
        reg: strength of the entropy, in the unit of the cost; None: exact.

    Raises:
        CfmergeError: a cost that is not finite; Sinkhorn does not converge.
    """
    if not np.isfinite(cost).all():
        raise CfmergeError("transport: a cost is NaN or infinite")
    if reg is not None:
        with jax.enable_x64(True):
            plan, off = _sinkhorn(*(jnp.asarray(x, jnp.float64) for x in (cost, alpha, beta, reg)))
        if not float(off) <= CLOSE:
            raise CfmergeError(
                f"transport: Sinkhorn with reg {reg:g} has not converged after {ROUNDS} rounds, rows are off by "
                f"{float(off):.1g}; costs have the mean {cost.mean():.3g}: take a larger reg, or None, which is exact"
            )
        return np.asarray(plan)
    n, m = cost.shape
    common = math.lcm(n, m)
    if common <= LARGEST and all(np.ptp(histogram) == 0 for histogram in (alpha, beta)):
        own, other = common // n, common // m
        found = assign(-np.repeat(np.repeat(cost, own, axis=0), other, axis=1))
        plan = np.zeros((n, m))
        np.add.at(plan, (np.arange(common) // own, found // other), 1 / common)
        return plan
    return _program(cost, alpha, beta)


def _program(cost: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """The exact plan, by a linear program."""
    from scipy import sparse  # here, as in `assignment`: importing them takes a quarter of a second
    from scipy.optimize import linprog

    n, m = cost.shape
    rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
    constraints = sparse.vstack([rows, columns]).tocsr()[:-1]  # the last follows from the others
    scale = 1 / max(abs(cost).max(), 1e-300)  # so that the solver's tolerances are relative
    found = linprog(cost.ravel() * scale, A_eq=constraints, b_eq=np.concatenate([alpha, beta])[:-1], method="highs")
    if found.x is None:
        raise CfmergeError(f"transport: the linear program was not solved: {found.message}")
    return np.maximum(found.x, 0).reshape(n, m)


@functools.partial(jax.jit)
def _sinkhorn(cost: Any, alpha: Any, beta: Any, reg: Any) -> tuple[jax.Array, jax.Array]:
    """The plan `exp((f_i + g_j - C_ij) / reg)`, and how far its rows are off."""
    logs = jnp.log(alpha), jnp.log(beta)

    def rows(g: jax.Array) -> jax.Array:
        return reg * (logs[0] - jax.nn.logsumexp((g - cost) / reg, axis=1))

    def columns(f: jax.Array) -> jax.Array:
        return reg * (logs[1] - jax.nn.logsumexp((f[:, None] - cost) / reg, axis=0))

    def plan(f: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.exp((f[:, None] + g - cost) / reg)

    def off(f: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(plan(f, g).sum(1) - alpha)) * len(alpha)

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        return (state[2] > CLOSE) & (state[3] < ROUNDS)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        f = rows(state[1])
        g = columns(f)
        return f, g, off(f, g), state[3] + 1

    f, g, error, _ = jax.lax.while_loop(goes_on, step, step((None, jnp.zeros_like(beta), jnp.inf, 0)))
    return plan(f, g), error
