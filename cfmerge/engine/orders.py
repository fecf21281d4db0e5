"""Order statistics of a model's keys, exactly, while only pieces of it are held.

    a sample of the model          gives for each statistic a bracket, which holds it with near certainty
    one pass over all pieces       counts the keys above the bracket, and keeps those inside: few
    the key                        is found among these; where the bracket missed it, the pass is made again

All this is on the host, where NumPy selects and sorts some thirty times as fast as XLA does on a processor. Under a
transformation of JAX the keys of all tensors are there at once, and the key is found bit by bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.survey import Order, Ordered
from cfmerge.engine.segments import Segment
from cfmerge.engine.surveys import Place
from cfmerge.engine.units import Unit
from cfmerge.linalg.filled import filled
from cfmerge.linalg.selection import highest
from cfmerge.planning.work import Job, Work

KeysOf = Callable[[Unit], Sequence[Any]]  # each expert's keys (stack, *shape)
Over = Callable[[Sequence[Unit], Callable[[Unit], Any], Callable[[Unit, Any], None]], None]  # as the loop's `over`

BLOCKS, BLOCK = 512, 4096  # of a sample: many blocks, since neighbours are alike
SURE = 6.0  # standard errors of a bracket
SMALL = 1 << 20  # entries that need no sample
ALL = np.uint32(2**32 - 1)  # an end behind all entries
PIECES = -1  # in place of a piece's first entry: all of the tensor


class Inside(NamedTuple):
    """The keys of one place, expert and rank: how many are above the bracket, and those inside with their counts."""

    above: int
    keys: np.ndarray
    counts: np.ndarray


def places_of(unit: Unit, keys: Sequence[Any]) -> Iterator[tuple[Place, list[np.ndarray]]]:
    """`(place, flat keys of every expert)`, without the entries that only fill up rows."""
    places = unit.places
    if unit.row is None:
        flat = [np.asarray(own).reshape(len(places), -1) for own in keys]
        yield from ((place, [own[n] for own in flat]) for n, place in enumerate(places))
        return
    for place, segment, span in zip(places, unit.segments, unit.spans, strict=True):
        yield place, [np.asarray(own)[span].reshape(-1)[: segment.entries] for own in keys]


def sample_of(work: Work, jobs: Sequence[Job]) -> Unit:
    """Blocks of entries spread evenly over the jobs."""
    ends = np.cumsum([job.parameter.size for job in jobs])
    starts = np.unique(np.linspace(0, ends[-1] - 1, BLOCKS).astype(np.int64))
    segments = []
    for start in starts.tolist():
        number = int(np.searchsorted(ends, start, side="right"))
        job = jobs[number]
        first = max(0, min(start - (int(ends[number]) - job.parameter.size), job.parameter.size - BLOCK))
        segments.append(Segment(job, first, min(BLOCK, job.parameter.size - first)))
    return Unit(work, tuple(segments), BLOCK)


def on_host(
    order: Order,
    units: Sequence[Unit],
    entries: int,
    keys_of: KeysOf,
    over: Over,
    sample: Unit | None = None,
    agreed: Callable[[Any], Any] = lambda value: value,
) -> Ordered:
    """The order statistics of all units together, of which each expert has so many entries.

    Args:
        agreed: the brackets that all processes take, of this one's.
    """
    ranks = np.minimum(np.asarray([[int(rank) for rank in own] for own in order.ranks], np.int64), entries)
    low, high = agreed(_bracket(ranks, entries, sample, keys_of))
    while True:
        found = _counted(units, low, high, keys_of, over)
        keys, left, missed = _keys(ranks, found)
        if not missed.any():
            break
        low, high = (
            np.where(missed > 0, high, np.where(missed < 0, 0, low)),
            np.where(missed > 0, _largest(high), np.where(missed < 0, low, high)),
        )
    ends = _ends(keys, left, found, units, keys_of, over) if order.ties else None
    return Ordered(keys, ends)


def _largest(like: np.ndarray) -> Any:
    return np.iinfo(like.dtype).max


def _bracket(ranks: np.ndarray, entries: int, sample: Unit | None, keys_of: KeysOf) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest key that each statistic may have `(T, R)`, by a sample."""
    if sample is None:
        return np.zeros(ranks.shape, np.uint64), np.full(ranks.shape, np.iinfo(np.uint64).max)
    blocks = list(zip(*(own for _, own in places_of(sample, keys_of(sample))), strict=True))
    low, high = np.zeros(ranks.shape, np.uint64), np.zeros(ranks.shape, np.uint64)
    for t, own in enumerate(blocks):
        ordered = np.sort(np.concatenate(own))
        for r, rank in enumerate(ranks[t]):
            share = min(max(rank / entries, 0.0), 1.0)
            at = ordered[min(int((1 - share) * len(ordered)), len(ordered) - 1)]
            spread = np.std([np.mean(block > at) for block in own]) + np.std([np.mean(block >= at) for block in own])
            margin = SURE * spread / len(own) ** 0.5 + 8 / len(ordered)
            first, last = int((1 - share - margin) * len(ordered)), int((1 - share + margin) * len(ordered)) + 1
            low[t, r] = 0 if first < 0 else ordered[first]
            high[t, r] = np.iinfo(np.uint64).max if last >= len(ordered) else ordered[last]
    return low, high


