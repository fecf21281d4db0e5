"""A composed result: parts of tensors, from which each task's model is made; and its directory.

    OUT/composition.json            the table: system, tasks, tensors and their parts, SHA-256 of the base's tensors
    OUT/model.safetensors           PART/NAME, or shards with an index
    OUT/heads/TASK.safetensors      heads that the models do not share

The base is not in it. See docs/compose.md.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from cfmerge.compose.deltas import delta_of
from cfmerge.compose.entries import Entry
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import DirectorySink, Totals
from cfmerge.formats.base import Header
from cfmerge.formats.composed import TABLE
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.formats.layout import read_json
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.formats.sinks import HEADS

KIND, VERSION = "cfmerge-composition", 1


@dataclasses.dataclass(frozen=True, eq=False)
class About:
    """All of a composed result but its arrays.

    Attributes:
        system: `emr`, `tall`, `tsv_c` or `smile`.
        tasks: the experts' names, in order.
        parameters: the system's.
        entries: `{tensor: what is kept of it}`.
        digests: `{tensor of the base: SHA-256}`; empty of trees that were traced.
        base: the path of the base, as it was given.
        base_bytes: the size of its tensors.
        configs: `{task: {key of config.json: value}}`, where a task's head needs another.
        recipe: the recipe as YAML; empty of trees.
    """

    system: str
    tasks: tuple[str, ...]
    parameters: Mapping[str, Any]
    entries: Mapping[str, Entry]
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""
    base_bytes: int = 0
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    recipe: str = ""

    @functools.cached_property
    def names(self) -> Mapping[str, str]:
        """`{name in the base: name of its entry}`: tensors that are tied have one."""
        return {own: name for name, entry in self.entries.items() for own in (name, *entry.also)}

    def number(self, task: str) -> int:
        """The number of a task. Raises `CfmergeError` if there is none of that name."""
        if task not in self.tasks:
            raise CfmergeError(f"unknown task {task!r}{nearest(task, self.tasks)}")
        return self.tasks.index(task)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "scales", "heads"], meta_fields=["about"])
@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A composed result: a pytree of arrays, and what is known about them.

        >>> base = {"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> moved = {"math": 1.0, "code": -2.0}
        >>> experts = {name: jax.tree.map(lambda leaf: leaf + by, base) for name, by in moved.items()}
        >>> made = compose.build(base, experts, "emr")
        >>> made.materialise("math", base)["layer"]["bias"].tolist()
        [0.0, 0.0, 0.0]
        >>> made.materialise("code", base)["layer"]["bias"].tolist()
        [-2.0, -2.0, -2.0]

    Attributes:
        about: the system, tasks, entries.
        parts: `{tensor: {part: array}}`; of a directory, views of the mapped files.
        scales: each task's number, `(T,)`; None: the system has none.
        heads: `{task: {tensor: array}}` of heads that the models do not share.
    """

    about: About
    parts: Mapping[str, Mapping[str, Any]]
    scales: Any = None
    heads: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def system(self) -> str:
        return self.about.system

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.about.tasks

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the base is not among them."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.parts, self.heads)))

    def delta(self, task: str, name: str, first: int = 0, count: int | None = None, dtype: Any = np.float32) -> Any:
        """The delta of one tensor for a task, in its stored shape, or so many flat entries of it; None: there is none.

        Args:
            name: of the base's tensor.
            first, count: from which entry on how many; no count: all.
            dtype: computed in.
        """
        own = self.about.names.get(name)
        number = self.about.number(task)
        if own is None or number not in self.about.entries[own].tasks:
            return None
        scale = None if self.scales is None else self.scales[number]
        return delta_of(self.about.entries[own], self.parts[own], number, scale, first, count, dtype)

    def materialise(self, task: str, base: Any) -> Any:
        """The tree of parameters of one task: base plus delta, in the base's dtypes.

        Works under `jit`. Outside of it the base's leaves are compared with those that the result was made of. To
        write a checkpoint, see `cfmerge.compose.materialise`.

        Raises:
            CfmergeError: an unknown task, another base.
        """
        leaves, treedef = flatten(base)
        self.check(leaves)
        made = {name: self._materialised(task, name, leaf) for name, leaf in leaves.items()}
        return unflatten(treedef, made)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """The directory that the result is written into; it appears when it is complete. `load` reads it.

        Raises:
            CfmergeError: there is something, or the name is that of a file.
        """
        about = self.about
        headers, heads = headers_of(about.entries), {task: list(own) for task, own in self.heads.items()}
        with DirectorySink(Path(directory), overwrite=overwrite) as sink:
            sink.declare(headers)
            for name, entry in about.entries.items():
                for part in entry.parts:
                    sink.write(f"{part}/{name}", np.asarray(self.parts[name][part]))
            card = f"# {about.system} of {len(about.tasks)} tasks\n\n{', '.join(about.tasks)}\n"
            sink.finish(Totals(card, self.heads.items(), {TABLE: table_of(about, self.scales, heads)}))  # type: ignore[arg-type]
            sink.commit()
        return sink.target

    def apply(self, function: Callable[..., Any], base: Any, task: str, *inputs: Any, **how: Any) -> Any:
        """`function(parameters of the task, *inputs)`."""
        return function(self.materialise(task, base), *inputs, **how)

    def _materialised(self, task: str, name: str, leaf: Any) -> Any:
        delta = self.delta(task, name, dtype=computing(leaf.dtype))
        return leaf if delta is None else (leaf.astype(delta.dtype) + delta).astype(leaf.dtype)

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Raises `CfmergeError` unless the base's leaves are those that the result was made of; if traced by shape."""
        self.check_shapes({name: tuple(leaf.shape) for name, leaf in leaves.items()}, "base")
        for name, digest in self.about.digests.items():
            if name in leaves and not isinstance(leaves[name], jax.core.Tracer):
                check_digest("base", name, np.asarray(leaves[name]), digest)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], who: str) -> None:
        """Raises `CfmergeError` unless the base has the tensors that the result was made of, in their shapes."""
        for name, entry in ((own, self.about.entries[of]) for own, of in self.about.names.items()):
            if name not in shapes:
                raise CfmergeError(f"{who}: has no {name!r}, which the result was made of{nearest(name, shapes)}")
            if shapes[name] != entry.shape:
                raise CfmergeError(
                    f"{who}: {name!r} has shape {shapes[name]}, expected {entry.shape}: the result was made of another "
                    "base"
                )


