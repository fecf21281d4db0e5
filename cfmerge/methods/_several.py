"""Several methods as one, for sweeps: they see the experts once, and share statistics and decompositions."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
        moments=next((method.moments for method in methods if method.moments), ""),
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


def _surveys(methods: tuple[Method, ...]) -> dict[str, Any]:
    """The methods' surveys, one after the other.

    What is found is `Found((done, current), tensor)`: the models that were found for the first methods, what the next
    one has found so far, and `{place: {number of the method: ...}}`.
    """
    if not any(method.survey for method in methods):
        return {}

    def survey(found: Found | None) -> Survey | None:
        (done, current), tensor = found or (((), None), None)
        while len(done) < len(methods) and methods[len(done)].survey is None:
            done = (*done, None)
        if len(done) == len(methods):
            return None
        method = methods[len(done)]
        following: Survey = method.survey(current)  # type: ignore[misc, assignment]
        return following._replace(combine=_keeping(method, following.combine, done, tensor or {}))

    def informed(found: Found) -> Method:
        done = (*found.model[0], *[None] * len(methods))
        tensor = found.tensor or {}
        return several(
            tuple(
                method.informed(Found(done[number], tensor.get(number))) if method.informed else method
                for number, method in enumerate(methods)
            )
        )

    return {"survey": survey, "informed": informed}


def _keeping(
    method: Method, combine: Callable[[Any], Any], done: tuple[Any, ...], tensor: dict[Any, Any]
) -> Callable[[Any], Found]:
    def combined(totals: Any) -> Found:
        result = combine(totals)
        if method.survey(result) is not None:  # type: ignore[misc]
            return Found((done, result), tensor or None)
        if not isinstance(result, Found):
            return Found(((*done, result), None), tensor or None)
        places = {place: {**tensor.get(place, {}), len(done): value} for place, value in (result.tensor or {}).items()}
        return Found(((*done, result.model), None), {**tensor, **places} or None)

    return combined
