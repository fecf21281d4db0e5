"""Exact order statistics of one array, without sorting.

The bits of a non-negative float, read as an integer, are in the order of the floats: such integers are *keys*. So the
k-th largest is found bit by bit from the top. It is the k-th largest itself, not an estimate; of entries that tie with
it those of lower index are taken. None of these functions has a derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from cfmerge.linalg.filled import filled

Mask = Bool[Array, "..."]
T = TypeVar("T")

# --- keys: unsigned integers in the order of the floats ----------------------------------------------------------


def magnitude_keys(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Integers in the order of `|x|`.

    Example:
        >>> keys = linalg.magnitude_keys(jnp.array([-2.0, 1.0]))
        >>> bool(keys[0] > keys[1])
        True
    """
    unsigned = _unsigned(x)
    return unsigned & ~_top_bit(unsigned.dtype)


def value_keys(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Integers in the order of `x`."""
    unsigned = _unsigned(x)
    top = _top_bit(unsigned.dtype)
    return jnp.where(unsigned & top != 0, ~unsigned, unsigned | top)


def value_of(keys: UInt[Array, "..."]) -> Float[Array, "..."]:
    """The numbers whose `value_keys` these are."""
    top = _top_bit(keys.dtype)
    unsigned = jnp.where(keys & top != 0, keys & ~top, ~keys)
    return magnitude_of(unsigned)


def magnitude_of(keys: UInt[Array, "..."]) -> Float[Array, "..."]:
    """The magnitudes whose `magnitude_keys` these are."""
    return lax.bitcast_convert_type(keys, jnp.float64 if keys.dtype.itemsize == 8 else jnp.float32)


def _unsigned(x: Array) -> Array:
    """The bits; those of float64 wherever there is float64, so that the tensors of a model compare."""
    return lax.bitcast_convert_type(lax.stop_gradient(x).astype(_wide()), key_dtype())


def _wide() -> Any:
    return jnp.dtype("float64" if jax.config.jax_enable_x64 else "float32")  # type: ignore[attr-defined]


def key_dtype() -> Any:
    """The type of keys: as wide as floats can be."""
    return jnp.dtype(f"uint{8 * _wide().itemsize}")


def _top_bit(dtype: Any) -> Array:
    return jnp.asarray(1, dtype) << jnp.asarray(8 * jnp.dtype(dtype).itemsize - 1, dtype)


def steady(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with one bit less, so that a sum to which it is added is the same number in every program.

    Compilers join a product and a sum into one operation with one rounding, in some programs and not in others. Keys
    that are compared with keys of another program are sums of steady numbers.
    """
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant - 1)


# --- selection ---------------------------------------------------------------------------------------------------


def kth_largest(values: Shaped[Array, "..."], k: int | Shaped[Array, ""]) -> Shaped[Array, ""]:
    """The `k`-th largest of keys, or of floats that are not negative; exact, by bisection on their bits.

    One pass over the numbers for every bit, which beats sorting them; `k` may be traced. Of keys, `k = 0` gives one
    above all of them.

    Example:
        >>> float(linalg.kth_largest(jnp.array([3.0, 0.5, 2.0, 2.0]), 2))
        2.0
    """
    if jnp.issubdtype(values.dtype, jnp.floating):
        unsigned = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
        bits = lax.bitcast_convert_type(lax.stop_gradient(values), unsigned)
        return lax.bitcast_convert_type(kth_largest(bits, k), values.dtype)
    enough = reaching(jnp.asarray(k, jnp.int32))
    return highest(filled(0, values), lambda key: enough(values >= key))


def highest(zero: UInt[Array, ""], holds: Callable[[Array], Array]) -> Array:
    """The largest integer at which a condition holds that holds below it and not above; found bit by bit.

    Args:
        zero: the least integer, `filled` like what the condition looks at.
    """
    return _bisect(zero, lambda number: (holds(number), ()), ((), ()))[0]