def _counted(
    units: Sequence[Unit], low: np.ndarray, high: np.ndarray, keys_of: KeysOf, over: Over
) -> dict[Place, list[list[Inside]]]:
    """`{place: [expert][rank]}` of all keys, in the order of the places."""
    found: dict[Place, list[list[Inside]]] = {}

    def count(unit: Unit) -> dict[Place, list[list[tuple[Any, ...]]]]:
        return {
            place: [
                [tuple(_inside(keys, *pair)) for pair in zip(low[t], high[t], strict=True)]
                for t, keys in enumerate(own)
            ]
            for place, own in places_of(unit, keys_of(unit))
        }

    def take(unit: Unit, own: dict[Place, list[list[tuple[Any, ...]]]]) -> None:
        found.update({place: [[Inside(*one) for one in each] for each in of_place] for place, of_place in own.items()})

    over(units, count, take)
    return dict(sorted(found.items()))


def _inside(keys: np.ndarray, low: Any, high: Any) -> Inside:
    most = np.iinfo(keys.dtype).max
    low, high = keys.dtype.type(min(int(low), most)), keys.dtype.type(min(int(high), most))
    inside = keys[keys - low <= high - low]  # what is below `low` wraps around to above
    values, counts = np.unique(inside, return_counts=True)
    return Inside(int(np.count_nonzero(keys > high)), values, counts)


