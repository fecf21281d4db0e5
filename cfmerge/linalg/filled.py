"""Arrays of one number, for what a loop or a branch starts from or ends in."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def filled(value: Any, like: Array, shape: tuple[int, ...] = (), dtype: Any = None) -> Array:
    """An array of one number, in the dtype of `like`, that varies over the axes of a mesh that `like` varies over.

    Inside `jax.shard_map` an array varies over mesh axes, or it is the same on all devices, as a constant is; and a
    loop refuses a start, a `cond` a branch, that differs in this from what it is to become.

    Example:
        >>> linalg.filled(0, jnp.ones((3, 2)), (2,)).tolist()
        [0.0, 0.0]
    """
    return jnp.full_like(like, value, dtype, shape)
