"""Shares of entries as numbers of entries."""

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Rounding = Literal["ceil", "floor", "round"]


def share_of(share: Any, size: Any, rounding: Rounding = "ceil") -> Any:
    """`share * size` as a whole number.

    Exact where both are known; a traced share has 24 bits, and a product within them of a whole number is taken
    for it.
    """
    if isinstance(share, int | float) and isinstance(size, int | np.integer):
        product = float(share) * int(size)
        nearest = round(product)
        if rounding == "ceil":
            return nearest if abs(product - nearest) <= 1e-12 * product else math.ceil(product)
        return math.floor(product) if rounding == "floor" else nearest
    traced = jnp.asarray(share) * size
    whole = jnp.round(traced)
    rounded = {"ceil": jnp.ceil, "floor": jnp.floor, "round": jnp.round}[rounding](traced)
    near = jnp.abs(traced - whole) <= 2 * jnp.finfo(traced.dtype).eps * traced
    return jnp.where(near, whole, rounded).astype(jnp.int32)
