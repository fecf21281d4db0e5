"""How functions that decompose behave under `vmap`."""

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, mapped over a batch where `vmap` would have batched it; for what a derivative does not go through.

    Batched, both sides of a `cond` run: the fall-back for every matrix. And jaxlib 0.10.1 to 0.11.0 spreads a batch of
    decompositions over XLA's threads on a CPU and waits for them in one of these: as many batches at once as there are
    threads, such as a decomposition's and its fall-back's on two cores, can wait for ever.

    The function may hold numbers, but no arrays: inside a batched `cond` these would be batched and are refused.

    Example:
        >>> determinant = linalg.one_by_one(jnp.linalg.det)
        >>> jax.vmap(determinant)(jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])).tolist()
        [1.0, 9.0]
    """
    return jax.custom_batching.sequential_vmap(function)
