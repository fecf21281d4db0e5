"""What a method is, what a transform is, and how they are chained.

statistic = init(base)                            nothing seen yet
statistic = update(statistic, delta, weight)      one expert seen
merged    = solve(statistic)                      the merged delta; the result is base + merged

transform: delta -> delta                         in front of a method, or behind it on the merged delta
trim(0.2) >> disjoint_mean() >> scale(0.5)        is a method again
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cfmerge.errors import CfmergeError

Statistic = Any  # a pytree of arrays, private to each method
Report = dict[str, Array]
Scope = Literal["entry", "tensor", "matrix"]
SCOPES: tuple[Scope, ...] = ("entry", "tensor", "matrix")  # from the narrowest to the widest


class Context(NamedTuple):
    """What comes with an expert's delta besides its weight. `update` and `apply` may take it as last argument.

    Attributes:
        key: a JAX key of this seed, tensor and expert, for methods that are `random`.
        number: the expert's place in the recipe, from 0.
        moment: what was measured of this expert for this tensor, for methods that name `moments`.
        start: index of the delta's first entry, where a large tensor is merged in pieces (0 otherwise).
        stored, view: the shape in which the tensor lies in its file and what turns that into the delta's, where they
            differ: what is drawn belongs to an entry of the file.
    """

    key: Array | None = None
    number: int | Array = 0
    moment: Array | None = None
    start: int | Array = 0
    stored: tuple[int, ...] | None = None
    view: Callable[[Array], Array] | None = None


NO_CONTEXT = Context()


class Seen(NamedTuple):
    """All experts of one tensor at once: the base, deltas `(T, ...)`, weights `(T,)`, and their contexts."""

    base: Array
    deltas: Array
    weights: Array
    contexts: tuple[Context, ...] = ()


class Survey(NamedTuple):
    """One pass over the whole model before the merge.

    Attributes:
        measure: `measure(delta, context)` of each expert and tensor: a pytree of arrays, summed over all tensors
            and stacked over the experts. If `joint`, `measure(seen)` of each tensor, summed over all tensors; of a
            transform behind a method `measure(merged, seen)`.
        combine: `combine(totals)`: what is found, on the host; under `jit` the totals are traced. If `by_tensor`, the
            measures are not summed: it gets `{place: measures}`, places in order, and returns a `Found` with a
            mapping of places as its `tensor`. If `sized`, `combine(totals, entries)`, of each expert's whole model.
        front, inner: of a chain whose survey is joint: the parts before the one that surveys, and its own survey.
    """

    measure: Callable[..., Any]
    combine: Callable[..., Any]
    joint: bool = False
    by_tensor: bool = False
    sized: bool = False
    front: Any = None
    inner: Any = None


class Found(NamedTuple):
    """What surveys found: of the whole model, and of the tensor (or piece of one) that is worked on."""

    model: Any
    tensor: Any = None


def xp_of(*values: Any) -> Any:
    """`jax.numpy` if some are traced, else `numpy`, which counts in 64 bits."""
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)) else np


class Origin(NamedTuple):
    """The call that made a part: so it can be made again with other, also traced, numbers."""

    factory: Callable[..., Any]
    arguments: Mapping[str, Any]
    traced: frozenset[str]  # names of the numbers that may be traced
    listed: frozenset[str]  # those of them that may differ by expert


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What methods and transforms have in common.

    Attributes:
        name, parameters: what the recipe called it.
        scope: "entry": every entry is taken by itself, so a large tensor may come in pieces; "tensor": whole
            tensors of any shape, as `(out, in)` where they have such a view; "matrix": canonical matrices only, the
            remaining tensors get the mean of the deltas.
        random: needs a key in the context.
        survey: `survey(found)` is the next pass over the whole model, given what the last ones found (None
            first), or None when there is no more to look for.
        informed: `informed(Found)` is the part that knows what its surveys found.
        origin: set by `register`.
    """

    name: str
    _: dataclasses.KW_ONLY
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scope: Scope = "matrix"
    random: bool = False
    survey: Callable[[Any], Survey | None] | None = None
    informed: Callable[[Found], Any] | None = None
    origin: Origin | None = None

    def __rshift__(self, other: "Part") -> Any:
        return chain(self, other) if isinstance(other, Part) else NotImplemented


@dataclasses.dataclass(frozen=True, eq=False)
class Transform(Part):
    """A delta -> delta rule, `apply(delta)` or `apply(delta, context)`.

    Attributes:
        looks_back: it stands behind a method, and is called as `apply(merged, Seen)`.
    """

    apply: Callable[..., Array]
    _: dataclasses.KW_ONLY
    scope: Scope = "entry"
    looks_back: bool = False

    def __call__(self, delta: Array, context: Context = NO_CONTEXT) -> Array:
        """The transformed delta."""
        return with_context(self.apply, (delta,), context)


