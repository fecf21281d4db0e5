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
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from cfmerge.core.call import Call
from cfmerge.core.part import Composer, Context, Method, Needs, Seen, with_context
from cfmerge.core.random import key_from
from cfmerge.core.several import members
from cfmerge.core.survey import Found, Measure, Order
from cfmerge.engine.compiling import options
from cfmerge.engine.inputs import INPUTS, SETTINGS, SHARED, STACK, Inputs, Settings
from cfmerge.models import from_canonical, to_canonical


class Steps(NamedTuple):
    start: Callable[..., Any]
    step: Callable[..., tuple[Any, Bool[Array, " stack"]]]
    finish: Callable[..., tuple[Array, Any, Bool[Array, " stack"]]]
    together: Callable[..., tuple[Array, Any, Bool[Array, "experts+1 stack"]]]


@functools.lru_cache(maxsize=64)
def compiled(layout: str, compute: str, quick: bool = False, mesh: Mesh | None = None) -> Steps:
    """The steps, jitted; compiled once for every method and shape that they meet. `step` uses up its statistics.

    Args:
        layout: of the stored tensors, see `cfmerge.models`; empty where there is no canonical view.
        compute: `float32` or `float64` (then call under `jax.enable_x64(True)`).
        quick: compile quickly, for little work; see `cfmerge.engine.compiling`.
        mesh: the devices that share the stacks out; none: there is one, or the arrays say themselves where they lie.
    """
    how = options(quick)
    plain = steps(layout, compute) if mesh is None else shared_out(steps(layout, compute), mesh)
    return Steps(
        jax.jit(plain.start, compiler_options=how),
        jax.jit(plain.step, donate_argnums=1, compiler_options=how),
        jax.jit(plain.finish, static_argnums=3, compiler_options=how),
        jax.jit(plain.together, static_argnums=4, compiler_options=how),
    )


