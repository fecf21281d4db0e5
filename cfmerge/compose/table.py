"""`composition.json`, the table of a composed result's directory: written, and read strictly."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge.compose.entries import PACKED, About, Entry
from cfmerge.errors import CfmergeError
from cfmerge.formats.composed import TABLE
from cfmerge.formats.layout import read_json

KIND, VERSION = "cfmerge-composition", 1
Heads = Mapping[str, Sequence[str]]  # {task: names of its heads}
MASKED = [{"shared", "masks"}, {"delta"}]
PARTS = {  # that a system keeps of a tensor
    "emr": MASKED, "tall": MASKED, "tsv_c": [{"up", "down"}, {"delta"}],
    "smile": [{"up", "down", "router"}, {"up", "router"}, {"bias"}, {"mean"}],
}  # fmt: skip


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
        about, scales = _about(content, place)
        heads = {task: _texts(names) for task, names in content["heads"].items()}
        for task in (*heads, *about.configs):
            about.number(task)
            if task in {".", ".."} or {*task} & {*"/\\"}:
                raise CfmergeError(f"task {task!r} cannot be a file's name")
        return about, scales, heads
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = str(error) if isinstance(error, CfmergeError) else f"{type(error).__name__}: {error}"
        raise CfmergeError(f"{table}: is not whole, or was changed: {told}") from None


def _about(content: Mapping[str, Any], place: Path) -> tuple[About, np.ndarray | None]:
    tasks, system = _texts(content["tasks"]), content["system"]
    if len(set(tasks)) < len(tasks) or not tasks:
        raise CfmergeError(f"tasks should be names, each once, found {list(tasks)}")
    if system not in PARTS:
        raise CfmergeError(f"system should be one of {', '.join(PARTS)}, found {system!r}")
    entries = {name: _entry(name, told, len(tasks), system) for name, told in content["tensors"].items()}
    scales = None
    if system == "emr":
        scales = np.array([content["scales"][task] for task in tasks], np.float64)
        if not np.isfinite(scales).all():
            raise CfmergeError(f"scales should be finite, found {content['scales']}")
    digests, configs, parameters = (dict(content[key]) for key in ("base_sha256", "configs", "parameters"))
    texts = (content["base"], content["recipe"], *digests.values())
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(own, dict) for own in configs.values()):
        raise CfmergeError("base, recipe and base_sha256 should be texts, configs objects")
    about = About(
        system, tasks, parameters, entries, digests, content["base"], _number(content["base_bytes"]), configs,
        content["recipe"], place,
    )  # fmt: skip
    names = [own for name, entry in entries.items() for own in (name, *entry.also)]
    if len(set(names)) < len(names):
        raise CfmergeError("a tensor is told of twice: see its key 'also'")
    return about, scales


def _entry(name: str, told: Mapping[str, Any], tasks: int, system: str) -> Entry:
    """What is kept of one tensor; its parts are those of the system, in the shapes that the tensor has."""
    parts = {part: (_numbers(one["shape"]), dtype_of(one["dtype"])) for part, one in told["parts"].items()}
    own = _numbers(told.get("tasks", range(tasks)))
    shape, layout, by_entry = _numbers(told["shape"]), told["layout"], told["by_entry"]
    if not own or list(own) != sorted({*own}) or own[-1] >= tasks:
        raise CfmergeError(f"tensor {name!r}: tasks should be numbers below {tasks}, in order, found {list(own)}")
    if set(parts) not in PARTS[system]:
        raise CfmergeError(f"tensor {name!r}: {system} keeps no parts {sorted(parts)}")
    if not isinstance(by_entry, bool) or by_entry == ("up" in parts):
        raise CfmergeError(f"tensor {name!r}: by_entry should be {str('up' not in parts).lower()}, found {by_entry}")
    if layout and (len(layout) != len(shape) or not {*layout} <= {*"boi"}):
        raise CfmergeError(f"tensor {name!r}: layout should be a letter of b, o and i an axis, found {layout!r}")
    return Entry(shape, dtype_of(told["dtype"]).name, layout, parts, by_entry, own, _texts(told.get("also", ())))


def check_parts(table: Path, about: About) -> None:
    """Raises `CfmergeError` unless all parts have shapes that their tensors' parts can have."""
    for name, entry in about.entries.items():
        for part, (found, dtype) in entry.parts.items():
            if (dtype == PACKED) != (part == "masks") or not _fits(entry, part, found, len(about.tasks)):
                raise CfmergeError(
                    f"{table}: was changed: tensor {name!r} has shape {entry.shape}, and its part {part!r} cannot be "
                    f"{dtype.name} {found}"
                )


def _fits(entry: Entry, part: str, found: tuple[int, ...], tasks: int) -> bool:
    """Whether a part's shape is one that the tensor's can have."""
    rows, shape = len(entry.tasks), entry.shape
    by_entry = {"shared": shape, "mean": shape, "delta": (rows, *shape), "bias": (tasks, *shape)}
    if part == "masks":
        return found == (rows, -(-entry.size // 8))
    if part in by_entry:
        return found == by_entry[part]
    lead = (entry.matrices,) if "b" in entry.layout else ()
    m = math.prod(size for size, at in zip(shape, entry.layout or "oi", strict=True) if at == "o")
    n = entry.size // max(entry.matrices * m, 1) if entry.layout else shape[1]
    inner = entry.parts["down"][0][-2] if "down" in entry.parts and len(entry.parts["down"][0]) > 1 else n
    last = {"up": (m, inner), "down": (inner, n)}.get(part, (found[-2:-1] or (0,)) + (n,))
    return len(found) == len(lead) + 3 and found[: len(lead)] == lead and found[-2:] == last and found[-3] == tasks


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CfmergeError(f"a whole number that is not negative is expected, found {value!r}")
    return value


def _numbers(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(_number, values))


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    found = () if isinstance(values, str) else tuple(values)
    if isinstance(values, str) or not all(isinstance(value, str) for value in found):
        raise CfmergeError(f"a list of names is expected, found {values!r}")
    return found


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