def largest(keys: UInt[Array, "..."], count: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """Which entries are the `count` largest: exactly so many, of equal ones those of lower index.

    Example:
        >>> linalg.largest(linalg.magnitude_keys(jnp.array([3.0, -4.0, 0.5, 3.0])), 2).tolist()
        [True, True, False, False]
    """
    upto, above = around(keys, reaching(count))
    return lax.cond(
        jnp.sum(upto, dtype=jnp.int32) > count,
        lambda: above | first(upto & ~above, count - jnp.sum(above, dtype=jnp.int32)),
        lambda: upto,
    )


def reaching(count: int | Int[Array, ""]) -> Callable[[Mask], Bool[Array, ""]]:
    """Whether so many entries are set: with `around`, the `kth_largest`."""
    return lambda mask: jnp.sum(mask, dtype=jnp.int32) >= count


def around(keys: UInt[Array, "..."], enough: Callable[[Mask], Bool[Array, ""]]) -> tuple[Mask, Mask]:
    """Which entries are at or above, and which above, the largest key with enough of them at or above it.

    They are those that `enough` saw: the last where it held, and where it did not. Compared again behind the loop,
    they could be with keys that were computed again there (XLA drops optimization barriers before it fuses), with
    other roundings, and the last key would fall below itself.
    """

    def look(key: Array) -> tuple[Array, Array]:
        mask = keys >= key
        return enough(mask), mask

    all_of_them, none = (filled(value, keys, keys.shape, bool) for value in (True, False))
    return _bisect(filled(0, keys), look, (all_of_them, none))[1]


def _bisect(zero: Array, look: Callable[[Array], tuple[Array, T]], seen: tuple[T, T]) -> tuple[Array, tuple[T, T]]:
    """The largest integer at which a condition holds, and what was last seen where it held and where it did not.

    Args:
        look: `look(number)` returns whether it holds there, and what else is seen.
        seen: where it holds, at 0, and where it does not.
    """
    dtype = zero.dtype
    bits = 8 * dtype.itemsize

    def step(place: int | Array, state: tuple[Array, T, T]) -> tuple[Array, T, T]:
        number, below, above = state
        candidate = number | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - place).astype(dtype))
        holds, found = look(candidate)
        choose = partial(jax.tree.map, partial(jnp.where, holds))
        return choose((candidate, found, above), (number, below, found))

    number, below, above = lax.fori_loop(0, bits, step, (zero, *seen))
    return number, (below, above)


def first(mask: Bool[Array, "..."], count: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """The first `count` of the entries that are set."""
    zero = filled(0, mask, dtype=jnp.uint32)
    places = zero + jnp.arange(mask.size, dtype=jnp.uint32).reshape(mask.shape)

    def cut() -> Array:
        end = highest(zero, lambda end: jnp.sum(mask & (places < end), dtype=jnp.int32) <= count)
        return mask & (places < end)

    return lax.cond(jnp.sum(mask, dtype=jnp.int32) > count, cut, lambda: mask)


def middle_ranks(keys: Shaped[Array | np.ndarray, "... n"]) -> Shaped[Array | np.ndarray, "... n"]:
    """Ranks `0 .. n-1` along the last axis, from the smallest; equal entries share the mean of their ranks.

    Of a NumPy array, by NumPy, which sorts some twenty times as fast as XLA does on a processor.

    Example:
        >>> linalg.selection.middle_ranks(np.array([3.0, 0.5, 2.0, 2.0])).tolist()
        [3.0, 0.0, 1.5, 1.5]
    """
    if isinstance(keys, np.ndarray):
        return _middle_ranks(keys)
    rows = keys.reshape(-1, keys.shape[-1])
    ordered = lax.sort(rows, dimension=1, is_stable=False)
    below = jax.vmap(jnp.searchsorted)(ordered, rows)
    ends = jnp.concatenate([ordered[:, 1:] != ordered[:, :-1], jnp.ones((len(rows), 1), bool)], axis=1)
    places = jnp.arange(rows.shape[1], dtype=jnp.int32)
    last = lax.cummin(jnp.where(ends, places, rows.shape[1]), axis=1, reverse=True)  # of those equal to each
    return ((below + jnp.take_along_axis(last, below, axis=1)) / 2).reshape(keys.shape)


def _middle_ranks(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(-1, values.shape[-1])
    n = rows.shape[1]
    if rows.dtype == np.float32 and n < 1 << 32:  # value and place in one integer, which NumPy sorts by vectors
        bits = (rows + 0.0).view(np.uint32).astype(np.uint64)
        packed = np.sort((bits << 32) | np.arange(n, dtype=np.uint64), axis=1)
        order, ordered = (packed & 0xFFFFFFFF).astype(np.int64), packed >> 32
    else:
        order = np.argsort(rows, axis=1, kind="stable")
        ordered = np.take_along_axis(rows, order, axis=1)
    ranks = np.broadcast_to(np.arange(n, dtype=np.float64), rows.shape)
    new = ordered[:, 1:] != ordered[:, :-1]
    if not new.all():
        edge = np.ones((len(rows), 1), bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, new]), ranks, 0), axis=1)
        last = np.minimum.accumulate(np.where(np.hstack([new, edge]), ranks, n)[:, ::-1], axis=1)[:, ::-1]
        ranks = (first + last) / 2
    found = np.empty(rows.shape)
    np.put_along_axis(found, order, ranks, axis=1)
    return found.reshape(values.shape)
