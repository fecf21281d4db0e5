"""Several methods as one, for sweeps: they see the experts once, and share statistics and decompositions."""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.call import Call, call_of, form_of, structure
from cfmerge.core.joint import Joint, in_joint, out_of_basis
from cfmerge.core.part import NO_CONTEXT, SCOPES, Context, Method, Needs, Note, Report, Statistic
from cfmerge.core.survey import Found, Look, Survey
from cfmerge.errors import CfmergeError


def several(methods: tuple[Method, ...]) -> Method:
    """The methods as one whose merged delta is `(len(methods), ...)`, and whose report is a tuple of theirs.

    Methods that name the same `statistic` share one. Those that differ in numbers alone are solved under one `vmap`
    over the numbers: steps that do not depend on them, such as an eigendecomposition, are computed once.
    """
    for method in methods:
        if method.chooses:
            raise CfmergeError(f"sweep: {method.name} chooses a method for each tensor: merge by it alone")
    moments = {method.needs.moments: method.name for method in methods if method.needs.moments}
    if len(moments) > 1:
        needed = " and ".join(f"{name} {what}" for what, name in moments.items())
        raise CfmergeError(f"sweep: {needed} of each expert: methods that need different moments go one by one")
    keys = _keys(methods)
    distinct = list(dict.fromkeys(keys))
    leaders = [methods[keys.index(key)] for key in distinct]

    def init(base: Array) -> tuple[Statistic, ...]:
        return tuple(leader.init(base) for leader in leaders)

    def update(
        statistics: tuple[Statistic, ...], delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> tuple[Statistic, ...]:
        pairs = zip(leaders, statistics, strict=True)
        return tuple(leader.see(statistic, delta, weight, context) for leader, statistic in pairs)

    def solve(statistics: tuple[Statistic, ...]) -> tuple[Array, tuple[Report, ...]]:
        solved: dict[int, tuple[Array, Report]] = {}
        for group in _alike(methods, keys):
            statistic = statistics[distinct.index(keys[group[0]])]
            solved |= dict(zip(group, _solve_alike([methods[n] for n in group], statistic), strict=True))
        merged, reports = zip(*(solved[number] for number in range(len(methods))), strict=True)
        return jax.tree.map(lambda *each: jnp.stack(each), *merged), reports

    def form(rank: int | None) -> Method | None:
        made = [form_of(method) for method in methods if rank is None]
        return several(tuple(made)) if made and all(made) else None  # type: ignore[arg-type]

    scope = max((method.needs.scope for method in methods), key=SCOPES.index)
    random = any(method.needs.random for method in methods)
    factors = {method.needs.factors for method in methods}
    wanted: Any = "required" if "required" in factors else "used" if "used" in factors else ""
    return Method(
        "sweep",
        init,
        update,
        solve,
        needs=Needs(scope, moments=next(iter(moments), ""), random=random, factors=wanted),
        additive=all(method.additive for method in methods),
        by_rows=all(method.by_rows for method in methods),
        form=form,
        survey=_survey(methods),
        joint=partial(_on_cores, methods) if all(method.joint for method in methods) else False,
        call=Call.of(several, {"methods": methods}, frozenset()),
    )


def _on_cores(methods: tuple[Method, ...], basis: Joint) -> Method:
    own = [in_joint(method, basis) for method in methods]
    if any(method.needs.factors for method in methods):  # a merge may leave the basis
        own = [out_of_basis(method, basis) for method in own]
    return several(tuple(own))


def members(method: Method) -> tuple[Method, ...]:
    """The methods that `several` made one of; a method by itself is its only one."""
    return method.call.arguments["methods"] if method.call and method.call.factory is several else (method,)


def leaders(method: Method) -> tuple[Method, ...]:
    """The members whose statistics a sweep keeps, one for each that is shared: its own are a tuple of theirs."""
    keys, own = _keys(members(method)), members(method)
    return tuple(own[keys.index(key)] for key in dict.fromkeys(keys))


def _keys(methods: Sequence[Method]) -> list[Hashable]:
    """Keys of the methods' statistics: equal for those that share one."""
    return [
        method.statistic if method.statistic is not None else (structure(method), number)
        for number, method in enumerate(methods)
    ]


def remarks(method: Method, report: Any) -> Iterator[tuple[Any, Note]]:
    """`(value, (condition, message))` of all that a method, or those of a sweep, report and have a note on."""
    own = members(method)
    for member, told in zip(own, report if isinstance(report, tuple) else (report,), strict=True):
        for name, (condition, message) in member.notes.items():
            if name in told:
                yield told[name], (condition, message if len(own) == 1 else f"{member.name}: {message}")


def reported(report: Any, name: str) -> list[Any]:
    """The values of that name in a report: several in that of a sweep."""
    return [told[name] for told in (report if isinstance(report, tuple) else (report,)) if name in told]


def _alike(methods: Sequence[Method], keys: Sequence[Hashable]) -> list[list[int]]:
    """Numbers of the methods, grouped by those that differ in numbers alone and share a statistic."""
    groups: dict[Hashable, list[int]] = {}
    for number, (method, key) in enumerate(zip(methods, keys, strict=True)):
        groups.setdefault((structure(method), key), []).append(number)
    return list(groups.values())


def _solve_alike(methods: Sequence[Method], statistic: Statistic) -> list[tuple[Array, Report]]:
    """The solutions and reports of methods of one structure: a `vmap` over the numbers that vary."""
    calls = [call_of(method) for method in methods]
    varying = jax.tree.map(lambda value, *others: any(other is not value for other in others), *calls)
    if not any(jax.tree.leaves(varying)):
        return [method.solve(statistic) for method in methods]

    def column(varies: bool, *values: Any) -> Any:
        return jnp.stack([jnp.asarray(value) for value in values]) if varies else values[0]

    solve = jax.vmap(
        lambda call: call.part().solve(statistic), in_axes=(jax.tree.map(lambda v: 0 if v else None, varying),)
    )
    merged, reports = solve(jax.tree.map(column, varying, *calls))
    return [(merged[row], {name: value[row] for name, value in reports.items()}) for row in range(len(methods))]


def gathered(method: Method, found: Sequence[Found | None]) -> Found | None:
    """The findings to tell the method, gathered from the surveys of its members."""
    if method.survey is None or members(method) == (method,):
        return found[0]
    tensor: dict[Any, Any] = {}
    for number, own in enumerate(found):
        for place, value in ((own and own.tensor) or {}).items():
            tensor.setdefault(place, {})[number] = value
    return Found(tuple(own and own.model for own in found), tensor or None)


def _survey(methods: tuple[Method, ...]) -> Survey | None:
    """Found is `Found(models by member, {place: {number of the member: ...}})`, see `gathered`."""
    if not any(method.survey for method in methods):
        return None

    def look(entries: int, own: Sequence[Any]) -> Look:
        raise NotImplementedError("each method of a sweep looks at the tensors that it merges: see members")

    def informed(found: Found) -> Method:
        tensor = found.tensor or {}
        return several(
            tuple(
                method.survey.informed(Found(found.model[number], tensor.get(number))) if method.survey else method
                for number, method in enumerate(methods)
            )
        )

    return Survey(look, informed)
