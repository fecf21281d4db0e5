"""Exact order statistics without sorting: of one array inside a compiled function, and of the whole model in passes.

The bits of a non-negative float, read as an integer, are in the order of the floats. So the k-th largest magnitude
is found bit by bit from the top (one array), or digit by digit of 16 bits (the whole model: each pass over it counts
how often each value of the next digit occurs). Both give the k-th largest itself, not an estimate; what ties with it
is taken in the order of the entries.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from cfmerge.core.part import Context, Seen
from cfmerge.core.survey import Measure, xp_of

Rounding = Literal["ceil", "floor", "round"]
Mask = Bool[Array, "..."]
T = TypeVar("T")
BITS = 16  # of a digit
VALUES = 1 << BITS


# --- keys: unsigned integers in the order of the floats ----------------------------------------------------------


def magnitude_keys(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Integers in the order of `|x|`."""
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
    return lax.bitcast_convert_type(lax.stop_gradient(x).astype(_wide()), _key_dtype())


def _wide() -> Any:
    return jnp.dtype("float64" if jax.config.jax_enable_x64 else "float32")  # type: ignore[attr-defined]


def _key_dtype() -> Any:
    return jnp.dtype(f"uint{8 * _wide().itemsize}")


def _top_bit(dtype: Any) -> Array:
    return jnp.asarray(1, dtype) << jnp.asarray(8 * jnp.dtype(dtype).itemsize - 1, dtype)


# --- one array ---------------------------------------------------------------------------------------------------


def kth_largest(keys: UInt[Array, "..."], rank: int | Int[Array, ""]) -> UInt[Array, ""]:
    """The key with `rank - 1` others before it in descending order; above all keys for rank 0."""
    enough = reaching(rank)
    return highest(keys.dtype, lambda key: enough(keys >= key))


def highest(dtype: Any, holds: Callable[[Array], Array]) -> Array:
    """The largest integer at which a condition holds that holds below it and not above; found bit by bit."""
    return _bisect(dtype, lambda number: (holds(number), ()), ((), ()))[0]


