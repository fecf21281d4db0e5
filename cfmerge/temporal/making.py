"""The model of a rule, written: its running model as it goes out, or a merge of what the rule reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.core.expressions import expression
from cfmerge.products.accumulate import solve
from cfmerge.temporal.merging import Part, copied, merged, of_output, unmerged
from cfmerge.temporal.rules import All, Base, Last, Paint, Rule
from cfmerge.temporal.states import SUM, expert_of, follow, kind_of, scale_of
from cfmerge.temporal.store import State, Store


def write_model(store: Store, rule: Rule, output: Path, how: Mapping[str, Any]) -> None:
    """Writes the model that the rule makes of the store's experts; `how`: overwrite, memory, devices, progress.

    Raises:
        CfmergeError: an expert is needed that is no longer kept, or a merge fails; nothing is written then.
    """
    store.base  # noqa: B018, it is checked
    experts = store.experts
    note = f"merged over time by {rule.text} over the experts {', '.join(one.task for one in experts)}, oldest first"
    if not experts or isinstance(rule, Base):
        return copied(store, store.base_path, output, how, note)
    newest = experts[-1]
    if isinstance(rule, Last):
        return copied(store, store.readable(newest), output, how, note)
    if isinstance(rule, Paint):
        running, new = rule.weights
        parts = [Part("base", store.base_path, running), Part(newest.key, store.readable(newest), new)]
        merged(store, parts, expression(rule.method), output, how, note=note)
        return None
    state = follow(store, rule, {**how, "overwrite": True})
    if state is not None:
        return _of_state(store, rule, state, output, how, note)
    assert isinstance(rule, All)
    names = [Part(one.key, store.readable(one)) for one in experts]
    parts = [*([Part("base", store.base_path)] if rule.with_base else []), *names]
    weights = rule.weights(len(parts)) if rule.by_time != "uniform" else [1.0] * len(parts)
    parts = [part._replace(weight=weight) for part, weight in zip(parts, weights, strict=True)]
    if len(parts) < rule.method.needs.experts[0]:
        return copied(store, parts[-1].path, output, how, note, by_rules=True)
    merged(store, parts, expression(rule.method), output, how, note=note)
    return None


def _of_state(store: Store, rule: Rule, state: State, output: Path, how: Mapping[str, Any], note: str) -> None:
    if not state.path:
        number = expert_of(state)
        one = store.base_path if number is None else store.readable(store.expert(number))
        return copied(store, one, output, how, note, by_rules=True)
    path = store.where(state.path)
    if kind_of(store, rule) == "statistics":
        assert isinstance(rule, All)
        solve(
            path, store.base_path, expression(rule.method), output=output, **of_output(store), **unmerged(store), **how
        )
        return None
    scale = scale_of(rule, state) if isinstance(rule, All) and state.kind == "running" else 1.0
    method = SUM if scale == 1 else f"task_arithmetic(scale={scale!r})"
    merged(store, [Part("running", str(path))], method, output, how, note=note)
    return None
