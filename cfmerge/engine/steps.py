"""The compiled steps of a merge, over a stack of stored tensors of one shape, method and layout.

    statistics = start(settings, base)                                   base (stack, *stored shape), any float dtype
    statistics, finite = step(settings, statistics, base, expert, inputs)
    merged, reports, finite = finish(settings, statistics, base, dtype)
    merged, reports, finite = together(settings, base, experts, inputs, dtype)     all of it, for all experts at once

Canonical views are taken inside, deltas are formed in the computing dtype. The stack is walked by `lax.map`, one
compiled body for all tensors: so a result does not depend on its stack. The method comes with the settings as a
call, whose numbers are leaves: methods that differ in them alone, by tensor or expert, share the compiled code.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from cfmerge.core.call import Call, call_of
from cfmerge.core.part import Context, Method, Needs, Seen, with_context
from cfmerge.core.random import key_from
from cfmerge.core.several import members
from cfmerge.core.survey import Found, Measure
from cfmerge.models import from_canonical, to_canonical


class Settings(NamedTuple):
    """The method of the stack, a call whose numbers are `(stack,)` each, and what surveys found for it."""

    call: Call
    model: Any = None
    tensor: Any = None  # (stack, ...)

    @property
    def method(self) -> Method:
        """The method, with the numbers of the first tensor."""
        return jax.tree.map(lambda leaf: leaf[0], self.call).part()


class Inputs(NamedTuple):
    """All that comes with an expert's stack: weights `(stack,)`, its number, and what its context needs."""

    weight: Any
    number: Any = 0
    digest: Any = None  # (stack, 2), with the seed behind each: what keys are made of
    seed: Any = 0
    moment: Any = None  # (stack, ...)
    start: Any = 0  # (stack,), the first entry of each in its tensor
    minus: Any = None  # (stack,), 0 where a delta comes instead of an expert's tensor, else 1; none: 1 for all


class Steps(NamedTuple):
    start: Callable[..., Any]
    step: Callable[..., tuple[Any, Bool[Array, " stack"]]]
    finish: Callable[..., tuple[Array, Any, Bool[Array, " stack"]]]
    together: Callable[..., tuple[Array, Any, Bool[Array, "experts+1 stack"]]]


@functools.lru_cache(maxsize=64)
def compiled(layout: str, compute: str) -> Steps:
    """The steps, jitted; compiled once for every method and shape that they meet. `step` uses up its statistics.

    Args:
        layout: of the stored tensors, see `cfmerge.models`; empty where there is no canonical view.
        compute: `float32` or `float64` (then call under `jax.enable_x64(True)`).
    """
    plain = steps(layout, compute)
    return Steps(
        jax.jit(plain.start),
        jax.jit(plain.step, donate_argnums=1),
        jax.jit(plain.finish, static_argnums=3),
        jax.jit(plain.together, static_argnums=4),
    )


def settings_of(methods: Sequence[Method], repeats: Any = 1, found: Found | None = None) -> Settings:
    """The settings of a stack whose tensors have these methods, of one structure.

    Args:
        repeats: how many matrices, or rows, each tensor has in the stack; one number or one for each.
    """
    call = jax.tree.map(lambda *values: _column(values, repeats), *(call_of(method) for method in methods))
    return Settings(call, found.model if found else None, found.tensor if found else None)


def _column(values: Sequence[Any], repeats: Any) -> Any:
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.repeat(jnp.stack([jnp.asarray(value) for value in values]), np.asarray(repeats))
    return np.repeat(np.asarray(values, np.float64), repeats)


