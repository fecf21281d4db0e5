"""Several methods as one, for sweeps: they see the experts once, and share statistics and decompositions."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.errors import CfmergeError
from cfmerge.methods._base import (
    NO_CONTEXT,
    SCOPES,
    Context,
    Found,
    Method,
    Origin,
    Report,
    Statistic,
    Survey,
)
from cfmerge.methods._registry import numbers, structure, with_numbers


def several(methods: tuple[Method, ...]) -> Method:
    """The methods as one whose merged delta is `(len(methods), ...)`.

    Methods that name the same `statistic` share one. Those that differ in numbers alone are solved under one `vmap`
    over the numbers: what does not depend on them, such as an eigendecomposition, is computed once.
    """
    moments = {method.moments: method.name for method in methods if method.moments}
    if len(moments) > 1:
        needed = " and ".join(f"{name} {what}" for what, name in moments.items())
        raise CfmergeError(f"sweep: {needed} of each expert: methods that need different moments go one by one")
    keys = [method.statistic if method.statistic is not None else (structure(method), number)
            for number, method in enumerate(methods)]  # fmt: skip
    distinct = list(dict.fromkeys(keys))
    leaders = [methods[keys.index(key)] for key in distinct]

    def init(base: Array) -> tuple[Statistic, ...]:
        return tuple(leader.init(base) for leader in leaders)

    def update(
        statistics: tuple[Statistic, ...], delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> tuple[Statistic, ...]:
        return tuple(
            leader.see(statistic, delta, weight, context) for leader, statistic in zip(leaders, statistics, strict=True)
        )

    def report(statistics: tuple[Statistic, ...]) -> tuple[Array, Report]:
        merged: dict[int, Array] = {}
        told: Report = {}
        for members in _alike(methods, keys):
            statistic = statistics[distinct.index(keys[members[0]])]
            solutions, reports = _solve_alike([methods[n] for n in members], statistic)
            for row, number in enumerate(members):
                merged[number] = solutions[row]
                told |= {f"{number}:{name}": value[row] for name, value in reports.items()}
        ratios = [value for name, value in told.items() if name.endswith(":ridge_ratio")]
        if ratios:
            told["ridge_ratio"] = jnp.min(jnp.stack(ratios))
        return jnp.stack([merged[number] for number in range(len(methods))]), told

    return Method(
        "sweep",
        init,
        update,
        lambda statistics: report(statistics)[0],
        report,
        parameters={"methods": [method.name for method in methods]},
        scope=max((method.scope for method in methods), key=SCOPES.index),
        random=any(method.random for method in methods),
        additive=all(method.additive for method in methods),
        moments=next(iter(moments), ""),
        notes={
            f"{n}:{name}": (condition, f"{method.name}: {message}")
            for n, method in enumerate(methods)
            for name, (condition, message) in method.notes.items()
        },
        results=len(methods),
        origin=Origin(several, {"methods": methods}, frozenset(), frozenset()),
        **_surveys(methods),
    )


def _alike(methods: Sequence[Method], keys: Sequence[Hashable]) -> list[list[int]]:
    """Numbers of the methods, grouped by those that differ in numbers alone and share a statistic."""
    groups: dict[Hashable, list[int]] = {}
    for number, (method, key) in enumerate(zip(methods, keys, strict=True)):
        alone = number if method.informed is not None else None  # what surveys found is held inside
        groups.setdefault((structure(method), key, alone), []).append(number)
    return list(groups.values())


def _solve_alike(methods: Sequence[Method], statistic: Statistic) -> tuple[Array, Report]:
    """`(len(methods), ...)` solutions and reports of methods of one structure."""
    own = [numbers(method) for method in methods]
    varying = [any(value is not row[0] for value in row) for row in zip(*own, strict=True)]
    if len(methods) == 1 or not any(varying):
        solved = [method.solve_with_report(statistic) for method in methods]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *solved)
    columns = [jnp.stack([jnp.asarray(value) for value in row]) if varies else row[0]
               for row, varies in zip(zip(*own, strict=True), varying, strict=True)]  # fmt: skip

    def solve(values: list[Any]) -> tuple[Array, Report]:
        return with_numbers(methods[0], values).solve_with_report(statistic)

    return jax.vmap(solve, in_axes=([0 if varies else None for varies in varying],))(columns)


def members(method: Method) -> tuple[Method, ...]:
    """The methods that `several` made one of; a method by itself is its only one."""
    return method.origin.arguments["methods"] if method.origin and method.origin.factory is several else (method,)


def gathered(method: Method, found: Sequence[Found | None]) -> Found | None:
    """What the method must be told, of what surveys found for each of its members."""
    if method.survey is None or members(method) == (method,):
        return found[0]
    tensor: dict[Any, Any] = {}
    for number, own in enumerate(found):
        for place, value in ((own and own.tensor) or {}).items():
            tensor.setdefault(place, {})[number] = value
    return Found(tuple(own and own.model for own in found), tensor or None)


def _surveys(methods: tuple[Method, ...]) -> dict[str, Any]:
    """Found is `Found(models by member, {place: {number of the member: ...}})`, see `gathered`."""
    if not any(method.survey for method in methods):
        return {}

    def survey(found: Any) -> Survey | None:
        raise NotImplementedError("each method of a sweep surveys the tensors that it merges: see members")

    def informed(found: Found) -> Method:
        tensor = found.tensor or {}
        return several(
            tuple(
                method.informed(Found(found.model[number], tensor.get(number))) if method.informed else method
                for number, method in enumerate(methods)
            )
        )

    return {"survey": survey, "informed": informed}
