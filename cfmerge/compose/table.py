"""`composition.json`, the table of a composed result's directory: written, and read strictly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge.compose.entries import About, Entry
from cfmerge.errors import CfmergeError
from cfmerge.formats.composed import TABLE
from cfmerge.formats.layout import read_json

KIND, VERSION = "cfmerge-composition", 1
Heads = Mapping[str, Sequence[str]]  # {task: names of its heads}


def table_of(about: About, scales: Any, heads: Mapping[str, Sequence[str]]) -> str:
    """The content of `composition.json`."""
    content = {
        "format": KIND,
        "version": VERSION,
        "system": about.system,
        "tasks": list(about.tasks),
        "parameters": dict(about.parameters),
        **({} if scales is None else {"scales": dict(zip(about.tasks, map(float, scales), strict=True))}),
        "base": about.base,
        "base_bytes": about.base_bytes,
        "tensors": {name: _told(entry, len(about.tasks)) for name, entry in about.entries.items()},
        "base_sha256": dict(about.digests),
        "heads": {task: list(names) for task, names in heads.items()},
        "configs": dict(about.configs),
        "recipe": about.recipe,
    }
    return json.dumps(content, indent=1) + "\n"


def _told(entry: Entry, tasks: int) -> dict[str, Any]:
    parts = {
        part: {"shape": list(shape), "dtype": np.dtype(dtype).name} for part, (shape, dtype) in entry.parts.items()
    }
    told: dict[str, Any] = {"shape": list(entry.shape), "dtype": entry.dtype, "layout": entry.layout, "parts": parts}
    told["by_entry"] = entry.by_entry
    if entry.also:
        told["also"] = list(entry.also)
    if len(entry.tasks) < tasks:
        told["tasks"] = list(entry.tasks)
    return told


def read_table(place: Path) -> tuple[About, np.ndarray | None, Heads]:
    """All that the table of a directory tells, the tasks' numbers, and the names of their heads.

    Raises:
        CfmergeError: there is none, or it is another's, or it is not whole.
    """
    table = place / TABLE
    if not table.is_file():
        tangents = f"; it holds tangent components: compose.tangent_files.load({str(place)!r}, base)"
        more = tangents if (place / "tangents.json").is_file() else ""
        raise CfmergeError(f"{place}: holds no composed result: there is no {TABLE}{more}")
    content = read_json(table)
    if content.get("format") != KIND or content.get("version") != VERSION:
        found = f"{content.get('format')!r}, version {content.get('version')!r}"
        raise CfmergeError(f"{table}: should be {KIND!r}, version {VERSION}; found {found}")
    try:
        return (*_about(content), content["heads"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CfmergeError(f"{table}: is not whole, or was changed: {type(error).__name__}: {error}") from None


def _about(content: Mapping[str, Any]) -> tuple[About, np.ndarray | None]:
    tasks = tuple(content["tasks"])

    def entry(told: Mapping[str, Any]) -> Entry:
        parts = {part: (tuple(one["shape"]), dtype_of(one["dtype"])) for part, one in told["parts"].items()}
        own = tuple(told.get("tasks", range(len(tasks))))
        return Entry(
            tuple(told["shape"]),
            told["dtype"],
            told["layout"],
            parts,
            told["by_entry"],
            own,
            tuple(told.get("also", ())),
        )

    entries = {name: entry(told) for name, told in content["tensors"].items()}
    scales = np.array([content["scales"][task] for task in tasks], np.float64) if "scales" in content else None
    about = About(
        content["system"], tasks, content["parameters"], entries, content["base_sha256"], content["base"],
        content["base_bytes"], content["configs"], content["recipe"],
    )  # fmt: skip
    return about, scales


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
