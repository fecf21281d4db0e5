"""Transforms and a method as one method: `trim(0.2) >> disjoint_mean() >> scale(0.5)`."""

from collections.abc import Callable, Generator, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.call import Call, form_of
from cfmerge.core.joint import Joint, in_joint
from cfmerge.core.part import (
    NO_CONTEXT,
    SCOPES,
    Context,
    Method,
    Needs,
    Part,
    Report,
    Seen,
    Statistic,
    Transform,
    with_context,
)
from cfmerge.core.survey import Found, Measure, Order, Survey, looked
from cfmerge.errors import CfmergeError


class Chained(NamedTuple):
    """The statistic of a chain: its method's, and all that was seen where a transform behind it needs that."""

    inner: Statistic
    base: Array | None
    deltas: tuple[Array, ...]
    weights: tuple[Array, ...]


def chain(*parts: Part) -> Any:
    """Transforms and at most one method as one part; `a >> b` is `chain(a, b)`.

        >>> base = jnp.zeros((4, 3))
        >>> halved = methods.chain(methods.average(), methods.scale(0.5))
        >>> float(cfmerge.merge_tensor(base, [base + 1, base + 3], halved)[0, 0])
        1.0

    The transforms in front of the method are applied to each delta before `update`, those behind it to the merged
    delta. Without a method the chain is a transform.

    Raises:
        CfmergeError: two methods, or a transform on the wrong side.
    """
    return _chain_of(tuple(inner for part in parts for inner in links(part)))


def links(part: Part) -> tuple[Any, ...]:
    """The parts of a chain; a part that is no chain is its only one."""
    return tuple(part.call.arguments["parts"]) if is_chain(part) else (part,)  # type: ignore[union-attr]


def is_chain(part: Part) -> bool:
    """Whether the part was made by `chain`, and not by a factory that gives its chain a name."""
    return part.call is not None and part.call.factory is _chain_of


