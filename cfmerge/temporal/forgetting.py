"""Experts that leave a store: tensors that are let go of, tasks that are forgotten, running models without them."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.temporal.book import Expert
from cfmerge.temporal.rules import Last, Paint, Rule
from cfmerge.temporal.states import follow, kind_of, next_sum, state_of
from cfmerge.temporal.store import Store


def let_go(store: Store, rules: Sequence[Rule], how: Mapping[str, Any]) -> None:
    """Brings the running models up, then lets go of the tensors of older experts than are kept."""
    for one in _each(rules):
        follow(store, one, {**how, "overwrite": True})
    for old in store.book.experts[: -max(store.book.keep or 0, 1)]:
        old.gone = True
    store.write()


def keep_states_of(store: Store, rules: Sequence[Rule]) -> None:
    """Lets go of the running models of all other rules, which were used once."""
    own = {one.text for one in rules}
    if any(state.rule not in own for state in store.book.states):
        store.book.states = [state for state in store.book.states if state.rule in own]
        store.write()


def forget(store: Store, rules: Sequence[Rule], expert: Expert, how: Mapping[str, Any]) -> None:
    """Takes an expert out of the store, of its running models, and of the models that were made last.

    Raises:
        CfmergeError: a running model cannot be had without it; nothing is changed then.
    """
    book = store.book
    for one in _each(rules):
        check_forgettable(store, one, expert)
    kept = {state.rule for state in book.states if expert.number in state.through}
    book.experts.remove(expert)
    if book.experts and not expert.gone:
        store.leaving = expert  # its tensors are still there while running models are made without it
        try:
            for one in (one for one in _each(rules) if one.text in kept):
                follow(store, one, {**how, "overwrite": True})
        finally:
            store.leaving = None
    book.states = [state for state in book.states if expert.number not in state.through]
    store.write()
    for made in ("init", "deploy"):
        shutil.rmtree(store.path / made, ignore_errors=True)


def _each(rules: Sequence[Rule]) -> list[Rule]:
    """The rules, those that are equal once."""
    return list({one.text: one for one in rules}.values())


def check_forgettable(store: Store, rule: Rule, expert: Expert) -> None:
    """Raises `CfmergeError` where a rule's model cannot be had without an expert.

    A weighted sum and statistics take it off; other running models are made again of the experts that are left.
    """
    kind, old = kind_of(store, rule), state_of(store, rule)
    left = store.seen([one for one in store.book.experts if one is not expert])
    gone = [one for one in left if one.gone]
    if isinstance(rule, Last | Paint):
        gone, why = [one for one in left[-1:] if one.gone], "reads the newest expert"
    elif old is None or expert.number not in old.through or kind in {"none", "experts"}:
        return
    elif expert.gone:
        gone, why = [expert], "keeps a running model, from which it cannot be taken"
    elif kind == "sum":
        taken = next_sum(store, rule, old, [one.number for one in left]).experts
        gone, why = [one for one in gone if one.number in taken], "gives the others other weights then"
    elif kind == "statistics":
        return
    else:
        why = "keeps a running model, from which no expert can be taken, so that it is made again"
    if gone:
        raise CfmergeError(
            f"store {store.path}: {expert.task!r} cannot be forgotten: {rule.text} {why}, and it cannot be "
            f"had without {', '.join(repr(one.task) for one in gone)}, no longer kept (keep={store.book.keep})"
        )
