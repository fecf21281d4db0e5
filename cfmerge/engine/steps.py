"""The compiled steps of a merge, over a stack of stored tensors of one shape, method and layout.

    statistics = start(settings, base)                                   base (stack, *stored shape), any float dtype
    statistics, finite = step(settings, statistics, base, expert, inputs)
    merged, reports, finite = finish(settings, statistics, base, dtype)
    merged, reports, finite = together(settings, base, experts, inputs, dtype)     all of it, for all experts at once

Canonical views are taken inside, deltas are formed in the computing dtype. The stack is walked by `lax.map`, one
compiled body for all tensors: so a result does not depend on what it is stacked with. A method's numbers are
arguments of the steps, so that methods which differ in them alone, by tensor or expert, share the compiled code.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from cfmerge.methods import Context, Found, Method, Seen
from cfmerge.methods._base import with_context
from cfmerge.methods._random import key_from
from cfmerge.methods._registry import numbers, structure, with_numbers
from cfmerge.models import from_canonical, to_canonical


class Settings(NamedTuple):
    """What the method is told of the tensors in the stack: its numbers `(stack,)` each, and what surveys found."""

    numbers: list[Any]
    model: Any = None
    tensor: Any = None  # (stack, ...)


class Inputs(NamedTuple):
    """What comes with an expert's stack: weights `(stack,)`, its number, and what its context needs."""

    weight: Any
    number: Any = 0
    digest: Any = None  # (stack, 2), with the seed behind each: what keys are made of
    seed: Any = 0
    moment: Any = None  # (stack, ...)
    start: Any = 0


class Steps(NamedTuple):
    start: Callable[..., Any]
    step: Callable[..., tuple[Any, Bool[Array, " stack"]]]
    finish: Callable[..., tuple[Array, dict[str, Array], Bool[Array, " stack"]]]
    together: Callable[..., tuple[Array, dict[str, Array], Bool[Array, "experts+1 stack"]]]
    measured: Callable[..., Callable[..., Any]]


