"""Exact order statistics without sorting: of one array inside a compiled function, and of the whole model in passes.

The bits of a non-negative float, read as an integer, are in the order of the floats. So the k-th largest magnitude
is found bit by bit from the top (one array), or digit by digit of 16 bits (the whole model: each pass over it counts
how often each value of the next digit occurs). Both give the k-th largest itself, not an estimate; what ties with it
is taken in the order of the entries.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from cfmerge.core.part import Context, Seen
from cfmerge.core.survey import Measure, xp_of
from cfmerge.linalg.selection import key_dtype

Rounding = Literal["ceil", "floor", "round"]
BITS = 16  # of a digit
VALUES = 1 << BITS


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
    digits = key_dtype().itemsize * 8 // BITS if xp is jnp else totals["digits"] // totals["places"]
    keys = xp.zeros(asked.shape, key_dtype() if xp is jnp else np.uint64)
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
    return jnp.asarray(search.keys).astype(key_dtype())
