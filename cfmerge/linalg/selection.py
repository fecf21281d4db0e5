"""Exact order statistics of one array, without sorting."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def kth_largest(values: Float[Array, "..."], k: int | Array) -> Float[Array, ""]:
    """The `k`-th largest of numbers that are not negative, `k >= 1`: exact, by bisection on their bits.

    One pass over the numbers for every bit, which beats sorting them; `k` may be traced.
    """
    integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    bits = lax.bitcast_convert_type(lax.stop_gradient(values), integer)  # ordered as the numbers are
    count = jnp.asarray(k, jnp.int32)

    def settle(step: int | Array, found: Array) -> Array:
        raised = found | jnp.left_shift(jnp.ones((), integer), jnp.asarray(top - step, integer))
        return jnp.where(jnp.sum(bits >= raised, dtype=jnp.int32) >= count, raised, found)

    top = 8 * values.dtype.itemsize - 2
    return lax.bitcast_convert_type(lax.fori_loop(0, top + 1, settle, jnp.zeros((), integer)), values.dtype)
