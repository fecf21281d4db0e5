"""ACE from the stacked rows `F` of the centred deltas, without an `n x n` matrix.

With `sum_t a_t C_t = F^T F` and every `J D_t` in the row space of `F`, `B = Z F`; then, by the push-through identity,
`B (F^T F + lam I)^{-1} = Z (F F^T + lam I)^{-1} F`, and the rank-one prior is `(F 1)^T ... F` in the same way.
"""

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge import linalg
from cfmerge.core.checks import check
from cfmerge.core.numbers import Number
from cfmerge.covariance import centred
from cfmerge.methods._ace_sums import (
    TINY,
    GramSums,
    Rows,
    Scalars,
    Solved,
    add_gram,
    gram_zeros,
    positive,
    ridges,
)


def factor(delta: Array, rank: int | None, weight: Array, trace: Array) -> Rows:
    if rank is None or rank >= min(delta.shape):
        return Rows(None, delta, weight, trace, jnp.zeros((), delta.dtype))
    left, right, error = linalg.low_rank_factors(delta, rank)
    return Rows(left, right, weight, trace, error)


def _delta(rows: Rows) -> Array:
    return rows.right if rows.left is None else linalg.matmul(rows.left, rows.right)


def gram_of_rows(experts: tuple[Rows, ...], m: int, n: int) -> GramSums:
    sums = gram_zeros(m, n, experts[0].right.dtype)
    for expert in experts:
        delta = _delta(expert)
        sums = add_gram(sums, delta, centred(delta), expert.trace, expert.weight)
    return sums


def solve_rows(
    scalars: Scalars,
    experts: tuple[Rows, ...],
    heterogeneous: Array,
    s: Array,
    eps: Number | None,
    eps_rel: Number,
) -> Solved:
    n = experts[0].right.shape[1]
    absolute, relative = ridges(scalars, heterogeneous, eps, eps_rel, n)
    lam = positive(absolute * scalars.weight + relative * scalars.inverse_trace)

    # J D_t = P_t F_t with orthonormal (or vanishing) columns in P_t; F_t scaled so that sum a_t C_t = F^T F
    z_blocks, f_blocks = [], []
    for expert in experts:
        p, f = _centred_factors(expert)
        a = jnp.where(heterogeneous, 1 / (expert.trace + TINY), 1)
        e = absolute + relative / (expert.trace + TINY)
        middle = a * linalg.matmul(f, f.T) + e * jnp.eye(f.shape[0], dtype=f.dtype)
        z = middle if p is None else linalg.matmul(p, middle)
        z_blocks.append(jnp.sqrt(expert.weight / a) * z)
        f_blocks.append(jnp.sqrt(expert.weight * a) * f)
    z, f = jnp.concatenate(z_blocks, axis=1), jnp.concatenate(f_blocks)
    check(
        f.shape[0] < n,
        f"ace: the low-rank form has {f.shape[0]} rows for {n} inputs, where it is neither cheaper nor accurate;"
        " use form='auto', or a smaller rank",
    )

    system = linalg.matmul(f, f.T) + lam * jnp.eye(f.shape[0], dtype=f.dtype)
    ones = jnp.sum(f, axis=1)
    solution, held = linalg.solve_right(jnp.concatenate([z, ones[None]]), system)
    core, y = solution[:-1], solution[-1]
    denominator = 1 + (s / n) * jnp.dot(ones, y, precision=linalg.HIGHEST)
    core = core - jnp.outer(linalg.matmul(z, y), y) * (s / n) / denominator
    merged = linalg.matmul(core, f)

    def residual() -> Array:  # a block of F is sqrt(w_t a_t) F_t, so D_t F^T F is the cross term's share
        deltas = [_delta(expert) for expert in experts]
        total, cross = jnp.zeros_like(merged), jnp.zeros_like(merged)
        for expert, delta, block in zip(experts, deltas, f_blocks, strict=True):
            total = total + expert.weight * delta
            cross = cross + linalg.matmul(linalg.matmul(delta, block.T), block)
        return cross - linalg.weighted_mean(linalg.matmul(linalg.matmul(total, f.T), f) + lam * total, scalars.weight)

    row_space = jnp.concatenate([expert.right for expert in experts])
    error = jnp.max(jnp.stack([expert.error for expert in experts]))
    return Solved(merged, residual, lam, linalg.largest_eigenvalue(system), held, row_space, error)


def _centred_factors(expert: Rows) -> tuple[Array | None, Array]:
    """`J D = P F`: with `u = left^T 1 / sqrt(m)`, `left^T J left = I - u u^T = (I - c u u^T)^2`."""
    if expert.left is None:
        return None, centred(expert.right)
    left = expert.left
    u = jnp.sum(left, axis=0) / jnp.sqrt(jnp.asarray(left.shape[0], left.dtype))
    length = jnp.minimum(jnp.sum(u * u), 1)
    root = jnp.sqrt(jnp.maximum(1 - length, 0))
    c = 1 / (1 + root)  # (1 - sqrt(1 - |u|^2)) / |u|^2
    usable = root > jnp.sqrt(jnp.finfo(left.dtype).eps)
    inverse = jnp.where(usable, c / jnp.where(usable, root, 1), 0)
    p = centred(left)
    p = p + inverse * jnp.outer(linalg.matmul(p, u), u)
    return p, expert.right - c * jnp.outer(u, linalg.matmul(u, expert.right))
