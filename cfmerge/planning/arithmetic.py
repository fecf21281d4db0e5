"""The arithmetic of a method on one tensor: found out by tracing its functions, for any method."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfmerge import linalg
from cfmerge.core.call import Call, call_of, of_expert
from cfmerge.core.joint import cores_of, merged_factors
from cfmerge.core.part import Composer, Context, Method, Needs, Seen
from cfmerge.core.several import members
from cfmerge.core.survey import Found, Order, Ordered, answered, looked, replayed
from cfmerge.planning.tally import Tally, tally
from cfmerge.planning.work import Job

PLACE, COMPUTE, KEY = ("", 0), "float32", 4


class Pass(NamedTuple):
    """One look at all experts; `keys`: how many of its numbers the host selects among."""

    tally: Tally
    keys: int


class Arithmetic(NamedTuple):
    """The arithmetic of a method on one tensor and all its experts.

    Attributes:
        looks: the passes before the merge.
        merge: all steps together; its memory is the most that one of them needs, its equations are all programs'.
        programs: how many programs these are.
        statistic: bytes of the statistic when all experts were seen.
    """

    looks: tuple[Pass, ...]
    merge: Tally
    programs: int
    statistic: int


def arithmetic(method: Method, shape: tuple[int, ...], experts: int, stored: str = "float32") -> Arithmetic:
    """The arithmetic of a method on tensors stored in that dtype, computed in float32.

    That of a sweep is counted method by method where some look at the model first.
    """
    own = members(method)
    if len(own) > 1 and any(one.survey for one in own):
        each = [arithmetic(one, shape, experts, stored) for one in own]
        merge = sum((one.merge for one in each), Tally())
        memory = sum(one.statistic for one in each) + max(one.merge.memory for one in each)
        return Arithmetic(
            tuple(look for one in each for look in one.looks), merge._replace(memory=memory),
            sum(one.programs for one in each), sum(one.statistic for one in each),
        )  # fmt: skip
    values, structure = jax.tree.flatten(call_of(of_expert(method, 0)))
    return _arithmetic(structure, len(values), shape, experts, stored)


class _Traced:
    """The steps of a method, as functions of shapes: `start`, `step`, `finish`, or `together` all of them."""

    def __init__(self, structure: Any, numbers: int, shape: tuple[int, ...], experts: int, stored: str) -> None:
        self.structure, self.experts, self.entries, self.stored = structure, experts, math.prod(shape), stored
        self.values = [jax.ShapeDtypeStruct((), COMPUTE)] * numbers
        self.array = jax.ShapeDtypeStruct(shape, stored)
        needs, self.additive, self.survey = self._asked()
        square = jax.ShapeDtypeStruct((shape[-1],) * 2 if shape else (), COMPUTE)
        self.moment = square if needs.moments == "input_gram" else self.array
        looked: tuple[Any, Found] = _looks(self) if self.survey else ((), Found(None))
        self.looks, self.found = looked

    def made(self, values: Any) -> Method:
        call: Call = jax.tree.unflatten(self.structure, values)
        return call.part()

    def _asked(self) -> tuple[Needs, bool, bool]:
        """What the method asks for, whatever its numbers."""
        asked: list[Any] = []

        def look(values: Any) -> Any:
            method = self.made(values)
            asked.append((method.needs, method.additive, method.survey is not None))
            return values

        jax.eval_shape(look, self.values)
        return asked[0]

    def informed(self, values: Any, found: Found) -> Method:
        method = self.made(values)
        if method.survey is None:
            return method
        if method.survey.within == "tensor" or found.tensor is None:
            return method.survey.informed(Found(found.model))
        return method.survey.informed(Found(found.model, found.tensor[PLACE]))

    def start(self, values: Any, found: Any, base: Any) -> Any:
        return self.informed(values, found).init(base.astype(COMPUTE))

    def step(self, values: Any, found: Any, statistic: Any, base: Any, expert: Any, moment: Any, number: Any) -> Any:
        context = Context(jax.random.key(0), number, moment)
        method, weight = self.informed(values, found), jnp.ones((), COMPUTE)
        return method.see(statistic, _delta(expert, base), weight, context), jnp.isfinite(expert).all()

    def finish(self, values: Any, found: Any, statistic: Any, base: Any) -> Any:
        method = self.informed(values, found)
        merged, report = method.solve(statistic)
        if isinstance(method, Composer):
            return merged, report, [jnp.isfinite(part).all() for part in merged.values()]
        result = (merged + base).astype(self.stored)
        return result, report, jnp.isfinite(result).all()

    def together(self, values: Any, found: Any, base: Any, experts: Any, moment: Any) -> Any:
        statistic, flags = self.start(values, found, base), []
        for number, expert in enumerate(experts):
            statistic, finite = self.step(values, found, statistic, base, expert, moment, number)
            flags.append(finite)
        return self.finish(values, found, statistic, base), flags

    @property
    def all(self) -> tuple[Any, ...]:
        """The arguments of `together`."""
        return self.values, self.found, self.array, [self.array] * self.experts, self.moment


def shape_of(job: Job) -> tuple[int, ...]:
    """The shape of one matrix of a job, as dense deltas have it."""
    return job.seen_shape if job.joint is None else job.sides


def of_matrix(job: Job) -> Arithmetic:
    """The arithmetic of one matrix of a job: of its dense deltas, or of adapters in their joint basis."""
    if job.joint is not None:
        return joint_arithmetic(job.method, job.sides, job.joint, job.parameter.dtype)
    return arithmetic(job.method, job.seen_shape, len(job.experts), job.parameter.dtype)


def joint_arithmetic(method: Method, shape: tuple[int, int], ranks: tuple[int, ...], stored: str) -> Arithmetic:
    """The arithmetic of a method on adapters of these ranks, merged in their joint basis; passes before it aside."""
    values, structure = jax.tree.flatten(call_of(of_expert(method, 0)))
    return _joint_arithmetic(structure, len(values), shape, ranks, stored)


@functools.lru_cache(maxsize=4096)
def _joint_arithmetic(
    structure: Any, numbers: int, shape: tuple[int, int], ranks: tuple[int, ...], stored: str
) -> Arithmetic:
    m, n = shape

    def together(values: Any, base: Any, lefts: Any, rights: Any) -> Any:
        call: Call = jax.tree.unflatten(structure, values)
        weights, contexts = [1.0] * len(ranks), [Context(jax.random.key(0), number) for number in range(len(ranks))]
        left, right, report = merged_factors([call.part()] * len(ranks), cores_of(lefts, rights), weights, contexts)
        product = linalg.matmul(left.astype(COMPUTE), right.astype(COMPUTE))
        return (base.astype(COMPUTE) + product).astype(stored), report

    with jax.enable_x64(True):
        sides = [[jax.ShapeDtypeStruct(own, "float64") for own in ((m, max(r, 1)), (max(r, 1), n))] for r in ranks]
        lefts, rights = zip(*sides, strict=True)
        one = [jax.ShapeDtypeStruct((), "float64")] * numbers
        return Arithmetic((), tally(together, one, jax.ShapeDtypeStruct(shape, stored), lefts, rights), 1, 0)


def merging(method: Method, shape: tuple[int, ...], experts: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function that merges one tensor, and the shapes of its arguments."""
    values, structure = jax.tree.flatten(call_of(method))
    traced = _Traced(structure, len(values), shape, experts, COMPUTE)
    return traced.together, traced.all