@dataclasses.dataclass(frozen=True, eq=False)
class Method(Part):
    """A rule that turns the experts' deltas of one tensor into the merged delta: three pure functions.

    `base` and `delta` are canonical, `(out, in)`, for scope "matrix"; see `scope`. All three functions can be
    jitted, vmapped and, where the mathematics is, differentiated.

    Attributes:
        report: `report(statistic) -> (solve(statistic), {name: scalar})`, where there is something to tell.
        additive: the statistic is a sum over experts, of a size that does not depend on their number.
        statistic: a name of the statistic; methods that give the same one share it (`None`: nobody else's).
        ordered: the result depends on the order of the experts.
        experts: the least and the largest number of experts (None: any).
        weights: which weights have a meaning: "any", "positive", or "none" (the method ignores them).
        normalises: divides by the sum of the weights, so that it must not be 0.
        moments: what every expert must bring besides its weights ("input_gram", "fisher"), in the context.
        notes: `{report name: (condition, message)}`: what is said to the user when `condition(value)` holds.
        of_rank: `of_rank(r)` is the method in a form for deltas of rank at most `r`, where it has one; it then
            reports `factor_error`, the relative error of taking them so.
        results: how many merged deltas `solve` gives, stacked: more than one in a sweep.
        without_conv1d: the method for tensors that are *not* stored as GPT-2's Conv1D, if it is another one.
    """

    init: Callable[[Array], Statistic]
    update: Callable[..., Statistic]
    solve: Callable[[Statistic], Array]
    report: Callable[[Statistic], tuple[Array, Report]] | None = None
    _: dataclasses.KW_ONLY
    additive: bool = True
    statistic: Hashable = None
    ordered: bool = False
    experts: tuple[int, int | None] = (1, None)
    weights: Literal["any", "positive", "none"] = "any"
    normalises: bool = False
    moments: Literal["", "input_gram", "fisher"] = ""
    notes: Mapping[str, tuple[Callable[[float], bool], str]] = dataclasses.field(default_factory=dict)
    of_rank: Callable[[int], "Method"] | None = None
    without_conv1d: Union["Method", None] = None
    results: int = 1

    def see(
        self, statistic: Statistic, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> Statistic:
        """`update`, given the context if it takes one."""
        return with_context(self.update, (statistic, delta, weight), context)

    def solve_with_report(self, statistic: Statistic) -> tuple[Array, Report]:
        """`(solve(statistic), what there is to tell)`."""
        return self.report(statistic) if self.report else (self.solve(statistic), {})


def with_context(function: Callable[..., Any], arguments: tuple[Any, ...], context: Context) -> Any:
    """The function called, with the context as a last argument if it takes one."""
    return function(*arguments, context) if _takes(function, len(arguments) + 1) else function(*arguments)


@functools.lru_cache(maxsize=4096)
def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether the function has at least `count` positional parameters."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return sum(kind in positional for kind in kinds) >= count


class Chained(NamedTuple):
    """The statistic of a chain: its method's, and all that was seen where a transform behind it looks back."""

    inner: Statistic
    base: Array | None
    deltas: tuple[Array, ...]
    weights: tuple[Array, ...]


def chain(*parts: Part) -> Any:
    """Transforms and at most one method as one: `chain(trim(.2), disjoint_mean(), scale(.5))`.

    The transforms in front of the method are applied to each delta before `update`, those behind it to the merged
    delta. Without a method the chain is a transform. `a >> b` is `chain(a, b)`.

    Raises:
        CfmergeError: two methods, two parts that survey the model, or a transform on the wrong side.
    """
    return _chain_of(tuple(inner for part in parts for inner in _links(part)))


def _links(part: Part) -> tuple[Any, ...]:
    return part.parameters["parts"] if is_chain(part) else (part,)


def _chain_of(parts: tuple[Any, ...]) -> Any:
    at = next((number for number, part in enumerate(parts) if isinstance(part, Method)), len(parts))
    before, after = parts[:at], parts[at + 1 :]
    _check_chain(parts, before, after)
    shared: dict[str, Any] = {
        "parameters": {"parts": parts},
        "scope": max((part.scope for part in parts), key=SCOPES.index),
        "random": any(part.random for part in parts),
        "origin": Origin(_chain_of, {"parts": parts}, frozenset(), frozenset()),
    }
    name = " >> ".join(part.name for part in parts)

    def apply(delta: Array, context: Context = NO_CONTEXT) -> Array:
        for part in before:
            delta = part(delta, context)
        return delta

    if at == len(parts):
        return Transform(name, apply, **shared, **_survey_of(parts, at))
    inner = parts[at]
    others = chain(*before, inner.without_conv1d, *after) if inner.without_conv1d else None
    looks_back = any(part.looks_back for part in after)

    def init(base: Array) -> Chained:
        return Chained(inner.init(base), base if looks_back else None, (), ())

    def update(statistic: Chained, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Chained:
        known = inner.see(statistic.inner, apply(delta, context), weight, context)
        if not looks_back:
            return Chained(known, None, (), ())
        return Chained(known, statistic.base, (*statistic.deltas, delta), (*statistic.weights, jnp.asarray(weight)))

    def behind(statistic: Chained, merged: Array) -> Array:
        for part in after:
            if part.looks_back:
                weights = jnp.stack(statistic.weights)
                merged = part.apply(merged, Seen(statistic.base, jnp.stack(statistic.deltas), weights))  # type: ignore[arg-type]
            else:
                merged = part(merged)
        return merged

    def report(statistic: Chained) -> tuple[Array, Report]:
        merged, told = inner.solve_with_report(statistic.inner)
        return behind(statistic, merged), told

    return Method(
        name,
        init,
        update,
        lambda statistic: behind(statistic, inner.solve(statistic.inner)),
        report if inner.report else None,
        additive=inner.additive and not looks_back,
        without_conv1d=others,
        **{field: getattr(inner, field) for field in INHERITED},
        **shared,
        **_survey_of(parts, at),
    )


INHERITED = ("ordered", "experts", "weights", "normalises", "moments", "notes")  # by a chain from its method


def is_chain(part: Any) -> bool:
    return set(part.parameters) == {"parts"}


def _check_chain(parts: tuple[Any, ...], before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    methods = [part.name for part in parts if isinstance(part, Method)]
    if len(methods) > 1:
        raise CfmergeError(f"chain: two methods, {methods[0]} and {methods[1]}; the other parts must be transforms")
    surveys = [part.name for part in parts if part.survey]
    if len(surveys) > 1:
        raise CfmergeError(f"chain: {surveys[0]} and {surveys[1]} both survey the whole model; only one part can")
    for part in before:
        if part.looks_back:
            raise CfmergeError(f"chain: {part.name} looks at the merged delta: it must stand behind a method")
    for part in after:
        if part.random:
            raise CfmergeError(f"chain: {part.name} is random by expert: it must stand in front of the method")


def _survey_of(parts: tuple[Any, ...], at: int) -> dict[str, Any]:
    """`survey` and `informed` of a chain, from the part that has one: it surveys what reaches it."""
    number = next((number for number, part in enumerate(parts) if part.survey), None)
    if number is None:
        return {}
    before = parts[: min(number, at)]
    front = chain(*parts[:number]) if number else None

    def measure_one(following: Survey, delta: Array, context: Context) -> Any:
        for part in before:
            delta = part(delta, context)
        return with_context(following.measure, (delta,), context)

    def survey(found: Any) -> Survey | None:
        following = parts[number].survey(found)
        if following is None or front is None:
            return following
        if not following.joint:
            return following._replace(measure=functools.partial(measure_one, following))
        whole = following._replace(front=front, inner=following)
        return whole._replace(measure=lambda seen: measure_jointly([whole] * len(seen.deltas), seen))

    def informed(found: Found) -> Any:
        return chain(*parts[:number], parts[number].informed(found), *parts[number + 1 :])

    return {"survey": survey, "informed": informed}


def measure_jointly(surveys: Sequence[Survey], seen: Seen) -> Any:
    """What a joint survey measures; one survey for each expert, as what stands in front may have its own numbers."""
    front = surveys[0].front
    if front is None:
        return surveys[0].measure(seen)
    contexts = seen.contexts or (NO_CONTEXT,) * len(seen.deltas)
    experts = zip([survey.front for survey in surveys], seen.deltas, seen.weights, contexts, strict=True)
    if isinstance(front, Method):
        statistic = front.init(seen.base)
        for own, delta, weight, context in experts:
            statistic = own.see(statistic, delta, weight, context)
        return surveys[0].inner.measure(front.solve(statistic), seen)
    deltas = jnp.stack([own(delta, context) for own, delta, _, context in experts])
    return measure_jointly([survey.inner for survey in surveys], seen._replace(deltas=deltas))
