"""The numbers of one tensor, from the base `W` and the deltas `D_t` of all experts at once.

Sums over entries, which are added over the pieces of a tensor (`entry_sums`):

    ||W||^2,  <W, D_t>,  <D_s, D_t>,  entries that s and t both changed,  those of them with opposite signs

And of a canonical matrix `(m, n)`, with `p = min(m, n)` (`matrix_numbers`):

    A_t = D_t^T D_t / ||D_t||^2,  or D_t D_t^T / ||D_t||^2 where m < n      p x p
    s^2 = eigenvalues of A_t      stable rank 1 / s_1^2, effective rank exp(-sum s^2 ln s^2), the spectrum
    <A_s, A_t> / (||A_s|| ||A_t||)           overlap of the spaces on the shorter side
    ||X_s^T X_t||^2 / (||A_s|| ||A_t||)      overlap on the longer side, X_t (long, short) = D_t or D_t^T: no Gram of it
    W = U S V^T:  e_i = ||D_t v_i||^2 / ||D_t||^2      by the p x p Gram of W alone

The leading directions of the base are the fewest that hold half of `||W||^2`; the null ones have `S_i^2` below `NULL`
times the largest (and all beyond p); the lesser are between.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.part import Seen
from cfmerge.diagnosis.choice import growth
from cfmerge.diagnosis.ranks import rank_of, rounding

HALF = 0.5  # of the base's energy, that its leading directions hold
NULL = 3e-5  # of the largest squared singular value: what a Gram in float32 resolves up to 4096 x 4096
SPECTRUM = 32  # singular values that are kept

Numbers = dict[str, Array]


def entry_sums(seen: Seen) -> Numbers:
    """The sums over entries of a tensor, or of a piece of one."""
    count = len(seen.deltas)
    base, deltas = seen.base.reshape(-1), seen.deltas.reshape(count, -1)
    signs = jnp.sign(deltas)
    changed = jnp.abs(signs)
    both = linalg.matmul(changed, changed.T)
    return {
        "base": jnp.sum(base * base),
        "inner": linalg.matmul(deltas, base),
        "gram": linalg.matmul(deltas, deltas.T),
        "both": both,
        "opposite": (both - linalg.matmul(signs, signs.T)) / 2,
    }


def matrix_numbers(seen: Seen, beside: int = 0) -> Numbers:
    """The numbers of a canonical matrix, and its sums over entries.

    Args:
        beside: so many of the last models are not among those that would be merged: `growth` is without them.
    """
    merged = seen._replace(deltas=seen.deltas[: len(seen.deltas) - beside])
    merged = merged._replace(weights=seen.weights[: len(merged.deltas)])
    norms = linalg.norm(seen.deltas, (1, 2))
    m, n = seen.base.shape
    units = linalg.ratio(seen.deltas, norms)
    long = units if m >= n else units.transpose(0, 2, 1)
    grams = lax.map(linalg.gram, long)
    values = jnp.maximum(lax.map(_eigenvalues, grams), 0)
    sizes = linalg.norm(grams, (1, 2)).reshape(-1)
    both = linalg.ratio(1.0, sizes[:, None] * sizes[None, :])
    flat = grams.reshape(len(grams), -1)
    short_side, long_side = linalg.matmul(flat, flat.T) * both, _long_side(long) * both
    k = min(m, n, SPECTRUM)
    return {
        **entry_sums(seen),
        "spectra": norms.reshape(-1, 1) * linalg.root(values[:, :k]),
        "stable_ranks": linalg.ratio(1.0, values[:, 0]),
        "effective_ranks": jnp.where(values[:, 0] > 0, jnp.exp(_entropy(values)), 0),
        "ranks": lax.map(_rank, (values, seen.deltas + seen.base, norms)),
        "rows": short_side if m >= n else long_side,
        "columns": long_side if m >= n else short_side,
        **_in_the_base(seen.base, long, grams, k),
        "growth": growth(merged),
    }


def _eigenvalues(gram: Float[Array, "p p"]) -> Float[Array, " p"]:
    return linalg.symmetric_eigen(gram)[0][::-1]


def _entropy(shares: Float[Array, "T p"]) -> Float[Array, " T"]:
    return -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)), axis=1)


def _rank(own: tuple[Float[Array, " p"], Float[Array, "m n"], Array]) -> Array:
    """The rank of a delta above the rounding of its expert, from the shares of its energy."""
    shares, expert, norm = own
    noise = linalg.ratio(rounding(expert), norm.reshape(()))
    return rank_of(shares, expert.size * noise**2)


def _long_side(long: Float[Array, "T q p"]) -> Float[Array, "T T"]:
    """`||X_s^T X_t||^2`, which is the inner product of the Grams `X X^T`; by these where they cost less."""
    count, q, p = long.shape
    if q < (count - 1) * p / 2 and q <= 4096:
        flat = lax.map(lambda one: linalg.gram(one.T), long).reshape(count, -1)
        return linalg.matmul(flat, flat.T)

    def with_all(one: Array) -> Array:
        return lax.map(lambda other: jnp.sum(linalg.matmul(one.T, other) ** 2), long)

    return lax.map(with_all, long)


def _in_the_base(base: Float[Array, "m n"], long: Array, grams: Array, k: int) -> Numbers:
    """The base's spectrum, and the shares of each delta in its leading, lesser and null input directions."""
    m, n = base.shape
    norm = linalg.norm(base).reshape(())
    unit = linalg.ratio(base, norm)
    values, vectors = linalg.symmetric_eigen(linalg.gram(unit if m >= n else unit.T))
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    kept = values > NULL * values[0]
    before = jnp.cumsum(values) - values
    leading = kept & (before < HALF * jnp.sum(values))

    def energies(own: tuple[Array, Array]) -> Array:
        x, gram = own
        if m >= n:
            return jnp.sum(vectors * linalg.matmul(gram, vectors), axis=0)
        along = linalg.matmul(linalg.matmul(x.T, unit.T), vectors)  # D W^T U = (D V) S
        return jnp.sum(along**2, axis=0) * linalg.ratio(1.0, values)

    each = jnp.maximum(lax.map(energies, (long, grams)), 0)
    changed = (jnp.trace(grams, axis1=1, axis2=2) > 0).astype(base.dtype)
    first, rest = (linalg.matmul(each, mask.astype(base.dtype)) for mask in (leading, kept & ~leading))
    counts = jnp.stack([jnp.sum(leading), jnp.sum(kept) - jnp.sum(leading), n - jnp.sum(kept)])
    return {
        "base_spectrum": norm * linalg.root(values[:k]),
        "leading": jnp.minimum(first, changed),
        "lesser": jnp.minimum(rest, changed),
        "null": jnp.clip(changed - first - rest, 0, 1),
        "directions": counts,
    }