@functools.lru_cache(maxsize=4096)
def _arithmetic(structure: Any, numbers: int, shape: tuple[int, ...], experts: int, stored: str) -> Arithmetic:
    by = _Traced(structure, numbers, shape, experts, stored)
    if not by.additive:
        return Arithmetic(by.looks, tally(by.together, *by.all), 1, 0)
    given, array, number = (by.values, by.found), by.array, jax.ShapeDtypeStruct((), "int32")
    merge, programs, statistic = tally(by.start, *given, array), 2, jax.eval_shape(by.start, *given, array)
    for left in range(experts, 0, -1):
        arguments = (*given, statistic, array, array, by.moment, number)
        after, one = jax.eval_shape(by.step, *arguments)[0], tally(by.step, *arguments)
        programs += 1
        if _same(after, statistic):
            merge += one.times(left)._replace(memory=one.memory - _bytes(statistic))  # which the step uses up
            break
        merge, statistic = merge + one, after
    merge += tally(by.finish, *given, statistic, array)
    return Arithmetic(by.looks, merge, programs, _bytes(statistic))


def _delta(expert: Any, base: Any) -> Any:
    return expert.astype(COMPUTE) - base.astype(COMPUTE)


def _bytes(statistic: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(statistic))


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of shapes are equal."""
    return bool(jax.tree.structure(one) == jax.tree.structure(other)) and all(  # type: ignore[operator]
        a.shape == b.shape for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# --- looks ----------------------------------------------------------------------------------------------------------


def _looks(by: _Traced) -> tuple[tuple[Pass, ...], Any]:
    """The passes of a method's look at the model or at the tensor, and the shapes of its findings.

    An answer that may be known already (`Measure.known`) is taken as known: so it is for most tensors.
    """
    passes: list[Pass] = []
    replies: list[Any] = []
    while True:
        # of the question: its keys, and whether it takes a pass; None: the look has ended
        asked: list[tuple[int, bool] | None] = []

        def ask(values: Any, replies: Any, base: Any, experts: Any, moment: Any, asked: Any = asked) -> Any:
            method = by.made(values)
            look = looked(method, [method] * len(experts), by.entries)
            try:
                wanted = replayed(look, replies)
            except StopIteration as end:
                asked.append(None)
                return end.value
            within = method.survey is not None and method.survey.within == "tensor"
            answer, count = _answered(wanted, within, base.astype(COMPUTE), [_delta(e, base) for e in experts], moment)
            asked.append((count, isinstance(wanted, Order) or wanted.known is None))
            return answer

        arguments = (by.values, replies, by.array, [by.array] * by.experts, by.moment)
        try:
            answer = jax.eval_shape(ask, *arguments)
            if asked[0] is None:
                return tuple(passes), answer
            keys, passed = asked[0]
            if passed:
                found = tally(ask, *arguments)
                checked = by.array.size * by.array.dtype.itemsize * (1 + by.experts)  # for NaN, in a program of its own
                passes.append(Pass(found._replace(moved=found.moved + checked + KEY * keys), keys))
        except jax.errors.JAXTypeError:  # a look that needs its numbers: all that it asked for before is counted
            return tuple(passes), Found(None)
        replies.append(answer)


def _answered(wanted: Any, within: bool, base: Any, deltas: list[Any], moment: Any) -> tuple[Any, int]:
    """An answer of the right shape to the question of a look, with the arithmetic of its parts."""
    contexts = tuple(Context(jax.random.key(0), number, moment) for number in range(len(deltas)))
    own = answered(wanted, Seen(base, jnp.stack(deltas), jnp.ones(len(deltas), base.dtype), contexts))
    if isinstance(wanted, Order):
        keys = list(own)
        most = sum(jnp.max(one) for one in keys)  # they are all used
        ranks = (len(wanted.ranks), len(wanted.ranks[0]))
        ends: Any = jnp.zeros(ranks, jnp.uint32) if wanted.ties else None
        ends = ends if within or ends is None else {PLACE: ends}
        return Ordered(jnp.zeros(ranks, keys[0].dtype) + most, ends), sum(one.size for one in keys)
    totals = own if wanted.joint else jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return ({PLACE: totals} if wanted.by_tensor else totals), 0