def computing(dtype: Any) -> Any:
    """The dtype in which a tensor's delta is computed and added."""
    return np.float64 if dtype == np.float64 else np.float32


def digest_of(array: np.ndarray) -> str:
    """The SHA-256 of a tensor: of its dtype and its bytes in order."""
    digest = hashlib.sha256(f"{array.dtype.name}\0".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_digest(who: str, name: str, array: np.ndarray, expected: str) -> None:
    """Raises `CfmergeError` unless a tensor of the base is the one of that digest."""
    found = digest_of(array)
    if found != expected:
        raise CfmergeError(
            f"{who}: tensor {name!r} is not that of the base which the result was made of: SHA-256 {found[:12]}..., "
            f"expected {expected[:12]}...; name that base, or build the result again over this one"
        )


# --- the directory -----------------------------------------------------------------------------------------------


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


def load(path: str | Path) -> Artifact:
    """The composed result in a directory; its arrays are views of the mapped files.

        >>> made = compose.build("base", ["math", "code"], "tall", output="composed")
        >>> found = compose.load("composed")
        >>> found.system, found.tasks, sorted(found.parts["layer.weight"])
        ('tall', ('math', 'code'), ['masks', 'shared'])

    Raises:
        CfmergeError: there is no such result, its table is none, or its files are not whole.
    """
    place = Path(path).expanduser()
    table = place / TABLE
    if not table.is_file():
        raise CfmergeError(f"{place}: holds no composed result: there is no {TABLE}")
    content = read_json(table)
    if content.get("format") != KIND or content.get("version") != VERSION:
        found = f"{content.get('format')!r}, version {content.get('version')!r}"
        raise CfmergeError(f"{table}: should be {KIND!r}, version {VERSION}; found {found}")
    try:
        about, scales = _about(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CfmergeError(f"{table}: is not whole, or was changed: {type(error).__name__}: {error}") from None
    source = HuggingFaceSource(place)
    parts: dict[str, dict[str, Any]] = {}
    for name, entry in about.entries.items():
        for part, (shape, dtype) in entry.parts.items():
            _check_part(source, table, f"{part}/{name}", shape, dtype)
            parts.setdefault(name, {})[part] = source.read(f"{part}/{name}")
    more = [name for name in source.tensors if name.partition("/")[2] not in about.entries]
    if more:
        raise CfmergeError(f"{source.tensors[more[0]].file}: tensor {more[0]!r} is not in {table.name}")
    heads = {task: _heads(place, task, names) for task, names in content.get("heads", {}).items()}
    return Artifact(about, parts, scales, heads)


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


def _check_part(source: HuggingFaceSource, table: Path, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    info = source.tensors.get(name)
    if info is None:
        raise CfmergeError(f"{source.path}: lacks {name!r}, which {table.name} tells of: the result is not whole")
    if (info.shape, info.dtype) != (shape, dtype):
        raise CfmergeError(
            f"{info.file}: {name!r} is {info.dtype.name} {info.shape}, expected {np.dtype(dtype).name} {shape}, as "
            f"{table.name} tells"
        )


def _heads(place: Path, task: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    file = place / HEADS / f"{task}.safetensors"
    if not file.is_file():
        raise CfmergeError(f"{file}: is not there, and {TABLE} tells of the heads of task {task!r}")
    source = HuggingFaceSource(file)
    if set(source.tensors) != set(names):
        raise CfmergeError(f"{file}: has {', '.join(source.tensors)}, expected {', '.join(names)}, as {TABLE} tells")
    return {name: source.read(name) for name in names}


def headers_of(entries: Mapping[str, Entry]) -> dict[str, Header]:
    """`{PART/NAME: header}` of all that is kept."""
    return {f"{part}/{name}": header for name, entry in entries.items() for part, header in entry.parts.items()}
