"""Merges of a store's models: ordinary recipes over its base, with the options that the store was made with."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cfmerge import hub
from cfmerge.engine.checks import check_agreement
from cfmerge.errors import CfmergeError
from cfmerge.formats import Source
from cfmerge.formats.adapters import is_adapter
from cfmerge.formats.naming import format_by_name, in_format
from cfmerge.models import is_float
from cfmerge.models.deltas import Dense
from cfmerge.models.names import unchanged
from cfmerge.planning.unmerged import BASE
from cfmerge.products.convert import convert
from cfmerge.products.convert import copied as copied_files
from cfmerge.products.plan import Plan, as_recipe, make_plan
from cfmerge.recipe import Expert, Recipe
from cfmerge.report.result import MergeResult
from cfmerge.temporal.card import OverTime, served
from cfmerge.temporal.rules import rule
from cfmerge.temporal.store import Store

# what a store's merges may be told; `of_output` alone are for the model that goes out, not for running models
OPTIONS = (
    "unmerged", "rules", "rename", "heads", "allow", "precision", "dequantize", "seed", "plugins", "download",
    "cache_dir",
)  # fmt: skip
OF_OUTPUT = ("dtype", "format", "shard_size", "side_files")
ALLOWED = ("one-expert", "duplicate-experts", "base-as-expert")  # a running model may be any of these
UNMERGED, NEWEST = "unmerged", "newest"
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
    options = {key: told[key] for key in OPTIONS if key in told} | ({UNMERGED: BASE} if UNMERGED in told else {})
    options |= {} if running else {**of_output(store), **unmerged(store)}
    if running and any(is_float(i.dtype.name) and i.dtype.itemsize < 4 for i in store.base.tensors.values()):
        options["dtype"] = "float32"
    options["allow"] = sorted({*told.get("allow", ()), *ALLOWED})
    experts = [Expert(path=part.path, name=part.name, weight=part.weight) for part in parts]
    return as_recipe(store.base_path, experts, method, {}, options)


def unmerged(store: Store) -> dict[str, Any]:
    """The option that says whose integers, buffers and objects a model has that goes out: the newest expert's."""
    if store.book.options.get(UNMERGED) != NEWEST or not store.experts:
        return {}
    path = store.readable(store.experts[-1])
    return {} if is_adapter(store.located(path)) else {UNMERGED: path}


def of_output(store: Store) -> dict[str, Any]:
    """The options of the models that go out."""
    return {key: store.book.options[key] for key in OF_OUTPUT if key in store.book.options}


def merged(
    store: Store,
    parts: Sequence[Part],
    method: str,
    output: Path,
    how: Mapping[str, Any],
    *,
    told: OverTime | None = None,
    statistics: Path | None = None,
) -> MergeResult:
    """The result of a merge over the store's base.

    Args:
        told: of a model that goes out, what its card says; None: it is a running model.
        statistics: a directory of them, in place of the parts.
    """
    recipe = recipe_of(store, parts, method, running=told is None)
    if statistics is not None:
        recipe = msgspec.structs.replace(recipe, statistics=str(statistics))
    plan = make_plan(recipe)
    result: MergeResult = (plan if told is None else served(plan, told)).run(output, **how)
    return result


def check_expert(store: Store, path: str, task: str) -> None:
    """Raises `CfmergeError` unless a model fits the store's base: headers, finite numbers alone, and the integers.

    These must be the base's where a rule merges, unless the store's options say which ones are kept.
    """
    name = re.sub(r"[/\\\0[\]]+", "_", task).strip(".") or "expert"  # as experts may be called in a recipe
    plan = make_plan(recipe_of(store, [Part(name, path)], "average", running=True))
    if any(rule(text).name not in {"base", "last"} for text in (store.book.init, store.book.deploy)):
        _check_agreement(plan)
    for job in plan.work.merged:
        source = job.sources[0]
        if source is not None and not _is_finite(plan.experts[0], source, job.parameter.size):
            raise CfmergeError(
                f"expert {task!r} ({path}): tensor {source!r} holds NaN or infinity; it is not stored. Train it again, "
                "or leave the task out"
            )


def _is_finite(expert: Source, name: str, size: int) -> bool:
    for first in range(0, size, PIECE):
        delta = expert.delta(name, first, min(PIECE, size - first))
        arrays = [delta.tensor] if isinstance(delta, Dense) else [delta.left, delta.right]
        if not all(np.isfinite(np.asarray(array, np.float32)).all() for array in arrays):
            return False
    return True


def _check_agreement(plan: Plan) -> None:
    """Raises `CfmergeError` where a tensor that is not merged differs from the base's."""
    for job in plan.work.jobs:
        if job.assignment.agree:
            try:
                check_agreement(plan.work, job, plan.work.base.tensors.read(job.name))
            except CfmergeError as error:
                raise CfmergeError(
                    f"{error}; for the newest expert's: --{UNMERGED} {NEWEST}. A store takes these when it is made"
                ) from None


def copied(
    store: Store, path: str, output: Path, how: Mapping[str, Any], told: OverTime, *, by_rules: bool = False
) -> None:
    """Writes one model as it is, in files that lie as the base's do.

    An adapter, or a model of other names, shapes or dtypes than the output's, is added to the base.

    Args:
        by_rules: exceptions to the method, which may keep the base's tensors, are for it too.
    """
    changing = [*OF_OUTPUT, *(("rules", "heads") if by_rules else ())]
    if any(key in store.book.options for key in changing) or is_adapter(store.located(path)):
        merged(store, [Part("newest", path)], "task_arithmetic(scale=1.0)", output, how, told=told)
        return
    options: dict[str, Any] = {key: how[key] for key in ("overwrite", "progress") if how.get(key) is not None}
    if path == store.base_path:
        convert(store.base, output, **options)
        return
    source, base = store.source(path), store.base
    headers = _headers(source)
    if headers != _headers(base):
        merged(store, [Part("newest", path)], "task_arithmetic(scale=1.0)", output, how, told=told)
        return
    format, files = format_by_name(output, None), source.side_files or base.side_files
    folders = [in_format(folder, format) for folder in base.folders]
    copied_files(source, output, unchanged(headers), folders, format, files, **options)


def _headers(source: Source) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (info.shape, info.dtype) for name, info in source.tensors.items()}


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
    if options.get(UNMERGED) not in {None, BASE, NEWEST}:
        raise CfmergeError(f"time: {UNMERGED}={options[UNMERGED]!r}: write {BASE}, or {NEWEST} for the newest expert's")
    whole = as_recipe("base", [], "average", {}, dict(options))
    plain = msgspec.to_builtins(whole)
    return {key: plain[key] for key in options if plain[key] not in (None, [], False)}


def base_name(path: str | Path) -> str:
    """A base as the book has it: a name of the hub, or an absolute path."""
    return str(path) if hub.asked(path) else str(Path(path).expanduser().absolute())
