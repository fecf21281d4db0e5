"""Random numbers that depend on (seed, tensor, expert) and on nothing else: not on order, pieces, stacks or device.

Every entry of a tensor is hashed with the tensor's key, which costs a fifth of a block cipher's draws: `pcg4d` of
M. Jarzynski and M. Olano, Hash Functions for GPU Rendering, Journal of Computer Graphics Techniques 9(3), 2020.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cfmerge.core.part import Context
from cfmerge.errors import CfmergeError

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
    key = jax.random.key(seed, impl="threefry2x32")
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
    """Numbers in [0, 1) for the entries `start ..` of a tensor, laid out in `shape`: a piece gets what it gets in the
    whole.

    They have 24 bits in every dtype: the same decisions in float32 and float64.
    """
    index = jnp.asarray(start, jnp.uint32) + jnp.arange(math.prod(shape), dtype=jnp.uint32)
    first, second = jax.random.key_data(key)
    word = _pcg4d(index, jnp.uint32(0), first, second)[3]
    return ((word >> 8).astype(jnp.float32) * 2.0**-24).reshape(shape).astype(dtype)


Words = tuple[Array, Array, Array, Array]


def _pcg4d(x: Array, y: Array, z: Array, w: Array) -> Words:
    """Four words of 32 bits out of four."""
    x, y, z, w = (word * jnp.uint32(1664525) + jnp.uint32(1013904223) for word in (x, y, z, w))
    x, y, z, w = (word ^ (word >> 16) for word in _mixed(x, y, z, w))
    return _mixed(x, y, z, w)


def _mixed(x: Array, y: Array, z: Array, w: Array) -> Words:
    x = x + y * w
    y = y + z * x
    z = z + x * y
    return x, y, z, w + y * z
