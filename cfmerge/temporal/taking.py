"""An expert taken into a store: a checkpoint or an adapter, copied or linked, or a tree of parameters."""

import shutil
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapters import is_adapter
from cfmerge.planning.work import Progress
from cfmerge.products.convert import convert
from cfmerge.products.files import save
from cfmerge.temporal.book import Expert
from cfmerge.temporal.merging import base_name, check_expert
from cfmerge.temporal.prints import print_of
from cfmerge.temporal.store import Store


def take_in(store: Store, one: Expert, expert: Any, link: bool, progress: Progress | None) -> None:
    """Checks an expert against the base, copies it, and notes in `one` where it lies.

    Raises:
        CfmergeError: it does not fit; what is written by then is removed, since no book tells of it.
    """
    one.path = f"experts/{one.key}"
    if not isinstance(expert, str | Path):
        if link:
            raise CfmergeError(f"expert {one.task!r}: a tree of parameters cannot be linked; leave link out")
        save(expert, store.where(one.path))
        check_expert(store, str(store.where(one.path)), one.task)
        return
    check_expert(store, base_name(expert), one.task)
    if link:
        one.path = base_name(expert)
        one.linked = print_of(store.source(one.path))
    else:
        copy(store.located(base_name(expert)), store.where(one.path), progress)


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