def shared_out(plain: Steps, mesh: Mesh) -> Steps:
    """The steps under `shard_map`: each device walks its share of the stack."""
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    start = over(plain.start, in_specs=(SETTINGS, STACK), out_specs=STACK)
    step = over(plain.step, in_specs=(SETTINGS, STACK, STACK, STACK, INPUTS), out_specs=(STACK, STACK))

    def finish(settings: Settings, statistics: Any, base: Array, out: str) -> tuple[Array, Any, Array]:
        own = over(lambda *share: plain.finish(*share, out), in_specs=(SETTINGS, STACK, STACK), out_specs=STACK)
        return own(settings, statistics, base)

    def together(
        settings: Sequence[Settings], base: Array, experts: Sequence[Array], inputs: Sequence[Inputs], out: str
    ) -> tuple[Array, Any, Array]:
        specs = [SETTINGS] * len(settings), STACK, STACK, [INPUTS] * len(inputs)
        flags = PartitionSpec(None, SHARED)
        own = over(lambda *share: plain.together(*share, out), in_specs=specs, out_specs=(STACK, STACK, flags))
        return own(settings, base, experts, inputs)

    return Steps(start, step, finish, together)


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
        return _vmap if self.entries and not self.apart else one_after_the_other

    def canonical(self, stack: Array) -> Array:
        """(stack, *stored) to (stack * batch, out, in), or as stored where there is no such view."""
        stack = stack.astype(self.compute)
        return stack if self.entries or not self.layout else to_canonical(stack, "b" + self.layout)

    def stored(self, delta: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `canonical`."""
        return from_canonical(delta, "b" + self.layout, shape) if self.layout and not self.entries else delta

    def context(self, inputs: Inputs, own: "Own", stored: tuple[int, ...]) -> Context:
        """The context of one tensor of an expert's stack."""
        digest, moment, start, _, rank = own
        key = None if digest is None else key_from(inputs.seed, digest)
        plain = Context(key, inputs.number, moment, start, rank=rank)
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
        start = jnp.broadcast_to(jnp.asarray(inputs.start), weight.shape)
        rank = None if inputs.rank is None else jnp.asarray(inputs.rank, self.compute)
        return weight, Own(inputs.digest, moment, start, minus, rank)


class Own(NamedTuple):
    """An expert's inputs of one tensor; of a stack each with a first axis more."""

    digest: Any
    moment: Any
    start: Any
    minus: Any
    rank: Any

    def delta(self, expert: Array, base: Array) -> Array:
        """The expert less the base; or the delta that came instead of an expert."""
        return expert - (base if self.minus is None else self.minus * base)


def made(settings: Settings, call: Call, tensor: Any, compute: str) -> Method:
    """The method of one tensor, whose numbers are traced, informed by what its survey has found."""
    method = jax.tree.map(lambda value: jnp.asarray(value, compute), call).part()
    if method.survey is None:
        return method
    within = method.survey.within == "tensor"
    return method.survey.informed(Found(tensor) if within else Found(settings.model, tensor))


def steps(layout: str, compute: str, apart: bool = False) -> Steps:
    """The steps, not jitted; for `apart` see `Views`."""

    def views(settings: Settings) -> Views:
        return Views(layout, compute, settings.method.needs, apart)

    def start(settings: Settings, base: Array) -> Any:
        def one(call: Call, tensor: Any, base: Array) -> Any:
            return made(settings, call, tensor, compute).init(base)

        view = views(settings)
        return view.over(one, settings.call, settings.tensor, view.canonical(base))

    def step(settings: Settings, statistics: Any, base: Array, expert: Array, inputs: Inputs) -> tuple[Any, Array]:
        def one(call: Call, tensor: Any, statistic: Any, base: Array, expert: Array, given: Any) -> Any:
            weight, own = given
            context = view.context(inputs, own, stored)
            return made(settings, call, tensor, compute).see(statistic, own.delta(expert, base), weight, context)

        view, stored = views(settings), base.shape[1:]
        pair = view.canonical(base), view.canonical(expert)
        seen = view.over(one, settings.call, settings.tensor, statistics, *pair, view.given(inputs))
        return seen, finite(expert)

    def finish(settings: Settings, statistics: Any, base: Array, out: str) -> tuple[Array, Any, Array]:
        def one(call: Call, tensor: Any, statistic: Any) -> Any:
            return made(settings, call, tensor, compute).solve(statistic)

        merged, reports = views(settings).over(one, settings.call, settings.tensor, statistics)
        return written(settings, merged, reports, base, out)

    def written(settings: Settings, merged: Array, reports: Any, base: Array, out: str) -> tuple[Array, Any, Array]:
        """Base plus delta, as stored: `(stack, *stored)`, or `(stack, results, *stored)` of a sweep.

        Of a composer its parts, `(stack, ...)` each, of tensors that stack layers `(stack, layers, ...)`.
        """

        def stored(delta: Array) -> Array:
            return (base.astype(compute) + views(settings).stored(delta, base.shape)).astype(out)

        results = len(members(settings.method))
        if isinstance(settings.method, Composer):
            result = as_parts(merged, base.shape[0], "b" in layout, out)
        else:
            result = stored(merged) if results == 1 else jax.vmap(stored, in_axes=1, out_axes=1)(merged)
        return result, jax.tree.map(lambda value: value.reshape(base.shape[0], -1), reports), all_finite(result)

    def together(
        settings: Sequence[Settings], base: Array, experts: Sequence[Array], inputs: Sequence[Inputs], out: str
    ) -> tuple[Array, Any, Array]:
        def one(calls: list[Call], tensor: Any, base: Array, experts: list[Array], given: Any) -> Any:
            rules = [made(settings[0], call, tensor, compute) for call in calls]
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
        return result, reports, jnp.concatenate([finite_each(experts), fine[None]])

    return Steps(start, step, finish, together)


def measured(view: Views, wanted: Measure | Order, measure: Callable[..., Any]) -> Callable[..., Any]:
    """`f([base, *experts], [inputs])`: a measure of every tensor in the stack, or their sum.

    `f(..., counts)` sums the tensors that count; each of them may be several matrices.
    """

    def all_of_them(stored: list[Array], inputs: list[Inputs], counts: Array | None = None) -> Any:
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
        if isinstance(wanted, Order) or wanted.by_tensor:
            return view.over(one, *stacks)
        join = JOINS[wanted.total]
        if counts is None or wanted.total == "max":
            return _total(join, one, *stacks)
        return _total(join, _counted(one), jnp.repeat(counts, len(stacks[0][0]) // len(counts)), *stacks)

    return all_of_them


def as_parts(parts: Any, stack: int, layers: bool, out: str) -> Any:
    """The parts of a composer as they are written: floats in the output's dtype; stacked layers have an axis."""

    def one(leaf: Array) -> Array:
        leaf = leaf.astype(out) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        return leaf.reshape(stack, -1, *leaf.shape[1:]) if layers else leaf

    return jax.tree.map(one, parts)


def all_finite(stacks: Any) -> Bool[Array, " stack"]:
    """Which entries of stacks hold neither NaN nor infinity, in any of their arrays."""
    return functools.reduce(jnp.logical_and, map(finite, jax.tree.leaves(stacks)))


def finite(stack: Array) -> Bool[Array, " stack"]:
    """Which tensors of a stack hold neither NaN nor infinity."""
    return jnp.isfinite(stack).all(axis=tuple(range(1, stack.ndim)))


def finite_each(stacks: Sequence[Array]) -> Bool[Array, "stacks stack"]:
    """`finite` of several stacks of one shape: looked at together, and each by itself where that finds something.

    A reduction costs several times a sum of the stacks, and so there is one.
    """
    fine = functools.reduce(jnp.logical_and, map(jnp.isfinite, stacks))
    whole = fine.all(axis=tuple(range(1, fine.ndim)))
    alike = [whole] * len(stacks)  # all are set where it is used, and vary over a mesh as the stacks do
    return lax.cond(whole.all(), lambda: jnp.stack(alike), lambda: jnp.stack([finite(stack) for stack in stacks]))


def one_after_the_other(function: Callable[..., Any], *stacks: Any) -> Any:
    """The function of every tensor of stacks."""

    def one(arguments: Any) -> Any:  # the barriers: compiled alike whether it is looped over or stands alone
        return lax.optimization_barrier(function(*lax.optimization_barrier(arguments)))

    return lax.map(one, stacks)


JOINS = {"sum": jnp.add, "max": jnp.maximum}


def measured_shares(measure: Callable[..., Any], mesh: Mesh, by_tensor: bool) -> Callable[..., Any]:
    """The measure under `shard_map`; totals of the devices' shares, `(devices, ...)`, are joined by the caller."""

    def own(stored: list[Array], inputs: list[Inputs], counts: Array) -> Any:
        found = measure(stored, inputs, counts)
        return found if by_tensor else jax.tree.map(lambda leaf: leaf[None], found)

    def all_of_them(stored: list[Array], inputs: list[Inputs], counts: Array) -> Any:
        specs = STACK, [INPUTS] * len(inputs), STACK
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=STACK, check_vma=False)(stored, inputs, counts)

    return all_of_them


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function where a tensor counts, and zero where it fills a mesh up."""
    return lambda counts, *own: jax.tree.map(lambda leaf: jnp.where(counts, leaf, 0), function(*own))


def _total(join: Callable[..., Any], function: Callable[..., Any], *stacks: Any) -> Any:
    """The sum (or what else joins two) over the stack, one by one: a measure may be larger than its tensor."""
    first, *others = [jax.tree.map(lambda leaf, at=at: leaf[at], stacks) for at in (0, slice(1, None))]
    start = function(*first)
    return lax.scan(lambda total, own: (jax.tree.map(join, total, function(*own)), None), start, others[0])[0]


def _vmap(function: Callable[..., Any], *stacks: Any) -> Any:
    return jax.vmap(function)(*stacks)
