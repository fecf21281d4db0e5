"""A store made or opened again: the rules that are asked for, and whether they are those of the store that is there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.products.files import save
from cfmerge.temporal.book import IN_STORE, Book
from cfmerge.temporal.merging import base_name
from cfmerge.temporal.metrics import check_tasks
from cfmerge.temporal.prints import prints, prints_of_tree
from cfmerge.temporal.rules import Rule, protocol, rule
from cfmerge.temporal.store import Store
from cfmerge.temporal.telling import check_keep

LISTS = ("tasks", "held_out")  # that may grow


def completed(given: str | Rule, technique: str | None = None, weight: float | None = None) -> Rule:
    """The rule, checked, with a technique and a weight where it has none of its own."""
    made: Rule = rule(given).completed(technique, weight)
    made.check()
    return made


def rules_of(
    init: str | Rule | None, deploy: str | Rule | None, name: str | None, technique: str | None, weight: float | None
) -> tuple[Rule, Rule] | None:
    """The rules that are asked for; None: none are."""
    if name is not None:
        if init is not None or deploy is not None:
            raise CfmergeError(f"time: protocol={name!r} says both rules; leave init and deploy out")
        init, deploy = protocol(name)
    if init is None and deploy is None:
        left = [key for key, value in (("technique", technique), ("weight", weight)) if value is not None]
        if left:
            raise CfmergeError(f"time: {left[0]}= is a part of a rule; name init= and deploy=, or protocol=")
        return None
    if init is None or deploy is None:
        raise CfmergeError("time: name both rules, init= and deploy= (--init, --deploy), or protocol= (--protocol)")
    return completed(init, technique, weight), completed(deploy, technique, weight)


def made(path: Path, base: Any, rules: tuple[Rule, Rule] | None, asked: Mapping[str, Any]) -> Store:
    """A new store, as it is asked for.

    Raises:
        CfmergeError: no base or no rules, parts that disagree, or something else at the path; nothing is written then.
    """
    if base is None:
        return Store.opened(path)  # which says that there is none
    if rules is None:
        raise CfmergeError(
            "time: name the rules of a new store: init= and deploy=, or protocol=, as --protocol offline"
        )
    for key in ("window", "keep"):
        if asked[key] is not None and asked[key] < 1:
            raise CfmergeError(f"time: {key} counts experts, at least 1; found {asked[key]}")
    check_tasks(asked["tasks"] or [], asked["held_out"] or [])
    tree = not isinstance(base, str | Path)
    given = {key: value for key, value in asked.items() if value is not None}
    book = Book(IN_STORE if tree else base_name(base), rules[0].text, rules[1].text, **given)
    for one in rules:
        check_keep(Store(path, book), one)
    Store.check_new(path)
    place = path / IN_STORE
    if tree and not place.exists():
        save(base, place)
    elif tree:  # a stop has left it, or it is somebody's
        there = prints(open_checkpoint(place))
        if there != prints_of_tree(base, there):
            raise CfmergeError(f"store {path}: holds another model at {place}; name another directory")
    return Store.made(path, book)


def extend(store: Store, asked: Mapping[str, Any]) -> None:
    """Adds the tasks by which a list that is asked for goes on behind the store's own."""
    more = {key: asked[key] for key in LISTS if _goes_on(key, getattr(store.book, key), asked[key])}
    if more:
        with store.changing(writes=False):
            lists = {key: more.get(key, getattr(store.book, key)) for key in LISTS}
            check_tasks(lists["tasks"], lists["held_out"], store.book.order, store.book.trained or None)
            store.book.tasks, store.book.held_out = lists["tasks"], lists["held_out"]
            store.write()


def _goes_on(key: str, found: Any, asked: Any) -> bool:
    """Whether a list of tasks begins with those that the store has."""
    return key in LISTS and bool(asked) and len(asked) > len(found) > 0 and asked[: len(found)] == found


def check_same(store: Store, rules: tuple[Rule, Rule] | None, asked: Mapping[str, Any]) -> None:
    """Raises `CfmergeError` where a store that is there was made with something else than is asked for."""
    book = store.book
    expected = {key: value for key, value in asked.items() if value is not None and key != "options"}
    found: dict[str, Any] = {key: getattr(book, key) for key in expected}
    expected |= asked["options"] or {}
    found |= {key: book.options.get(key) for key in asked["options"] or {}}
    if rules is not None:
        found |= {"init": book.init, "deploy": book.deploy}
        expected |= {"init": rules[0].text, "deploy": rules[1].text}
    other = [key for key, value in expected.items() if found[key] != value and not _goes_on(key, found[key], value)]
    if other:
        key = other[0]
        once = ". A model by another rule, once: cfmerge time deploy STORE --rule RULE" if key == "deploy" else ""
        raise CfmergeError(
            f"store {store.path}: was made with {key}={found[key]!r}, found {key}={expected[key]!r}; leave it out, or "
            f"make another store{once}"
        )