def largest(keys: UInt[Array, "..."], count: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """Which entries are the `count` largest: exactly so many, of equal ones those of lower index."""
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

    Both masks are those that `enough` was last asked about: the one where it held and the one where it did not. They
    are not compared anew behind the loop: XLA may compute the keys a second time there (it drops optimization barriers
    before it fuses), with other roundings, so that an entry would lie below its own key.
    """

    def look(key: Array) -> tuple[Array, Array]:
        mask = keys >= key
        return enough(mask), mask

    return _bisect(keys.dtype, look, (jnp.ones(keys.shape, bool), jnp.zeros(keys.shape, bool)))[1]


def _bisect(dtype: Any, look: Callable[[Array], tuple[Array, T]], seen: tuple[T, T]) -> tuple[Array, tuple[T, T]]:
    """The largest integer at which a condition holds, and what was last seen where it held and where it did not.

    Args:
        look: `look(number)` returns whether it holds there, and what else is seen.
        seen: where it holds, at 0, and where it does not.
    """
    bits = 8 * jnp.dtype(dtype).itemsize

    def step(place: int | Array, state: tuple[Array, T, T]) -> tuple[Array, T, T]:
        number, below, above = state
        candidate = number | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - place).astype(dtype))
        holds, found = look(candidate)
        choose = partial(jax.tree.map, partial(jnp.where, holds))
        return choose((candidate, found, above), (number, below, found))

    number, below, above = lax.fori_loop(0, bits, step, (jnp.zeros((), dtype), *seen))
    return number, (below, above)


def first(mask: Bool[Array, "..."], count: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """The first `count` of the entries that are set."""
    places = jnp.arange(mask.size, dtype=jnp.uint32).reshape(mask.shape)

    def cut() -> Array:
        end = highest(jnp.uint32, lambda end: jnp.sum(mask & (places < end), dtype=jnp.int32) <= count)
        return mask & (places < end)

    return lax.cond(jnp.sum(mask, dtype=jnp.int32) > count, cut, lambda: mask)


def middle_ranks(keys: UInt[Array, "... n"]) -> Float[Array, "... n"]:
    """Ranks `0 .. n-1` along the last axis, from the smallest; equal entries share the mean of their ranks."""
    rows = keys.reshape(-1, keys.shape[-1])
    ordered = lax.sort(rows, dimension=1, is_stable=False)
    below = jax.vmap(jnp.searchsorted)(ordered, rows)
    ends = jnp.concatenate([ordered[:, 1:] != ordered[:, :-1], jnp.ones((len(rows), 1), bool)], axis=1)
    places = jnp.arange(rows.shape[1], dtype=jnp.int32)
    last = lax.cummin(jnp.where(ends, places, rows.shape[1]), axis=1, reverse=True)  # of those equal to each
    return ((below + jnp.take_along_axis(last, below, axis=1)) / 2).reshape(keys.shape)


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


# --- the whole model ---------------------------------------------------------------------------------------------


Counts = Int[np.ndarray | Array, "T R VALUES"]


class Search(NamedTuple):
    """Order statistics of the whole model, for `T` experts and `R` ranks each, as far as they are known.

    Attributes:
        keys: the leading digits of each; at the end the keys themselves.
        ranks: from the largest, from 1, among the entries that share these digits: at the end, how many of the
            entries that tie with it are wanted.
        equal: how many entries share them.
        asked: the ranks as they were asked for.
        unknown: digits of the keys that are yet to be found.
    """

    keys: UInt[np.ndarray | Array, "T R"]
    ranks: Int[np.ndarray | Array, "T R"]
    equal: Int[np.ndarray | Array, "T R"]
    asked: Int[np.ndarray | Array, "T R"]
    unknown: Int[np.ndarray, " T"]

    @property
    def complete(self) -> bool:
        return not np.any(self.unknown)

    @property
    def tied(self) -> bool:
        """Whether some, but not all, of the entries that tie are wanted; those that are 0 make no difference.

        True while values are traced: they may.
        """
        some = (self.ranks < self.equal) & (self.keys > 0) & (self.asked > 0)
        return isinstance(some, jax.core.Tracer) or bool(np.any(some))


def search(
    keys_of: Callable[..., Any], ranks: Sequence[tuple[Any, ...]], entries: int, joint: bool = False
) -> Generator[Measure, Any, Search]:
    """A look for order statistics of the whole model: one pass for each digit of the keys, the leading one first.

    Args:
        keys_of: `keys_of(delta)`, or of all experts `keys_of(seen)` if `joint`.
        ranks: of every expert, the ranks from the largest, from 1 (0: above all).
        entries: of each expert's model.
    """

    found: Search | None = None
    while found is None or not found.complete:
        totals = yield Measure(partial(_of_all if joint else _of_one, keys_of, found), joint)
        found = _narrow(found or _nothing_known(totals, entries, ranks), totals["histogram"])
    return found


def _of_one(keys_of: Callable[..., Any], found: Search | None, delta: Array, context: Context) -> dict[str, Array]:
    return _counted(keys_of(delta), found, context.number)


def _of_all(keys_of: Callable[..., Any], found: Search | None, seen: Seen) -> dict[str, Array]:
    each = [_counted(keys, found, number) for number, keys in enumerate(keys_of(seen))]
    return {name: jnp.stack([one[name] for one in each]) for name in each[0]}


def _counted(keys: Array, found: Search | None, number: int | Array) -> dict[str, Array]:
    """How often each value of the next digit occurs among an expert's keys that share each known prefix."""
    digits = 8 * keys.dtype.itemsize // BITS
    left = digits - 1 if found is None else int(found.unknown[0]) - 1  # digits behind the one that is counted
    digit = (keys >> (BITS * left)).astype(jnp.uint32) & (VALUES - 1)
    if found is None:
        one = jnp.ones((), jnp.int32)
        histogram = jnp.zeros(VALUES, jnp.int32).at[digit].add(1)
        return {"histogram": histogram[None], "digits": digits * one, "places": one}
    prefixes = found_keys(found)[number]
    place = jnp.full(keys.shape, len(prefixes) * VALUES, jnp.uint32)
    for row in reversed(range(len(prefixes))):
        place = jnp.where((keys >> (BITS * (left + 1))) == prefixes[row], row * VALUES + digit, place)
    histogram = jnp.zeros(len(prefixes) * VALUES, jnp.int32).at[place].add(1, mode="drop").reshape(-1, VALUES)
    return {"histogram": histogram[jnp.argmax(prefixes[:, None] == prefixes, axis=0)]}  # equal ones share a row


def _nothing_known(totals: Mapping[str, Any], entries: int, ranks: Sequence[tuple[Any, ...]]) -> Search:
    xp = xp_of(totals["histogram"], ranks)
    asked = xp.stack([xp.stack(own) for own in ranks])
    digits = _wide().itemsize * 8 // BITS if xp is jnp else totals["digits"] // totals["places"]
    keys = xp.zeros(asked.shape, _key_dtype() if xp is jnp else np.uint64)
    wanted = xp.clip(asked, 1, max(entries, 1))
    return Search(keys, wanted, wanted, asked, np.broadcast_to(digits, len(asked)))


def _narrow(found: Search, histogram: Counts) -> Search:
    """The search with one more digit known, from how often each of its values occurs (`R = 1` in the first pass)."""
    xp = xp_of(histogram, found.ranks)
    from_top = xp.broadcast_to(xp.cumsum(histogram[..., ::-1], axis=-1), (*found.ranks.shape, VALUES))
    place = xp.argmax(from_top >= found.ranks[..., None], axis=-1)[..., None]
    upto = xp.take_along_axis(from_top, place, -1)[..., 0]
    before = xp.where(place > 0, xp.take_along_axis(from_top, xp.maximum(place - 1, 0), -1), 0)[..., 0]
    keys = (found.keys << BITS) | (VALUES - 1 - place[..., 0]).astype(found.keys.dtype)
    return Search(keys, found.ranks - before, upto - before, found.asked, found.unknown - 1)


def found_keys(search: Search) -> UInt[Array, "T R"]:
    """The keys that were found, or their leading digits, as the keys of arrays are."""
    return jnp.asarray(search.keys).astype(_key_dtype())
