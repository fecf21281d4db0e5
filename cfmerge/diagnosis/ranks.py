"""The rank of a delta, above what rounding makes of it.

A LoRA adapter that was merged into the weights is `W_t = round(W_0 + B A)`: of rank r but for the rounding, which is of
full rank. A delta of full fine-tuning has a tail of singular values that rounding does not explain. So with singular
values `s_1 >= s_2 >= ..` and `sigma` the deviation of rounding one entry,

    rank = the least r with  sum_{i > r} s_i^2 <= 3 m n sigma^2 + FLOOR sum_i s_i^2

3, for the base may be rounded as well, and rounding is not quite uniform. Where that would be more than `HIDDEN` of the
energy, the deltas are so small that rounding hides their spectrum (bfloat16, a small learning rate): then `sigma` is
taken as zero, and the rank is that of the stored numbers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cfmerge import linalg

FLOOR = 1e-5  # the share of the energy that float32 arithmetic on the spectrum may leave
HIDDEN = 0.1  # the share of the energy from which rounding hides the spectrum
GRAINS = (jnp.bfloat16, jnp.float16)  # the dtypes that values are recognised as rounded to, the coarsest first


def rounding(weight: Float[Array, "..."]) -> Float[Array, ""]:
    """The root mean square of what rounding an entry has changed: a unit in its last place over `sqrt(12)`.

    The dtype is the coarsest that holds all values, whatever the file's: a checkpoint may have been widened since.

    Example:
        >>> weight = jnp.linspace(0.5, 1.0, 1000)
        >>> rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
        >>> error = jnp.sqrt(jnp.mean((rounded - weight) ** 2))
        >>> bool(abs(rounding(rounded) / error - 1) < 0.05), bool(rounding(weight) < 1e-6)
        (True, True)
    """
    eps = jnp.asarray(jnp.finfo(weight.dtype).eps, weight.dtype)
    grain = eps
    for dtype in reversed(GRAINS):  # the base and the delta add up to the weight but for a few units of its own dtype
        held = jnp.abs(weight - weight.astype(dtype).astype(weight.dtype)) <= 4 * eps * jnp.abs(weight)
        grain = jnp.where(held.all(), jnp.asarray(jnp.finfo(dtype).eps, weight.dtype), grain)
    mantissa, exponent = jnp.frexp(weight)
    unit = jnp.where(mantissa == 0, 0, jnp.ldexp(grain, exponent - 1))
    return linalg.norm(unit).reshape(()) / jnp.sqrt(12.0 * max(weight.size, 1))


def spectrum(delta: Float[Array, "m n"]) -> Float[Array, " k"]:
    """The squared singular values, largest first, by the eigenvalues of the smaller Gram.

    Example:
        >>> spectrum(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).round(4).tolist()
        [9.0, 4.0, 1.0]
    """
    wide = delta.T if delta.shape[0] > delta.shape[1] else delta
    values, _ = linalg.symmetric_eigen(linalg.gram(wide.T))
    return jnp.maximum(values[::-1], 0)


def rank_of(squares: Float[Array, " k"], noise: Float[Array, ""] | float = 0.0) -> Int[Array, ""]:
    """The least number of directions that leave no more than rounding; `noise` is its energy, `m n sigma^2`.

    Example:
        >>> squares = jnp.array([900.0, 400.0, 1.0, 1.0])
        >>> int(rank_of(squares)), int(rank_of(squares, 1.0)), int(rank_of(jnp.zeros(4)))
        (4, 2, 0)
    """
    tail = jnp.cumsum(squares[::-1])[::-1]  # tail[r] = what is left after r directions
    left = 3 * jnp.asarray(noise, squares.dtype)
    return jnp.sum(tail > jnp.where(left > HIDDEN * tail[0], 0, left) + FLOOR * tail[0])


def numerical_rank(delta: Float[Array, "m n"], noise: Float[Array, ""] | float = 0.0) -> Int[Array, ""]:
    """The rank of a delta, where rounding an entry has the deviation `noise`, see `rounding`.

    Example:
        >>> delta = jnp.outer(jnp.arange(6.0), jnp.ones(5))
        >>> int(numerical_rank(delta)), int(numerical_rank(jnp.eye(5)))
        (1, 5)
    """
    norm = linalg.norm(delta).reshape(())
    return rank_of(spectrum(linalg.ratio(delta, norm)), delta.size * linalg.ratio(jnp.asarray(noise), norm) ** 2)
