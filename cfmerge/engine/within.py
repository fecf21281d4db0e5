"""Looks within a tensor: what a method must know of a whole tensor before it can merge it in pieces.

The look of a tensor is a generator on the host, whose numbers are known. What it asks for is computed in compiled code,
where the same look is taken again, with traced numbers, up to the same question: so tensors whose methods and findings
differ in numbers share one compilation. Tensors that fill one unit together are looked at together.
"""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cfmerge.core.call import of_expert
from cfmerge.core.part import Needs, Seen
from cfmerge.core.survey import Found, Measure, Order, Ordered, answered, looked, replayed
from cfmerge.engine.checks import check_finite
from cfmerge.engine.compiling import is_quick, options
from cfmerge.engine.inputs import Inputs
from cfmerge.engine.orders import ALL, SMALL, KeysOf, on_host, places_of, sample_of
from cfmerge.engine.passes import UnitSteps, wide
from cfmerge.engine.spread import Spread
from cfmerge.engine.steps import Views, finite
from cfmerge.engine.surveys import Place
from cfmerge.engine.units import Unit
from cfmerge.planning.work import Job

Look = Generator[Any, Any, Found]


def found_within(
    units: Sequence[Unit],
    pass_over: Callable[[Unit, UnitSteps], Any],
    over: Any,
    compute: str,
    alone: Callable[[Unit], Spread],
) -> dict[Place, Any]:
    """`{place: findings about its tensor}` of whole tensors in one unit, or of the pieces of one tensor."""
    jobs = list({segment.job.name: segment.job for unit in units for segment in unit.segments}.values())
    looks = [_look(job) for job in jobs]
    answers: list[list[Any]] = [[] for _ in jobs]
    while True:
        wanted, done = [], []
        for look, given in zip(looks, answers, strict=True):
            try:
                wanted.append(look.send(given[-1] if given else None))
            except StopIteration as end:
                done.append(end.value.model)
        if done:
            by_name = dict(zip((job.name for job in jobs), done, strict=True))
            return {(name, first): by_name[name] for unit in units for name, first in unit.places}
        replies = {job.name: given for job, given in zip(jobs, answers, strict=True)}

        def keys_of(unit: Unit, replies: Mapping[str, Any] = replies) -> Any:
            return pass_over(unit, Asking(unit, replies, compute, alone(unit)))

        if isinstance(wanted[0], Order):
            fresh = _ordered(wanted, units, jobs, keys_of, over, compute)
        else:
            fresh = _totals(wanted, units, jobs, keys_of, over)
        for given, answer in zip(answers, fresh, strict=True):
            given.append(answer)


def _look(job: Job) -> Look:
    method = job.method
    return looked(method, [of_expert(method, t) for t in job.experts], job.parameter.size)


def _totals(
    wanted: Sequence[Measure], units: Sequence[Unit], jobs: Sequence[Job], asked: KeysOf, over: Any
) -> list[Any]:
    """A measure's totals over the rows of every tensor; without a pass where they are known."""
    known = [None if measure.known is None else measure.known() for measure in wanted]
    if not any(one is None for one in known):
        return known
    found: dict[str, Any] = {}
    join = np.maximum if wanted[0].total == "max" else np.add

    def take(unit: Unit, values: Any) -> None:
        for job, span in zip(unit.jobs, unit.spans, strict=True):
            own = jax.tree.map(lambda leaf, span=span: join.reduce(wide(leaf[span])), values)
            found[job.name] = jax.tree.map(join, found[job.name], own) if job.name in found else own

    with np.errstate(invalid="ignore"):  # squares may overflow: the look sees it
        over(units, asked, take)
    return [found[job.name] if one is None else one for one, job in zip(known, jobs, strict=True)]


def _ordered(
    wanted: Sequence[Order], units: Sequence[Unit], jobs: Sequence[Job], keys_of: KeysOf, over: Any, compute: str
) -> list[Ordered]:
    """The order statistics of every tensor."""
    none = np.iinfo(f"uint{8 * np.dtype(compute).itemsize}").max
    sizes = [job.parameter.size for job in jobs]
    trivial = [_trivial(order, size, none) for order, size in zip(wanted, sizes, strict=True)]
    if wanted[0].ties and all(trivial):  # asked for which entries, not for the keys
        return trivial  # type: ignore[return-value]
    if len(units) == 1:
        each = places_of(units[0], keys_of(units[0]))
        return [_selected(order, own, none) for order, (_, own) in zip(wanted, each, strict=True)]
    sample = sample_of(units[0].work, jobs) if sizes[0] > SMALL else None
    keys, ends = on_host(wanted[0], units, sizes[0], keys_of, over, sample)
    return [Ordered(keys, None if ends is None else next(iter(ends.values())))]