def _chain_of(parts: tuple[Any, ...]) -> Any:
    at = next((number for number, part in enumerate(parts) if isinstance(part, Method)), len(parts))
    before, after = parts[:at], parts[at + 1 :]
    _check(parts, before, after)
    name = " >> ".join(part.name for part in parts)
    scope = max((part.needs.scope for part in parts), key=SCOPES.index)
    random, ranks = any(part.needs.random for part in parts), parts[0].needs.ranks
    survey, pieces = None, None
    if any(part.survey for part in parts):
        own = [part.survey for part in parts if part.survey]
        rows = all(survey.rows for survey in own)
        survey = Survey(_look_in_turn, lambda found: _chain_of(_informed_of(parts, found)), parts, own[0].within, rows)
    elif any(part.pieces for part in parts) and all(_by_entry(part) for part in parts):
        pieces = partial(_in_pieces, parts)
    call = Call.of(_chain_of, {"parts": parts}, frozenset())
    joint = partial(_in_joint, parts) if all(part.joint for part in parts) else False

    def apply(delta: Array, context: Context = NO_CONTEXT) -> Array:
        for part in before:
            delta = part(delta, context)
        return delta

    if at == len(parts):
        return Transform(
            name, apply, needs=Needs(scope, random=random, ranks=ranks), survey=survey, call=call, pieces=pieces,
            joint=joint,
        )  # fmt: skip
    inner = parts[at]
    seen = any(part.needs.seen for part in after)

    def init(base: Array) -> Chained:
        return Chained(inner.init(base), base if seen else None, (), ())

    def update(statistic: Chained, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Chained:
        own = context._replace(factors=None) if before else context  # those of the delta before it was changed
        known = inner.see(statistic.inner, apply(delta, context), weight, own)
        if not seen:
            return Chained(known, None, (), ())
        return Chained(known, statistic.base, (*statistic.deltas, delta), (*statistic.weights, jnp.asarray(weight)))

    def solve(statistic: Chained) -> tuple[Array, Report]:
        merged, told = inner.solve(statistic.inner)
        for part in after:
            if part.needs.seen:
                weights = jnp.stack(statistic.weights)
                merged = part.apply(merged, Seen(statistic.base, jnp.stack(statistic.deltas), weights))  # type: ignore[arg-type]
            else:
                merged = part(merged)
        return merged, told

    def form(rank: int | None) -> Method | None:
        made = form_of(inner) if rank is None and not seen else None
        return made and _chain_of((*before, made, *after))

    return Method(
        name,
        init,
        update,
        solve,
        needs=inner.needs.but(scope=scope, random=random, ranks=ranks),
        additive=inner.additive and not seen,
        by_rows=inner.by_rows and all(part is inner or part.needs.scope == "entry" for part in parts) and not seen,
        form=form,
        survey=survey,
        notes=inner.notes,
        call=call,
        pieces=pieces,
        joint=joint,
    )


def _in_joint(parts: tuple[Any, ...], joint: Joint) -> Any:
    return _chain_of(tuple(in_joint(part, joint) for part in parts))


def _in_pieces(parts: tuple[Any, ...]) -> Any:
    made = tuple(part.pieces() if part.pieces else part for part in parts)
    return None if any(part.needs.ranks for part in made[1:]) else _chain_of(made)


def _by_entry(part: Part) -> bool:
    """Whether the part takes entries, or can after a look within the tensor."""
    return part.pieces is not None or (part.needs.scope == "entry" and not part.needs.seen)


def _check(parts: tuple[Any, ...], before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    methods = [part.name for part in parts if isinstance(part, Method)]
    if len(methods) > 1:
        raise CfmergeError(f"chain: two methods, {methods[0]} and {methods[1]}; the other parts must be transforms")
    if any(isinstance(part, Method) and part.chooses for part in parts) and len(parts) > 1:
        raise CfmergeError(f"chain: {methods[0]} chooses whole chains for each tensor, and stands alone")
    for part in before:
        if part.needs.seen or part.needs.behind:
            raise CfmergeError(f"chain: {part.name} looks at the merged delta: it must stand behind a method")
        if any(other.needs.factors == "required" for other in parts):
            raise CfmergeError(f"chain: {methods[0]} takes the adapters' factors, not what {part.name} makes")
    for part in after:
        if part.needs.random:
            raise CfmergeError(f"chain: {part.name} is random by expert: it must stand in front of the method")


# --- looks of chains ----------------------------------------------------------------------------------------------

Fronts = Sequence[tuple[Any, ...]]  # for every expert, the parts before the one that looks


def _look_in_turn(entries: int, own: Sequence[tuple[Any, ...]]) -> Generator[Measure | Order, Any, Found]:
    """The looks of a chain's parts, one after the other: each sees what those before it, informed, let through.

    Args:
        own: the parts of the chain, for every expert.

    Returns:
        `Found({part: its model}, {place: {part: its tensor}})`.
    """
    each = _shared(list, own)
    model: dict[int, Any] = {}
    tensor: dict[Any, dict[int, Any]] = {}
    for number, part in enumerate(own[0]):
        if part.survey is None:
            continue
        fronts = _shared(partial(_before, number), each)
        found = yield from _through(fronts, looked(part, [parts[number] for parts in own], entries))
        model[number] = found.model
        for place, value in (found.tensor or {}).items():
            tensor.setdefault(place, {})[number] = value
        for parts in {id(parts): parts for parts in each}.values():
            parts[number] = parts[number].survey.informed(Found(found.model))  # by tensor: the merge alone knows
    return Found(model, tensor or None)


def _before(number: int, parts: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(parts[:number])


def _informed_of(parts: tuple[Any, ...], found: Found) -> tuple[Any, ...]:
    """The parts of a chain, those that looked informed by what they found, see `_look_in_turn`."""
    tensor = found.tensor or {}
    return tuple(
        part.survey.informed(Found(found.model[number], tensor.get(number))) if part.survey else part
        for number, part in enumerate(parts)
    )


def _through(fronts: Fronts, look: Generator[Measure | Order, Any, Found]) -> Generator[Measure | Order, Any, Found]:
    """The look, at what comes through the parts in front."""
    totals = None
    while True:
        try:
            wanted = look.send(totals)
        except StopIteration as done:
            return done.value
        totals = yield wanted if not fronts[0] else _measured_behind(fronts, wanted)


def _measured_behind(fronts: Fronts, wanted: Measure | Order) -> Measure | Order:
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
    contexts = seen.contexts or (NO_CONTEXT,) * len(seen.deltas)
    chains = _shared(lambda front: _chain_of(front), fronts)
    experts = zip(chains, seen.deltas, seen.weights, contexts, strict=True)
    if not isinstance(chains[0], Method):
        return measure(seen._replace(deltas=jnp.stack([own(delta, context) for own, delta, _, context in experts])))
    statistic = chains[0].init(seen.base)
    for own, delta, weight, context in experts:
        statistic = own.see(statistic, delta, weight, context)
    return measure(chains[0].solve(statistic)[0], seen)


def _shared(function: Callable[[Any], Any], items: Sequence[Any], key: Callable[[Any], Hashable] = id) -> list[Any]:
    """The function of every item, called once for each different item, since its results are compiled."""
    made: dict[Hashable, Any] = {}
    return [made[key(item)] if key(item) in made else made.setdefault(key(item), function(item)) for item in items]