def _keys(ranks: np.ndarray, found: Mapping[Place, list[list[Inside]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys at the ranks, how many of those that tie belong to these, and where the bracket missed it.

    The last is 1 where the key lies above the bracket, -1 below, else 0.
    """
    dtype = next(iter(found.values()))[0][0].keys.dtype
    keys = np.full(ranks.shape, np.iinfo(dtype).max, dtype)
    left, missed = np.zeros(ranks.shape, np.int64), np.zeros(ranks.shape, np.int64)
    for t, r in np.ndindex(ranks.shape):
        if ranks[t, r] < 1:
            continue
        own = [each[t][r] for each in found.values()]
        place = ranks[t, r] - sum(one.above for one in own)  # from the largest of those inside, from 1
        values, where = np.unique(np.concatenate([one.keys for one in own]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([one.counts for one in own]), len(values)).astype(np.int64)
        if place < 1 or place > counts.sum():
            missed[t, r] = 1 if place < 1 else -1
            continue
        upto = np.cumsum(counts[::-1])
        at = int(np.searchsorted(upto, place))
        keys[t, r] = values[::-1][at]
        left[t, r] = place - (upto[at] - counts[::-1][at])
    return keys, left, missed


def _ends(
    keys: np.ndarray,
    left: np.ndarray,
    found: Mapping[Place, list[list[Inside]]],
    units: Sequence[Unit],
    keys_of: KeysOf,
    over: Over,
) -> dict[Place, np.ndarray]:
    """Up to which entry of each tensor those that tie with the keys belong to the ranks; see `ends_at`."""
    ends = {place: np.zeros(keys.shape, np.uint32) for place in found}
    again: dict[Place, list[tuple[int, int, int]]] = {}
    for t, r in np.ndindex(keys.shape):
        wanted = int(left[t, r])
        for place, own in found.items():
            equal = int(own[t][r].counts[own[t][r].keys == keys[t, r]].sum())
            if wanted >= equal:
                ends[place][t, r] = ALL
            elif wanted > 0:
                again.setdefault(place, []).append((t, r, wanted))
            wanted = max(wanted - equal, 0)

    def last(unit: Unit) -> list[tuple[Place, int, int, int]]:
        return [
            (place, t, r, place[1] * (unit.row is not None) + int(np.flatnonzero(own[t] == keys[t, r])[wanted - 1]) + 1)
            for place, own in places_of(unit, keys_of(unit)) for t, r, wanted in again.get(place, ())
        ]  # fmt: skip

    def take(unit: Unit, found: list[tuple[Place, int, int, int]]) -> None:
        for place, t, r, end in found:
            ends[place][t, r] = end

    over([unit for unit in units if again.keys() & set(unit.places)], last, take)  # in which the last of them lie
    joined: dict[Place, np.ndarray] = {}
    rows = {place for unit in units if unit.row is not None for place in unit.places}
    for place, end in ends.items():  # the first piece that does not end behind all of its entries says where
        key = (place[0], PIECES) if place in rows else place
        start = place[1] if place in rows else 0
        joined[key] = np.minimum(joined.get(key, ALL), np.where(end == 0, start, end))
    return joined


def ends_at(ends: Mapping[Place, Any], units: Iterable[Unit]) -> dict[Place, Any]:
    """The ends of every unit's tensors `{place: (T, R)}`; raises `KeyError` if the units are cut in another way."""
    return {place: ends[place if unit.row is None else (place[0], PIECES)] for unit in units for place in unit.places}


def traced(order: Order, units: Sequence[Unit], keys_of: KeysOf) -> Ordered:
    """The same of keys that JAX traces: all of them are there."""
    keys = [jnp.stack(list(keys_of(unit))) for unit in units]  # (T, stack, *shape)
    ranks = jnp.stack([jnp.stack([jnp.asarray(rank, jnp.int32) for rank in own]) for own in order.ranks])
    keys = [own.reshape(*own.shape[:1], len(unit.places), -1) for unit, own in zip(units, keys, strict=True)]

    def reaching(own: list[Any], key: Any) -> Any:
        return sum(jnp.sum(each >= key, dtype=jnp.int32) for each in own)

    def at(own: list[Any], rank: Any) -> Any:
        return highest(filled(0, own[0]), lambda key: reaching(own, key) >= rank)

    found = jax.vmap(lambda own, own_ranks: jax.vmap(lambda rank: at(own, rank))(own_ranks))(keys, ranks)
    if not order.ties:
        return Ordered(found)
    above = jax.vmap(lambda own, own_keys: jax.vmap(lambda key: reaching(own, key + 1))(own_keys))(keys, found)
    left, ends = ranks - jnp.where(ranks > 0, above, ranks), {}
    equal = {
        place: own[:, None, n] == found[:, :, None]
        for unit, own in zip(units, keys, strict=True) for n, place in enumerate(unit.places)
    }  # fmt: skip
    for place, ties in sorted(equal.items()):
        many = jnp.sum(ties, axis=-1, dtype=jnp.int32)
        ends[place] = jax.vmap(jax.vmap(_end))(ties, jnp.minimum(left, many))
        left = left - jnp.minimum(left, many)
    return Ordered(found, ends)


def _end(ties: Any, wanted: Any) -> Any:
    zero = filled(0, ties, dtype=jnp.uint32)
    numbers = zero + jnp.arange(len(ties), dtype=jnp.uint32)
    return highest(zero, lambda end: jnp.sum(ties & (numbers < end), dtype=jnp.int32) <= wanted)