def _trivial(order: Order, size: int, none: int) -> Ordered | None:
    """The statistics where all entries are asked for, or none."""
    ranks = np.asarray([[int(rank) for rank in own] for own in order.ranks], np.int64)
    if not ((ranks <= 0) | (ranks >= size)).all():
        return None
    keys, ends = np.where(ranks > 0, 0, none).astype(np.uint64), np.where(ranks > 0, ALL, np.uint32(0))
    return Ordered(keys, ends if order.ties else None)


def _selected(order: Order, keys: Sequence[np.ndarray], none: int) -> Ordered:
    """The statistics of one tensor's keys, which are all there."""

    def one(own: np.ndarray, rank: int) -> tuple[int, int]:
        if rank <= 0 or rank >= own.size:
            return (none, 0) if rank <= 0 else (int(own.min(initial=none)), int(ALL))
        key = np.partition(own, own.size - rank)[own.size - rank]
        if not order.ties:
            return int(key), 0
        wanted = rank - np.count_nonzero(own > key)
        return int(key), int(np.flatnonzero(own == key)[wanted - 1]) + 1

    pairs = [[one(own, int(rank)) for rank in ranks] for own, ranks in zip(keys, order.ranks, strict=True)]
    found = np.asarray(pairs, np.uint64)
    return Ordered(found[..., 0], found[..., 1].astype(np.uint32) if order.ties else None)


# --- the compiled part ----------------------------------------------------------------------------------------------


class Asking:
    """The steps that answer the next question of the looks: `(stack, ...)`, of an `Order` a list of experts' keys."""

    def __init__(self, unit: Unit, replies: Mapping[str, Sequence[Any]], compute: str, spread: Spread) -> None:
        self.unit, self.replies, self.compute, self.spread = unit, replies, compute, spread
        self.experts = unit.experts

    def start(self, base: jax.Array) -> list[tuple[jax.Array, Inputs]]:
        return []

    def update(self, state: Any, base: jax.Array, number: int, expert: jax.Array, inputs: Inputs) -> Any:
        return [*state, (expert, inputs)]

    def finish(self, state: Any, base: jax.Array) -> Any:
        unit = self.unit
        experts, inputs = [list(column) for column in zip(*state, strict=True)]
        calls = [settings.call for settings in unit.settings(unit.methods, None)[1:]]
        replies = by_row(unit, self.replies)
        entries = by_row(unit, {job.name: np.int32(job.parameter.size) for job in unit.jobs})
        asked = _answers(self.compute, unit.job.method.needs, is_quick(unit.work))
        answers, flags = asked(calls, replies, entries, base, experts, inputs)
        for number, own in zip((None, *self.experts), np.asarray(flags), strict=True):
            check_finite(unit, base, number, own)
        return jax.tree.map(np.asarray, answers)


def by_row(unit: Unit, of_tensors: Mapping[str, Any]) -> Any:
    """The values of each row's tensor, stacked."""
    trees = [of_tensors[job.name] for job in unit.jobs]
    return jax.tree.map(lambda *leaves: unit.repeated(np.stack(leaves)), *trees)


@functools.lru_cache(maxsize=64)
def _answers(compute: str, needs: Needs, quick: bool) -> Callable[..., Any]:
    """The answers to the question that looks ask after so many replies, for rows; and which rows are finite."""
    view = Views("", compute, needs)

    def one(inputs: Any, calls: Any, replies: Any, entries: Any, base: Any, experts: Any, given: Any) -> Any:
        parts = [jax.tree.map(lambda value: jnp.asarray(value, compute), call).part() for call in calls]
        wanted = replayed(looked(parts[0], parts, entries), replies)
        weights, own = zip(*given, strict=True)
        deltas = [given_to.delta(expert, base) for given_to, expert in zip(own, experts, strict=True)]
        contexts = tuple(view.context(*each, base.shape) for each in zip(inputs, own, strict=True))
        each = answered(wanted, Seen(base, jnp.stack(deltas), jnp.stack(weights), contexts))
        alike = wanted.joint or isinstance(wanted, Order)
        return each if alike else jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def all_rows(calls: Any, replies: Any, entries: Any, base: Any, experts: Any, inputs: Any) -> Any:
        stacks = [view.canonical(expert) for expert in experts]
        given = [view.given(own) for own in inputs]
        each = calls, replies, entries, view.canonical(base), stacks, given
        rows = lax.map(lambda own: one(inputs, *own), each)
        return rows, jnp.stack([finite(stack) for stack in (base, *experts)])

    return jax.jit(all_rows, compiler_options=options(quick))
