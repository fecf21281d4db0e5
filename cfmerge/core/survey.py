"""Looks at the whole model, or at a whole tensor, before the merge.

A look is a generator: it yields a `Measure`, gets the totals over the whole model back, and returns its findings.

    def look(entries, own):
        energies = yield Measure(lambda delta: jnp.sum(delta**2))        # (experts,)
        return energies / energies.sum()

    Survey(look, informed=lambda found: Method(...))                     # the part that knows `found.model`

An `Order` asks for order statistics, such as the k-th largest of all magnitudes, and gets them exactly.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cfmerge.core.part import Part, Seen, with_context


class Measure(NamedTuple):
    """One pass over the model: a function of its deltas, whose values are summed.

        >>> energy = methods.Measure(lambda delta: jnp.sum(delta**2))
        >>> len(energy.each(experts=3)), float(energy.of(jnp.ones((4, 3))))
        (3, 12.0)

    A look yields it, see `Survey`.

    Attributes:
        of: `of(delta)` or `of(delta, context)` of each expert and tensor: a pytree of arrays. If `joint`, `of(seen)` of
            each tensor; for a transform behind a method `of(merged, seen)`. A tuple holds one for each expert.
        joint: it takes all experts at once.
        by_tensor: the measures are not summed over the model.
        total: "sum", or "max": the totals are the largest of the measures.
        known: of a look within a tensor: `known()` are the totals where they follow from earlier answers, which saves
            the pass, or None. It is called where numbers are known, not in compiled code.

    The totals that come back are sums over all tensors, of measures that are not joint stacked over the experts; if
    `by_tensor` `{place: measures}`, places in order. On the host they have 64 bits; under `jit` they are traced.
    """

    of: Any
    joint: bool = False
    by_tensor: bool = False
    total: Literal["sum", "max"] = "sum"
    known: Callable[[], Any] | None = None

    def each(self, experts: int) -> tuple[Callable[..., Any], ...]:
        """The measure of every expert."""
        return self.of if isinstance(self.of, tuple) else (self.of,) * experts


class Order(NamedTuple):
    """Order statistics of each expert's keys, see `cfmerge.linalg.selection`; a look yields it and gets `Ordered`.

        >>> def larger_half():
        ...     def look(entries, own):
        ...         ordered = yield methods.Order(linalg.magnitude_keys, [(entries // 2,)] * len(own))
        ...         return methods.Found(ordered.keys, ordered.ends)
        ...     def informed(found):
        ...         def keep(delta, context):
        ...             key, end = found.model[context.number, 0], found.tensor[context.number, 0]
        ...             kept = methods.reached(linalg.magnitude_keys(delta), key, end, context.start)
        ...             return jnp.where(kept, delta, 0)
        ...         return methods.Transform("larger_half", keep)
        ...     return methods.Transform("larger_half", lambda delta: delta, survey=methods.Survey(look, informed))
        >>> base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
        >>> expert = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([2.0, -3.0])}
        >>> merged = cfmerge.merge_params(base, [expert], larger_half() >> methods.average())
        >>> merged["a"].tolist(), merged["b"].tolist()  # half of the model, not of each tensor
        ([4.0, 0.0], [0.0, -3.0])

    Attributes:
        of: `of(delta)` or `of(delta, context)` of each expert: keys in the delta's shape. If `joint`, `of(seen)` of
            each tensor: a list of them.
        ranks: for each expert, or for each of the list, its ranks from the largest, from 1; 0 is above all.
        joint: it takes all experts at once.
        ties: the ends are wanted too.
    """

    of: Any
    ranks: Sequence[tuple[Any, ...]]
    joint: bool = False
    ties: bool = True

    @property
    def by_tensor(self) -> bool:
        """Keys are not summed."""
        return True

    def each(self, experts: int) -> tuple[Callable[..., Any], ...]:
        """The keys of every expert."""
        return self.of if isinstance(self.of, tuple) else (self.of,) * experts


class Ordered(NamedTuple):
    """The keys `(T, R)` at the ranks that were asked for, and which of the entries that tie with them belong to these.

    Attributes:
        keys: of rank 0 the largest integer.
        ends: entries of a tensor that tie with the key belong to the ranks up to it if their number in the tensor is
            less than this: `(T, R)`, in a look at the whole model `{place: (T, R)}`. None where they were not wanted.
    """

    keys: Any
    ends: Any = None


def reached(keys: Array, key: Any, end: Any, start: int | Array) -> Array:
    """Which entries are of the rank of a key or above: exactly so many as the rank says, or without `end` all that tie.

        >>> keys = jnp.array([7, 5, 9, 5], jnp.uint32)
        >>> methods.reached(keys, jnp.uint32(5), jnp.uint32(2), start=0).tolist()
        [True, True, True, False]

    Args:
        keys: of a tensor, or of the piece of it that begins with entry number `start`.
        key, end: of one rank, see `Ordered`.
    """
    key = jnp.asarray(key).astype(keys.dtype)
    if end is None:
        return keys >= key
    number = jnp.asarray(start, jnp.uint32) + jnp.arange(keys.size, dtype=jnp.uint32).reshape(keys.shape)
    return (keys > key) | ((keys == key) & (number < jnp.asarray(end).astype(jnp.uint32)))


Look = Generator[Measure | Order, Any, Any]


class Found(NamedTuple):
    """The findings of a look: about the whole model, and about the tensor (or piece of one) at hand.

    A look returns a `Found` whose `tensor` is `{place: ...}`, or anything else, which is the `model` of one.
    """

    model: Any
    tensor: Any = None


class Survey(NamedTuple):
    """A part's look at the whole model before the merge, and the part that knows the findings.

        >>> def unit_norm():
        ...     def look(entries, own):
        ...         energies = yield methods.Measure(lambda delta: jnp.sum(delta**2))  # (experts,)
        ...         return energies**-0.5
        ...     def informed(found):
        ...         scales = jnp.asarray(found.model, jnp.float32)
        ...         return methods.Transform("unit_norm", lambda delta, context: delta * scales[context.number])
        ...     return methods.Transform("unit_norm", lambda delta: delta, survey=methods.Survey(look, informed))
        >>> base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
        >>> experts = [jax.tree.map(lambda leaf: leaf + step, base) for step in (1.0, 3.0)]
        >>> merged = cfmerge.merge_params(base, experts, unit_norm() >> methods.average())
        >>> float(merged["a"][0])  # every expert's whole delta has length 1
        0.5

    Attributes:
        look: `look(entries, own)` is the generator; `entries` is the size of each expert's whole model, `own` is a
            list with each expert's `own`.
        informed: `informed(found)` is the part that knows the findings.
        own: numbers of the part that may differ by expert, for `look`.
        within: "model", or "tensor": the look is at each tensor by itself, see `Part.pieces`.
        rows: zeros make no difference to it, and it measures nothing by tensor: tensors may be cut into rows that are
            filled up with zeros, so that all compile once.

    A look within a tensor is taken again inside compiled code, where all numbers are traced: it must ask the same
    whatever they are. There `entries` are the tensor's, and `Ordered.ends` is an array.
    """

    look: Callable[[int, Sequence[Any]], Look]
    informed: Callable[[Found], Any]
    own: Any = None
    within: Literal["model", "tensor"] = "model"
    rows: bool = False


def xp_of(*values: Any) -> Any:
    """`jax.numpy` if some are traced, else `numpy`, which counts in 64 bits."""
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)) else np


P = TypeVar("P", bound=Part)


def with_pieces(part: P, survey: Survey) -> P:
    """The part with its form of scope "entry" after a look within each tensor: see `Part.pieces`."""
    by_entry = dataclasses.replace(part, needs=part.needs.but(scope="entry"), survey=survey)
    return dataclasses.replace(part, pieces=lambda: by_entry)


def looked(part: Part, each: Sequence[Part], entries: Any) -> Generator[Measure | Order, Any, Found]:
    """The look of a part, given the part with every expert's own numbers."""
    survey = part.survey
    assert survey is not None
    found = yield from survey.look(entries, [one.survey.own for one in each])  # type: ignore[union-attr]
    return found if isinstance(found, Found) else Found(found)


def replayed(look: Look, replies: Sequence[Any]) -> Measure | Order:
    """The question that a look asks after these replies; raises `StopIteration` with its findings if it asks none."""
    wanted = next(look)
    for reply in replies:
        wanted = look.send(reply)
    return wanted


def answered(wanted: Measure | Order, seen: Seen) -> Any:
    """The measures of one tensor: of all experts at once, or a list of each expert's."""
    if wanted.joint:
        return wanted.of(seen)
    each = zip(wanted.each(len(seen.deltas)), seen.deltas, seen.contexts, strict=True)
    return [with_context(measure, (delta,), context) for measure, delta, context in each]
