"""Merges of a store's models: ordinary recipes over its base, with the options that the store was made with."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats import located
from cfmerge.formats.adapters import is_adapter
from cfmerge.models import is_float
from cfmerge.models.deltas import Dense
from cfmerge.planning.work import Progress
from cfmerge.products.convert import convert
from cfmerge.products.plan import Plan, as_recipe, make_plan
from cfmerge.recipe import Expert, Recipe
from cfmerge.report.result import MergeResult
from cfmerge.temporal.store import Store

# what a store's merges may be told; `of_output` alone are for the model that goes out, not for running models
OPTIONS = ("rules", "rename", "heads", "allow", "precision", "dequantize", "seed", "plugins", "download", "cache_dir")
OF_OUTPUT = ("dtype", "format", "shard_size", "side_files")
ALLOWED = ("one-expert", "duplicate-experts", "base-as-expert")  # a running model may be any of these
PIECE = 1 << 24  # entries that are looked at at once


class Part(NamedTuple):
    """A model that takes part in a merge."""

    name: str
    path: str
    weight: float = 1.0


def recipe_of(store: Store, parts: Sequence[Part], method: str, *, running: bool) -> Recipe:
    """The recipe of a merge over the store's base.

    Args:
        running: the result is a running model: its floating-point tensors are float32 where the base's are narrower.
    """
    told = store.book.options
    options = {key: told[key] for key in OPTIONS if key in told}
    options |= {} if running else {key: told[key] for key in OF_OUTPUT if key in told}
    if running and any(is_float(i.dtype.name) and i.dtype.itemsize < 4 for i in store.base.tensors.values()):
        options["dtype"] = "float32"
    options["allow"] = sorted({*told.get("allow", ()), *ALLOWED})
    experts = [Expert(path=part.path, name=part.name, weight=part.weight) for part in parts]
    return as_recipe(store.base_path, experts, method, {}, options)


def merged(
    store: Store, parts: Sequence[Part], method: str, output: Path, how: Mapping[str, Any], *, note: str = ""
) -> MergeResult:
    """The result of a merge over the store's base; without a note it is a running model."""
    plan = make_plan(recipe_of(store, parts, method, running=not note))
    if note:
        plan = dataclasses.replace(plan, notes=(note, *plan.notes))
    result: MergeResult = plan.run(output, **how)
    return result


def checked(store: Store, path: str, task: str) -> Plan:
    """The plan of a merge of one model, which fits the store's base and holds finite numbers alone.

    Raises:
        CfmergeError: it does not.
    """
    plan = make_plan(recipe_of(store, [Part(task, path)], "average", running=True))
    expert = plan.experts[0]
    for job in plan.work.merged:
        source = job.sources[0]
        for first in range(0, job.parameter.size, PIECE) if source else ():
            delta = expert.delta(str(source), first, min(PIECE, job.parameter.size - first))
            arrays = [delta.tensor] if isinstance(delta, Dense) else [delta.left, delta.right]
            if not all(np.isfinite(np.asarray(array, np.float32)).all() for array in arrays):
                raise CfmergeError(
                    f"expert {task!r} ({path}): tensor {source!r} holds NaN or infinity; it is not stored. Train it "
                    "again, or leave the task out"
                )
    return plan


def copied(store: Store, path: str, output: Path, how: Mapping[str, Any], note: str) -> None:
    """Writes one model as it is; an adapter, or a model whose form the options change, as the model that it makes."""
    of_output = [key for key in OF_OUTPUT if key in store.book.options]
    if path != store.base_path and (of_output or is_adapter(located(path, False, None))):
        merged(store, [Part("newest", path)], "task_arithmetic(scale=1.0)", output, how, note=note)
    elif of_output:
        options = {key: store.book.options[key] for key in of_output if key in {"format", "shard_size"}}
        convert(path, output, overwrite=how.get("overwrite", False), progress=how.get("progress"), **options)
    else:
        convert(path, output, overwrite=how.get("overwrite", False), progress=how.get("progress"))


def take_in(path: str, place: Path, progress: Progress | None) -> None:
    """Copies a model or an adapter, whole or not at all."""
    where = located(path, False, None)
    if not is_adapter(where):
        convert(path, place, overwrite=True, progress=progress)
        return
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if where.is_dir():
        shutil.copytree(where, part)
    else:
        part.mkdir(parents=True)
        shutil.copy2(where, part / where.name)
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of every merge as plain values.

    Raises:
        CfmergeError: one that a store's merges do not take.
    """
    unknown = [key for key in options if key not in (*OPTIONS, *OF_OUTPUT)]
    if unknown:
        raise CfmergeError(
            f"time: {unknown[0]!r} is no option of a store; there is: {', '.join((*OPTIONS, *OF_OUTPUT))}"
        )
    whole = as_recipe("base", [], "average", {}, dict(options))
    plain = msgspec.to_builtins(whole)
    return {key: plain[key] for key in options if plain[key] not in (None, [], False)}


def base_name(path: str | Path) -> str:
    """A base as the book has it: a name of the hub, or an absolute path."""
    return str(path) if hub.asked(path) else str(Path(path).expanduser().absolute())