class Views(NamedTuple):
    """How stored tensors are looked at by a method with these needs.

    Attributes:
        apart: tensors are taken one after the other, whatever the method: under a transformation of JAX a stack may
            be a whole model, sharded over devices, whose draws and masks would be made on each of them.
    """

    layout: str
    compute: str
    needs: Needs
    apart: bool = False

    @property
    def entries(self) -> bool:
        return self.needs.scope == "entry"

    @property
    def over(self) -> Callable[..., Any]:
        """Calls a function for every tensor of stacks."""
        return _vmap if self.entries and not self.apart else _map

    def canonical(self, stack: Array) -> Array:
        """(stack, *stored) to (stack * batch, out, in), or as stored where there is no such view."""
        stack = stack.astype(self.compute)
        return stack if self.entries or not self.layout else to_canonical(stack, "b" + self.layout)

    def stored(self, delta: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `canonical`."""
        return from_canonical(delta, "b" + self.layout, shape) if self.layout and not self.entries else delta

    def context(self, inputs: Inputs, own: "Own", stored: tuple[int, ...]) -> Context:
        """The context of one tensor of an expert's stack."""
        digest, moment, start, _ = own
        key = None if digest is None else key_from(inputs.seed, digest)
        plain = Context(key, inputs.number, moment, start)
        if self.entries or not self.layout or "b" in self.layout:
            return plain
        return plain._replace(stored=stored, view=lambda array: to_canonical(array, self.layout))

    def given(self, inputs: Inputs) -> tuple[Any, "Own"]:
        """The weights of an expert's stack, and all else that its tensors have each of their own."""
        moment = inputs.moment
        if moment is not None:
            moment = self.canonical(moment) if self.needs.moments == "fisher" else moment.astype(self.compute)
        weight = jnp.asarray(inputs.weight, self.compute)
        minus = None if inputs.minus is None else jnp.asarray(inputs.minus, self.compute)
        return weight, Own(inputs.digest, moment, jnp.broadcast_to(jnp.asarray(inputs.start), weight.shape), minus)


class Own(NamedTuple):
    """An expert's inputs of one tensor; of a stack each with a first axis more."""

    digest: Any
    moment: Any
    start: Any
    minus: Any

    def delta(self, expert: Array, base: Array) -> Array:
        """The expert less the base; or the delta that came instead of an expert."""
        return expert - (base if self.minus is None else self.minus * base)


def steps(layout: str, compute: str, apart: bool = False) -> Steps:
    """The steps, not jitted; for `apart` see `Views`."""

    def views(settings: Settings) -> Views:
        return Views(layout, compute, settings.method.needs, apart)

    def made(settings: Settings, call: Call, tensor: Any) -> Method:
        method = jax.tree.map(lambda value: jnp.asarray(value, compute), call).part()
        return method.survey.informed(Found(settings.model, tensor)) if method.survey else method

    def start(settings: Settings, base: Array) -> Any:
        def one(call: Call, tensor: Any, base: Array) -> Any:
            return made(settings, call, tensor).init(base)

        view = views(settings)
        return view.over(one, settings.call, settings.tensor, view.canonical(base))

    def step(settings: Settings, statistics: Any, base: Array, expert: Array, inputs: Inputs) -> tuple[Any, Array]:
        def one(call: Call, tensor: Any, statistic: Any, base: Array, expert: Array, given: Any) -> Any:
            weight, own = given
            context = view.context(inputs, own, stored)
            return made(settings, call, tensor).see(statistic, own.delta(expert, base), weight, context)

        view, stored = views(settings), base.shape[1:]
        pair = view.canonical(base), view.canonical(expert)
        seen = view.over(one, settings.call, settings.tensor, statistics, *pair, view.given(inputs))
        return seen, finite(expert)

    def finish(settings: Settings, statistics: Any, base: Array, out: str) -> tuple[Array, Any, Array]:
        def one(call: Call, tensor: Any, statistic: Any) -> Any:
            return made(settings, call, tensor).solve(statistic)

        merged, reports = views(settings).over(one, settings.call, settings.tensor, statistics)
        return written(settings, merged, reports, base, out)

    def written(settings: Settings, merged: Array, reports: Any, base: Array, out: str) -> tuple[Array, Any, Array]:
        """Base plus delta, as stored: `(stack, *stored)`, or `(stack, results, *stored)` of a sweep."""

        def stored(delta: Array) -> Array:
            return (base.astype(compute) + views(settings).stored(delta, base.shape)).astype(out)

        results = len(members(settings.method))
        result = stored(merged) if results == 1 else jax.vmap(stored, in_axes=1, out_axes=1)(merged)
        return result, jax.tree.map(lambda value: value.reshape(base.shape[0], -1), reports), finite(result)

    def together(
        settings: Sequence[Settings], base: Array, experts: Sequence[Array], inputs: Sequence[Inputs], out: str
    ) -> tuple[Array, Any, Array]:
        def one(calls: list[Call], tensor: Any, base: Array, experts: list[Array], given: Any) -> Any:
            rules = [made(settings[0], call, tensor) for call in calls]
            statistic = rules[0].init(base)
            for t, (weight, own) in enumerate(given):
                context = view.context(inputs[t], own, stored)
                statistic = rules[t].see(statistic, own.delta(experts[t], base), weight, context)
            return rules[0].solve(statistic)

        view, stored = views(settings[0]), base.shape[1:]
        merged, reports = view.over(
            one,
            [s.call for s in settings],
            settings[0].tensor,
            view.canonical(base),
            [view.canonical(expert) for expert in experts],
            [view.given(i) for i in inputs],
        )
        result, reports, fine = written(settings[0], merged, reports, base, out)
        return result, reports, jnp.stack([*(finite(expert) for expert in experts), fine])

    return Steps(start, step, finish, together)


def measured(view: Views, wanted: Measure, measure: Callable[..., Any]) -> Callable[..., Any]:
    """`f([base, *experts], [inputs])`: a measure of every tensor in the stack, or their sum."""

    def all_of_them(stored: list[Array], inputs: list[Inputs]) -> Any:
        def one(views: list[Array], given: list[Any]) -> Any:
            base, *experts = views
            weights, own = zip(*given, strict=True)
            deltas = [one.delta(expert, base) for one, expert in zip(own, experts, strict=True)]
            shape = stored[0].shape[1:]
            contexts = tuple(view.context(*each, shape) for each in zip(inputs, own, strict=True))
            if wanted.joint:
                return measure(Seen(base, jnp.stack(deltas), jnp.stack(weights), contexts))
            return with_context(measure, (deltas[0],), contexts[0])

        stacks = [view.canonical(array) for array in stored], [view.given(i) for i in inputs]
        return view.over(one, *stacks) if wanted.by_tensor else _sum(one, *stacks)

    return all_of_them


def finite(stack: Array) -> Bool[Array, " stack"]:
    """Which tensors of a stack hold neither NaN nor infinity."""
    return jnp.isfinite(stack).all(axis=tuple(range(1, stack.ndim)))


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
