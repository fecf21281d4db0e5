"""Running models: what a store keeps so that the next expert needs no look at those before.

    kind        for                                  what is kept
    sum         weighted sums (`coefficients.py`)    the model, and the coefficient of each expert in it
    pairs       `ema` by any other technique         the model
    running     `all` by MagMax and OPCM             base + the sum, or the maximum, before the last scale
    statistics  `all` by additive methods (ACE, ..)  the statistics
    none        `base`, `last`, `paint`              nothing
    experts     `all` by the rest                    nothing: every step reads all experts

Running models are checkpoints like the base, in float32 where the base is narrower.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cfmerge.core.call import form_of
from cfmerge.core.expressions import expression
from cfmerge.core.numbers import is_number
from cfmerge.products.accumulate import accumulate_recipe
from cfmerge.statistics import Statistics
from cfmerge.temporal.book import Expert, State
from cfmerge.temporal.coefficients import Step, coefficients, step
from cfmerge.temporal.merging import Part, merged, recipe_of
from cfmerge.temporal.rules import All, Base, Ema, Last, Paint, Rule, name_through
from cfmerge.temporal.store import Store

DRIFT = 100.0  # roundings that may add up in a running model before it is made anew, where the experts are there
SUM = "task_arithmetic(scale=1.0)"
Next = Callable[[Store, Any, State | None, list[int], Mapping[str, Any]], State]


def kind_of(store: Store, rule: Rule) -> str:
    """The kind of state that a rule has in a store."""
    if isinstance(rule, Base | Last | Paint):
        return "none"
    ruled = {one.get("method", "") for one in store.book.options.get("rules", ())} - {"", "keep-base", "skip"}
    if not ruled and coefficients(rule, [1, 2]) is not None:
        return "sum"
    if isinstance(rule, Ema):
        return "pairs"
    method = rule.method
    if not ruled and method.name in {"magmax", "opcm"} and all(map(is_number, _numbers(rule))):
        return "running"
    return "statistics" if form_of(method) is not None and method.survey is None else "experts"


def follow(store: Store, rule: Rule, how: Mapping[str, Any]) -> State | None:
    """The rule's state, brought up to the store's experts; None: it has none.

    The book knows each step that is done, so that one that is stopped goes on there.

    Raises:
        CfmergeError: an expert is needed that is no longer kept, or a merge fails.
    """
    kind, wanted = kind_of(store, rule), [one.number for one in store.experts]
    if kind in {"none", "experts"} or not wanted:
        return None
    while True:
        old = state_of(store, rule)
        if old is not None and old.through == wanted:
            return old
        new = NEXT[kind](store, rule, old, wanted, how)
        store.book.states = [one for one in store.book.states if one.rule != rule.text] + [new]
        if store.leaving is None:  # else the book is written once, at the end
            store.write()
        if old is not None and old.path not in {"", *(one.path for one in store.written.states)}:
            shutil.rmtree(store.where(old.path), ignore_errors=True)


def state_of(store: Store, rule: Rule) -> State | None:
    """The state that the store has for a rule; one whose files are lost is none, and is made anew."""
    kind = kind_of(store, rule)
    own = (one for one in store.book.states if (one.rule, one.kind) == (rule.text, kind))
    return next((one for one in own if not one.path or store.where(one.path).exists()), None)


def reads(store: Store, rule: Rule) -> list[Expert]:
    """The experts that the rule's next model is read from, beside the base and the running model."""
    kind, wanted, old = kind_of(store, rule), [one.number for one in store.experts], state_of(store, rule)
    if isinstance(rule, Base) or not wanted:
        return []
    if kind == "none":
        return store.experts[-1:]
    if old is None or kind == "experts":
        return store.experts
    if kind == "sum":
        taken = next_sum(store, rule, old, wanted).experts
        return [store.expert(number) for number in taken] if old.through != wanted else []
    if kind == "statistics":
        gone = _taken_off(store, old, wanted)
        return store.experts if gone is None else [store.expert(one) for one in {*wanted} - {*old.through} | gone]
    return [store.expert(number) for number in _after(old, wanted)[1]]


def next_sum(store: Store, rule: Rule, old: State | None, wanted: Sequence[int]) -> Step:
    """The step of a weighted sum to the experts that are wanted."""
    target = coefficients(rule, wanted) if wanted else None
    return step(old.coefficients if old is not None else None, target or {}, store.there)


def _sum(store: Store, rule: Ema | All, old: State | None, wanted: list[int], how: Mapping[str, Any]) -> State:
    target = coefficients(rule, wanted)
    assert target is not None
    if {number: value for number, value in target.items() if value} in ({}, {wanted[-1]: 1.0}):
        return State(rule.text, "sum", "", wanted, target)
    taken, drift = next_sum(store, rule, old, wanted), 1.0
    if old is not None and taken.running is not None:
        drift += abs(taken.running) * old.drift
        if drift > DRIFT and set(wanted) <= store.there:
            taken, drift = step(None, target), 1.0
    parts = _parts(store, taken.experts, taken.experts)
    if old is not None and taken.running is not None:
        parts.insert(0, _before(store, old, taken.running))
    output = _place(store, rule, wanted)
    merged(store, parts, SUM, output, how)
    return State(rule.text, "sum", _name(store, output), wanted, target, drift=drift)


def _pairs(store: Store, rule: Ema, old: State | None, wanted: list[int], how: Mapping[str, Any]) -> State:
    old, left = _after(old, wanted)
    if old is None and rule.seed == "first":
        return State(rule.text, "pairs", "", left[:1])
    through = [*(old.through if old else []), left[0]]
    weights = dict(zip(("running", left[0]), rule.weights, strict=True))
    first = Part(name_through(0), store.base_path) if old is None else _before(store, old)
    parts = [first._replace(weight=weights["running"]), *_parts(store, left[:1], {left[0]: weights[left[0]]})]
    output = _place(store, rule, through)
    merged(store, parts, expression(rule.method), output, how)
    return State(rule.text, "pairs", _name(store, output), through)


