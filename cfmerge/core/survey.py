"""Looks at the whole model before the merge.

A look is a generator: it yields a `Measure`, gets the totals over the whole model back, and returns what was found.

    def look(entries, own):
        energies = yield Measure(lambda delta: jnp.sum(delta**2))        # (experts,)
        return energies / energies.sum()

    Survey(look, informed=lambda found: Method(...))                     # the part that knows `found.model`
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.part import NO_CONTEXT, Context, Method, Part, Seen, with_context


class Measure(NamedTuple):
    """What is wanted of the model: one pass over it.

    Attributes:
        of: `of(delta)` or `of(delta, context)` of each expert and tensor: a pytree of arrays. If `joint`, `of(seen)` of
            each tensor; for a transform behind a method `of(merged, seen)`. A tuple holds one for each expert.
        joint: it takes all experts at once.
        by_tensor: the measures are not summed over the model.

    The totals that come back are sums over all tensors, of measures that are not joint stacked over the experts; if
    `by_tensor` `{place: measures}`, places in order. On the host they have 64 bits; under `jit` they are traced.
    """

    of: Any
    joint: bool = False
    by_tensor: bool = False

    def each(self, experts: int) -> tuple[Callable[..., Any], ...]:
        """The measure of every expert."""
        return self.of if isinstance(self.of, tuple) else (self.of,) * experts


Look = Generator[Measure, Any, Any]


class Found(NamedTuple):
    """What a look found: of the whole model, and of the tensor (or piece of one) that is worked on.

    A look returns a `Found` whose `tensor` is `{place: ...}`, or anything else, which is the `model` of one.
    """

    model: Any
    tensor: Any = None


class Survey(NamedTuple):
    """How a part learns what it must know of the whole model.

    Attributes:
        look: `look(entries, own)` is the generator; `entries` is the size of each expert's whole model, `own` is a
            list with each expert's `own`.
        informed: `informed(found)` is the part that knows what was found.
        own: numbers of the part that may differ by expert, for `look`.
    """

    look: Callable[[int, Sequence[Any]], Look]
    informed: Callable[[Found], Any]
    own: Any = None


def xp_of(*values: Any) -> Any:
    """`jax.numpy` if some are traced, else `numpy`, which counts in 64 bits."""
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)) else np


def looked(part: Part, each: Sequence[Part], entries: int) -> Generator[Measure, Any, Found]:
    """The look of a part, given the part with every expert's own numbers."""
    survey = part.survey
    assert survey is not None
    found = yield from survey.look(entries, [one.survey.own for one in each])  # type: ignore[union-attr]
    return found if isinstance(found, Found) else Found(found)


# --- looks of chains ----------------------------------------------------------------------------------------------

Fronts = Sequence[tuple[Any, ...]]  # of every expert the parts that stand before the one that looks


def look_in_turn(entries: int, own: Sequence[tuple[Any, ...]]) -> Generator[Measure, Any, Found]:
    """The looks of a chain's parts, one after the other: each sees what those before it, informed, let through.

    Args:
        own: of every expert the parts of the chain.

    Returns:
        `Found({part: its model}, {place: {part: its tensor}})`.
    """
    each = _shared(list, own)
    model: dict[int, Any] = {}
    tensor: dict[Any, dict[int, Any]] = {}
    for number, part in enumerate(own[0]):
        if part.survey is None:
            continue
        fronts = _shared(lambda parts, number=number: tuple(parts[:number]), each)
        found = yield from _through(fronts, looked(part, [parts[number] for parts in own], entries))
        model[number] = found.model
        for place, value in (found.tensor or {}).items():
            tensor.setdefault(place, {})[number] = value
        for parts in {id(parts): parts for parts in each}.values():
            parts[number] = parts[number].survey.informed(Found(found.model))  # by tensor: the merge alone knows
    return Found(model, tensor or None)


def informed_of(parts: tuple[Any, ...], found: Found) -> tuple[Any, ...]:
    """The parts of a chain, those that looked informed by what they found, see `look_in_turn`."""
    tensor = found.tensor or {}
    return tuple(
        part.survey.informed(Found(found.model[number], tensor.get(number))) if part.survey else part
        for number, part in enumerate(parts)
    )


def _through(fronts: Fronts, look: Generator[Measure, Any, Found]) -> Generator[Measure, Any, Found]:
    """The look, at what comes through the parts in front."""
    totals = None
    while True:
        try:
            wanted = look.send(totals)
        except StopIteration as done:
            return done.value
        totals = yield wanted if not fronts[0] else _measured_behind(fronts, wanted)


def _measured_behind(fronts: Fronts, wanted: Measure) -> Measure:
    if wanted.joint:
        return wanted._replace(of=lambda seen: _jointly(fronts, wanted.of, seen))
    each = zip(fronts, wanted.each(len(fronts)), strict=True)
    measures = _shared(lambda pair: _behind(*pair), list(each), lambda pair: (id(pair[0]), id(pair[1])))
    return wanted._replace(of=tuple(measures))


def _behind(front: tuple[Any, ...], measure: Callable[..., Any]) -> Callable[..., Any]:
    def behind(delta: Any, context: Context = NO_CONTEXT) -> Any:
        for part in front:
            if isinstance(part, Method):
                break
            delta = part(delta, context)
        return with_context(measure, (delta,), context)

    return behind


def _jointly(fronts: Fronts, measure: Callable[..., Any], seen: Seen) -> Any:
    """The measure of all experts' deltas behind their fronts, or of the merged delta if a method is among these."""
    from cfmerge.core.chain import chain

    contexts = seen.contexts or (NO_CONTEXT,) * len(seen.deltas)
    chains = _shared(lambda front: chain(*front), fronts)
    experts = zip(chains, seen.deltas, seen.weights, contexts, strict=True)
    if not isinstance(chains[0], Method):
        return measure(seen._replace(deltas=jnp.stack([own(delta, context) for own, delta, _, context in experts])))
    statistic = chains[0].init(seen.base)
    for own, delta, weight, context in experts:
        statistic = own.see(statistic, delta, weight, context)
    return measure(chains[0].solve(statistic)[0], seen)


def _shared(function: Callable[[Any], Any], items: Sequence[Any], key: Callable[[Any], Hashable] = id) -> list[Any]:
    """The function of every item, called once for an item that is there several times: what it makes is compiled."""
    made: dict[Hashable, Any] = {}
    return [made[key(item)] if key(item) in made else made.setdefault(key(item), function(item)) for item in items]
