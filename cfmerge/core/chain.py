"""Transforms and a method as one method: `trim(0.2) >> disjoint_mean() >> scale(0.5)`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.call import Call, form_of
from cfmerge.core.part import NO_CONTEXT, SCOPES, Context, Method, Needs, Part, Report, Seen, Statistic, Transform
from cfmerge.core.survey import Survey, informed_of, look_in_turn
from cfmerge.errors import CfmergeError


class Chained(NamedTuple):
    """The statistic of a chain: its method's, and all that was seen where a transform behind it needs that."""

    inner: Statistic
    base: Array | None
    deltas: tuple[Array, ...]
    weights: tuple[Array, ...]


def chain(*parts: Part) -> Any:
    """Transforms and at most one method as one: `chain(trim(.2), disjoint_mean(), scale(.5))`.

    The transforms in front of the method are applied to each delta before `update`, those behind it to the merged
    delta. Without a method the chain is a transform. `a >> b` is `chain(a, b)`.

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
    random = any(part.needs.random for part in parts)
    survey = None
    if any(part.survey for part in parts):
        survey = Survey(look_in_turn, lambda found: _chain_of(informed_of(parts, found)), own=parts)
    call = Call.of(_chain_of, {"parts": parts}, frozenset())

    def apply(delta: Array, context: Context = NO_CONTEXT) -> Array:
        for part in before:
            delta = part(delta, context)
        return delta

    if at == len(parts):
        return Transform(name, apply, needs=Needs(scope, random=random), survey=survey, call=call)
    inner = parts[at]
    seen = any(part.needs.seen for part in after)

    def init(base: Array) -> Chained:
        return Chained(inner.init(base), base if seen else None, (), ())

    def update(statistic: Chained, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Chained:
        known = inner.see(statistic.inner, apply(delta, context), weight, context)
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
        name, init, update, solve, needs=inner.needs.but(scope=scope, random=random),
        additive=inner.additive and not seen, form=form, survey=survey, notes=inner.notes, call=call,
    )  # fmt: skip


def _check(parts: tuple[Any, ...], before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    methods = [part.name for part in parts if isinstance(part, Method)]
    if len(methods) > 1:
        raise CfmergeError(f"chain: two methods, {methods[0]} and {methods[1]}; the other parts must be transforms")
    for part in before:
        if part.needs.seen:
            raise CfmergeError(f"chain: {part.name} looks at the merged delta: it must stand behind a method")
    for part in after:
        if part.needs.random:
            raise CfmergeError(f"chain: {part.name} is random by expert: it must stand in front of the method")