class Like:
    """A method as a key: equal to those that differ in numbers only."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.key = structure(method)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Like) and self.key == other.key


def compiled(method: Method, layout: str, compute: str) -> Steps:
    """The steps, jitted; compiled once for every shape that they meet. `step` uses up its statistics.

    Args:
        layout: of the stored tensors, see `cfmerge.models`; empty where there is no canonical view.
        compute: `float32` or `float64` (then call under `jax.enable_x64(True)`).
    """
    return _compiled(Like(method), layout, compute)


@functools.lru_cache(maxsize=1024)
def _compiled(like: Like, layout: str, compute: str) -> Steps:
    plain = steps(like.method, layout, compute)
    return Steps(
        jax.jit(plain.start),
        jax.jit(plain.step, donate_argnums=1),
        jax.jit(plain.finish, static_argnums=3),
        jax.jit(plain.together, static_argnums=4),
        plain.measured,
    )


def settings_of(methods: Sequence[Method], per_tensor: int = 1, found: Found | None = None) -> Settings:
    """The settings of a stack whose tensors have these methods, of one structure, and `per_tensor` matrices each."""
    columns = zip(*(numbers(method) for method in methods), strict=True)
    stacked = [None if column[0] is None else _column(column, per_tensor) for column in columns]
    return Settings(stacked, found.model if found else None, found.tensor if found else None)


def _column(values: Sequence[Any], per_tensor: int) -> Any:
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.repeat(jnp.stack([jnp.asarray(value) for value in values]), per_tensor)
    return np.repeat(np.asarray(values, np.float64), per_tensor)


def steps(method: Method, layout: str, compute: str) -> Steps:
    """The steps, not jitted. The method is a pattern: its numbers come with the settings."""
    entries = method.scope == "entry"
    dtype = jnp.dtype(compute)
    over = _vmap if entries else _map

    def canonical(stack: Array) -> Array:
        """(stack, *stored) to (stack * batch, out, in), or as stored where there is no such view."""
        stack = stack.astype(dtype)
        return stack if entries or not layout else to_canonical(stack, "b" + layout)

    def finite(stack: Array) -> Bool[Array, " stack"]:
        return jnp.isfinite(stack).all(axis=tuple(range(1, stack.ndim)))

    def made(settings: Settings, own: list[Any], tensor: Any) -> Method:
        cast = [None if value is None else jnp.asarray(value, dtype) for value in own]
        informed = with_numbers(method, cast)
        return informed.informed(Found(settings.model, tensor)) if informed.informed else informed

    def moments(inputs: Inputs) -> Any:
        if inputs.moment is None:
            return None
        if method.moments == "fisher":
            return canonical(inputs.moment)
        return inputs.moment.astype(dtype)

    def context(inputs: Inputs, digest: Any, moment: Any, stored: tuple[int, ...]) -> Context:
        key = None if digest is None else key_from(inputs.seed, digest)
        if entries or not layout or "b" in layout:
            return Context(key, inputs.number, moment, inputs.start)
        return Context(key, inputs.number, moment, inputs.start, stored, lambda array: to_canonical(array, layout))

    def start(settings: Settings, base: Array) -> Any:
        def one(own: list[Any], tensor: Any, base: Array) -> Any:
            return made(settings, own, tensor).init(base)

        return over(one, settings.numbers, settings.tensor, canonical(base))

    def step(settings: Settings, statistics: Any, base: Array, expert: Array, inputs: Inputs) -> tuple[Any, Array]:
        def one(
            own: list[Any], tensor: Any, statistic: Any, base: Array, expert: Array, weight: Array, digest: Any,
            moment: Any,
        ) -> Any:  # fmt: skip
            rule = made(settings, own, tensor)
            return rule.see(statistic, expert - base, weight, context(inputs, digest, moment, stored))

        stored = base.shape[1:]
        weight = jnp.asarray(inputs.weight, dtype)
        seen = over(
            one, settings.numbers, settings.tensor, statistics, canonical(base), canonical(expert), weight,
            inputs.digest, moments(inputs),
        )  # fmt: skip
        return seen, finite(expert)

    def finish(settings: Settings, statistics: Any, base: Array, out: str) -> tuple[Array, dict[str, Array], Array]:
        def one(own: list[Any], tensor: Any, statistic: Any) -> Any:
            return made(settings, own, tensor).solve_with_report(statistic)

        merged, reports = over(one, settings.numbers, settings.tensor, statistics)
        return written(merged, reports, base, out)

    def written(merged: Array, reports: dict[str, Array], base: Array, out: str) -> tuple[Array, Any, Array]:
        """Base plus delta, as stored: `(stack, *stored)`, or `(stack, results, *stored)` of a sweep."""
        reports = {name: value.reshape(base.shape[0], -1) for name, value in reports.items()}

        def stored(delta: Array) -> Array:
            if layout and not entries:
                delta = from_canonical(delta, "b" + layout, base.shape)
            return (base.astype(dtype) + delta).astype(out)

        result = stored(merged) if method.results == 1 else jax.vmap(stored, in_axes=1, out_axes=1)(merged)
        return result, reports, finite(result)

    def together(
        settings: Sequence[Settings], base: Array, experts: Sequence[Array], inputs: Sequence[Inputs], out: str
    ) -> tuple[Array, dict[str, Array], Array]:
        def one(
            own: list[list[Any]], tensor: Any, base: Array, experts: list[Array], weights: list[Array],
            digests: list[Any], moments: list[Any],
        ) -> Any:  # fmt: skip
            rules = [made(settings[0], values, tensor) for values in own]
            statistic = rules[0].init(base)
            for t, rule in enumerate(rules):
                given = context(inputs[t], digests[t], moments[t], stored)
                statistic = rule.see(statistic, experts[t] - base, weights[t], given)
            return rules[0].solve_with_report(statistic)

        stored = base.shape[1:]
        merged, reports = over(
            one, [s.numbers for s in settings], settings[0].tensor, canonical(base), [canonical(e) for e in experts],
            [jnp.asarray(i.weight, dtype) for i in inputs], [i.digest for i in inputs], [moments(i) for i in inputs],
        )  # fmt: skip
        result, reports, fine = written(merged, reports, base, out)
        return result, reports, jnp.stack([*(finite(expert) for expert in experts), fine])

    def measured(measure: Callable[..., Any], joint: bool, summed: bool) -> Callable[..., Any]:
        """`f([base, *experts], [inputs])`: a survey's measure of every tensor in the stack, or their sum."""

        def one(
            views: list[Array], weights: list[Array], digests: list[Any], moments: list[Any], inputs: Any, shape: Any
        ) -> Any:  # fmt: skip
            base, *experts = views
            deltas = [expert - base for expert in experts]
            contexts = tuple(context(*given, shape) for given in zip(inputs, digests, moments, strict=True))
            if joint:
                return measure(Seen(base, jnp.stack(deltas), jnp.stack(weights), contexts))
            return with_context(measure, (deltas[0],), contexts[0])

        def all_of_them(stored: list[Array], inputs: list[Inputs]) -> Any:
            function = functools.partial(one, inputs=inputs, shape=stored[0].shape[1:])
            stacks = (
                [canonical(view) for view in stored], [jnp.asarray(i.weight, dtype) for i in inputs],
                [i.digest for i in inputs], [moments(i) for i in inputs],
            )  # fmt: skip
            return _sum(function, *stacks) if summed else over(function, *stacks)

        return all_of_them

    return Steps(start, step, finish, together, measured)


def _map(function: Callable[..., Any], *stacks: Any) -> Any:
    def one(arguments: Any) -> Any:  # the barriers: compiled alike whether it is looped over or stands alone
        return lax.optimization_barrier(function(*lax.optimization_barrier(arguments)))

    return lax.map(one, stacks)


def _sum(function: Callable[..., Any], *stacks: Any) -> Any:
    """The sum over the stack, one by one: a measure may be larger than its tensor."""
    first, *others = [jax.tree.map(lambda leaf, at=at: leaf[at], stacks) for at in (0, slice(1, None))]
    start = function(*first)
    return lax.scan(lambda total, own: (jax.tree.map(jnp.add, total, function(*own)), None), start, others[0])[0]


def _vmap(function: Callable[..., Any], *stacks: Any) -> Any:
    return jax.vmap(function)(*stacks)
