"""An expert taken into a store: a checkpoint or an adapter, copied or linked, or a tree of parameters."""

import shutil
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapters import is_adapter, read_adapter
from cfmerge.planning.experts import open_expert
from cfmerge.planning.work import Progress
from cfmerge.products.convert import convert
from cfmerge.products.files import save
from cfmerge.recipe import Expert as Named
from cfmerge.temporal.book import Expert
from cfmerge.temporal.merging import base_name, check_expert, recipe_of
from cfmerge.temporal.prints import print_of
from cfmerge.temporal.rules import Base, rule
from cfmerge.temporal.store import Store


def take_in(
    store: Store, one: Expert, expert: Any, link: bool, over: str | Path | None, progress: Progress | None
) -> None:
    """Checks an expert against the base, copies it, and notes in `one` where it lies.

    Args:
        over: the model that an adapter changes, where that is not the base; the model that comes out is the expert.

    Raises:
        CfmergeError: it does not fit; what is written by then is removed, since no book tells of it.
    """
    one.path = f"experts/{one.key}"
    place = store.where(one.path)
    tree, changed = not isinstance(expert, str | Path), changed_model(store, expert, one.task, over)
    if link and (tree or changed):
        what = "a tree of parameters" if tree else f"an adapter over {changed}"
        raise CfmergeError(f"expert {one.task!r}: {what} cannot be linked; leave link out")
    if tree:
        save(expert, place)
    elif changed:
        spec = Named(path=changed, name=one.key, adapter=base_name(expert))
        whole = open_expert(spec, store.base, recipe_of(store, [], "average", running=True))
        convert(whole, place, overwrite=True, progress=progress)
    if tree or changed:
        check_expert(store, str(place), one.task)
        return
    check_expert(store, base_name(expert), one.task)
    if link:
        one.path = base_name(expert)
        one.linked = print_of(store.source(one.path))
    else:
        copy(store.located(base_name(expert)), place, progress)


def changed_model(store: Store, expert: Any, task: str, over: str | Path | None) -> str:
    """The path of the model that an adapter changes; "" for the base, and for what is no adapter.

    Raises:
        CfmergeError: it is not told, and the store's rule did not begin the task with the base.
    """
    path = None if not isinstance(expert, str | Path) else store.located(base_name(expert))
    if path is None or not is_adapter(path):
        if over is not None:
            raise CfmergeError(f"expert {task!r}: is no adapter, and over={over} is for adapters; leave over out")
        return ""
    if over is not None:
        return "" if base_name(over) == store.base_path else base_name(over)
    if not store.experts or isinstance(rule(store.book.init), Base):
        return ""
    named = read_adapter(path, store.base).trained_on
    if named and base_name(named) == store.base_path:
        return ""
    told = f" (the adapter names {named!r})" if named else ""
    raise CfmergeError(
        f"expert {task!r}: {expert} is an adapter, and the init rule {store.book.init} did not begin the task with the "
        f"base{told}; name the model that it changes: --over {named or 'START'} (over=), or --over {store.base_path}"
    )


def copy(where: Path, place: Path, progress: Progress | None) -> None:
    """Copies a model or an adapter, whole or not at all."""
    if not is_adapter(where):
        convert(where, place, overwrite=True, progress=progress)
        return
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if where.is_dir():
        shutil.copytree(where, part)
    else:
        part.mkdir(parents=True)
        for file in (where, where.with_name("adapter_config.json")):
            if file.is_file():
                shutil.copy2(file, part / file.name)
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
