"""Random numbers that depend on (seed, tensor, expert) and on nothing else: not on order, pieces, stacks or device."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge.core.part import Context
from cfmerge.errors import CfmergeError

BLOCK = 1 << 16  # entries that one folded key serves; pieces of a large tensor begin at a multiple of it
SEEDS = 1 << 31  # JAX gives larger ones other keys where float64 is switched on


def check_seed(seed: int | Array) -> None:
    """Raises `CfmergeError` unless the seed is one that gives the same keys everywhere; traced ones pass."""
    if isinstance(seed, int | np.integer) and not 0 <= seed < SEEDS:
        raise CfmergeError(f"the seed must lie in [0, {SEEDS - 1}], got {seed}")


def digest_of(tensor: str, expert: str) -> np.ndarray:
    """Two 32-bit numbers `(2,)` that stand for one tensor of one expert."""
    return np.frombuffer(hashlib.sha256(f"{tensor}\0{expert}".encode()).digest()[:8], np.uint32)


def key_from(seed: int | Array, digest: Array | np.ndarray) -> Array:
    """The JAX key of a seed and a digest."""
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, digest[0]), digest[1])


def key_of(seed: int, tensor: str, expert: str) -> Array:
    """The JAX key of one tensor of one expert."""
    return key_from(seed, digest_of(tensor, expert))


def draws(context: Context, delta: Float[Array, "..."]) -> Float[Array, "..."]:
    """A number in [0, 1) for every entry of the delta, in its shape and dtype.

        >>> def keep_half(delta, context):
        ...     return jnp.where(methods.draws(context, delta) < 0.5, 2 * delta, 0)
        >>> halves = methods.Transform("keep_half", keep_half, needs=methods.Needs("entry", random=True))
        >>> base = jnp.zeros((4, 3))
        >>> merged = cfmerge.merge_tensor(base, [base + 1, base + 1], halves >> methods.average(), seed=1)
        >>> set(merged.reshape(-1).tolist()) <= {0.0, 1.0, 2.0}, float(merged.min()) < float(merged.max())
        (True, True)

    An entry of the file gets the same number whatever the order, the pieces and the view of its tensor.

    Raises:
        CfmergeError: the context has no key, since the method's needs do not say that it is `random`.
    """
    if context.key is None:
        raise CfmergeError("this method is random, and needs a key in the context")
    if context.stored is None or context.view is None:
        return uniform(context.key, delta.shape, delta.dtype, context.start)
    return context.view(uniform(context.key, context.stored, delta.dtype)).reshape(delta.shape)


def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype, start: int | Array = 0) -> Float[Array, "..."]:
    """Numbers in [0, 1) for the entries `start ..` of a tensor, laid out in `shape`; `start` is a multiple of BLOCK.

    Every block of entries has a key of its own, so that a piece of a tensor gets what it gets in the whole.
    """
    size = 1
    for length in shape:
        size *= length
    blocks = -(-size // BLOCK)
    numbers = jnp.asarray(start) // BLOCK + jnp.arange(blocks)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    # float32 draws for every dtype: the same decisions in float32 and float64
    drawn = jax.vmap(lambda one: jax.random.uniform(one, (min(BLOCK, size),), jnp.float32))(keys)
    return drawn.reshape(-1)[:size].reshape(shape).astype(dtype)
