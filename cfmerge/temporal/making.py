"""The model of a rule, written: its running model as it goes out, or a merge of what the rule reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.core.expressions import expression
from cfmerge.temporal.book import State
from cfmerge.temporal.card import OverTime
from cfmerge.temporal.coefficients import coefficients
from cfmerge.temporal.merging import Part, copied, merged
from cfmerge.temporal.rules import All, Base, Last, Paint, Rule
from cfmerge.temporal.states import SUM, expert_of, follow, kind_of, scale_of
from cfmerge.temporal.store import Store


def write_model(store: Store, rule: Rule, output: Path, how: Mapping[str, Any]) -> None:
    """Writes the model that the rule makes of the store's experts; `how`: overwrite, memory, devices, progress.

    Raises:
        CfmergeError: an expert is needed that is no longer kept, or a merge fails; nothing is written then.
    """
    store.base  # noqa: B018, it is checked
    experts = store.experts
    weights = coefficients(rule, [one.number for one in experts]) if experts else None
    told = OverTime(rule.text, [(one.number, one.task) for one in experts], weights or {})
    if not experts or isinstance(rule, Base):
        return copied(store, store.base_path, output, how, told)
    newest = experts[-1]
    if isinstance(rule, Last):
        return copied(store, store.readable(newest), output, how, told)
    if isinstance(rule, Paint):
        running, new = rule.weights
        parts = [Part("base", store.base_path, running), Part(newest.key, store.readable(newest), new)]
        merged(store, parts, expression(rule.method), output, how, told=told)
        return None
    state = follow(store, rule, {**how, "overwrite": True})
    if state is not None:
        return _of_state(store, rule, state, output, how, told)
    assert isinstance(rule, All)
    names = [Part(one.key, store.readable(one)) for one in experts]
    parts = [*([Part("base", store.base_path)] if rule.with_base else []), *names]
    by_time = rule.weights(len(parts)) if rule.by_time != "uniform" else [1.0] * len(parts)
    parts = [part._replace(weight=weight) for part, weight in zip(parts, by_time, strict=True)]
    if len(parts) < rule.method.needs.experts[0]:
        return copied(store, parts[-1].path, output, how, told, by_rules=True)
    merged(store, parts, expression(rule.method), output, how, told=told)
    return None


def _of_state(store: Store, rule: Rule, state: State, output: Path, how: Mapping[str, Any], told: OverTime) -> None:
    if not state.path:
        number = expert_of(state)
        one = store.base_path if number is None else store.readable(store.expert(number))
        return copied(store, one, output, how, told, by_rules=True)
    path = store.where(state.path)
    if kind_of(store, rule) == "statistics":
        assert isinstance(rule, All)
        merged(store, [], expression(rule.method), output, how, told=told, statistics=path)
        return None
    scale = scale_of(rule, state) if isinstance(rule, All) and state.kind == "running" else 1.0
    method = SUM if scale == 1 else f"task_arithmetic(scale={scale!r})"
    merged(store, [Part("running", str(path))], method, output, how, told=told)
    return None