def _running(store: Store, rule: All, old: State | None, wanted: list[int], how: Mapping[str, Any]) -> State:
    """The maximum of MagMax, or the sum of OPCM, in which a running model counts as the first expert."""
    old, left = _after(old, wanted)
    one_by_one = rule.method.name == "opcm"
    new = left[:1] if one_by_one else left
    through = [*(old.through if old else []), *new]
    parts = [*([_before(store, old)] if old else []), *_parts(store, new)]
    if old is None and rule.with_base:
        parts.insert(0, Part("base", store.base_path))
    output = _place(store, rule, through)
    result = merged(store, parts, _unscaled(rule), output, how)
    numbers = {}
    if one_by_one:
        told = {key: math.sqrt(sum(each.get(key, 0.0) for each in result.reports.values())) for key in OPCM}
        before = old.numbers["energy"] if old else [0.0] if rule.with_base else []
        numbers = {"energy": [*before, told["energy"]], "merged": [told["merged"]]}
    return State(rule.text, "running", _name(store, output), through, numbers=numbers)


OPCM = ("energy", "merged")  # of the report of OPCM's sum


def _unscaled(rule: All) -> str:
    """The rule's technique before its last scale."""
    told = {"scale": 1.0} if rule.method.name == "magmax" else {"rescale": False}
    arguments = ", ".join(f"{key}={value!r}" for key, value in {**rule.method.parameters, **told}.items())
    return f"{rule.method.name}({arguments})"


def scale_of(rule: All, state: State) -> float:
    """The factor of a running model's delta that the technique's last scale is."""
    if rule.method.name == "magmax":
        return float(rule.method.parameters["scale"])
    norms, merged = state.numbers["energy"], state.numbers["merged"][0]
    return sum(norms) / len(norms) / merged if merged > 0 else 1.0


def _statistics(store: Store, rule: All, old: State | None, wanted: list[int], how: Mapping[str, Any]) -> State:
    """Statistics, to which new experts are added, and from which those are subtracted that are no longer wanted."""
    gone = None if old is None else _taken_off(store, old, wanted)
    if gone is None:
        old, gone = None, set()
    output = _place(store, rule, wanted)
    kept = store.where(old.path) if old else None
    if gone and kept is not None:
        apart, rest = output.with_name(f"{output.name}-gone"), output.with_name(f"{output.name}-rest")
        _accumulate(store, rule, _parts(store, sorted(gone)), apart, None, how)
        (Statistics.load(kept) - Statistics.load(apart)).save(rest, overwrite=True)
        kept = rest
    new = _parts(store, [number for number in wanted if old is None or number not in old.through])
    if rule.with_base and kept is None:
        new.insert(0, Part("base", store.base_path))
    if new:
        _accumulate(store, rule, new, output, kept, how)
    return State(rule.text, "statistics", _name(store, output if new or kept is None else kept), wanted)


def _taken_off(store: Store, old: State, wanted: list[int]) -> set[int] | None:
    """The experts that are subtracted from statistics; None: these are made anew."""
    gone = {*old.through} - {*wanted}
    return None if gone == {*old.through} or not gone <= store.there else gone


def _accumulate(
    store: Store, rule: All, parts: Sequence[Part], output: Path, earlier: Path | None, how: Mapping[str, Any]
) -> None:
    recipe = recipe_of(store, parts, expression(rule.method), running=True)
    begun = str(earlier) if earlier else None
    limits = {key: how[key] for key in ("memory", "devices", "progress") if key in how}
    accumulate_recipe(msgspec.structs.replace(recipe, statistics=begun, dtype=None), output, overwrite=True, **limits)


NEXT: dict[str, Next] = {"sum": _sum, "pairs": _pairs, "running": _running, "statistics": _statistics}


def _numbers(rule: All) -> list[Any]:
    return [value for value in rule.method.parameters.values() if not isinstance(value, str | bool)]


def _after(old: State | None, wanted: list[int]) -> tuple[State | None, list[int]]:
    """The state, if what is wanted begins with its experts, and the experts that are left then."""
    if old is not None and wanted[: len(old.through)] == old.through:
        return old, wanted[len(old.through) :]
    return None, wanted


def _before(store: Store, old: State, weight: float = 1.0) -> Part:
    path = str(store.where(old.path)) if old.path else store.readable(store.expert(old.through[-1]))
    return Part(name_through(old.through[-1]), path, weight)


def expert_of(state: State) -> int | None:
    """The expert that a state without a path is, as it is; None: it is the base, of which all coefficients are 0."""
    taken = [number for number in state.through if state.coefficients.get(number, 1.0)]
    return taken[-1] if taken else None


def _parts(store: Store, numbers: Any, weights: Mapping[int, float] | None = None) -> list[Part]:
    experts = [store.expert(number) for number in numbers]
    return [Part(one.key, store.readable(one), weights[one.number] if weights else 1.0) for one in experts]


def _place(store: Store, rule: Rule, through: Sequence[int]) -> Path:
    """The directory of a new state, whose name says what it is, so that a merge that was stopped goes on there."""
    told = hashlib.sha256(f"{rule.text} {list(through)}".encode()).hexdigest()[:8]
    return store.path / "states" / f"{rule.name}-{through[-1]:04d}-{told}"


def _name(store: Store, path: Path) -> str:
    return str(path.relative_to(store.path))
