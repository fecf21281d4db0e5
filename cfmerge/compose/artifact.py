"""A composed result: parts of tensors, from which each task's model is made; and its directory.

    OUT/composition.json            the table: system, tasks, tensors and their parts, SHA-256 of the base's tensors
    OUT/model.safetensors           PART/NAME, or shards with an index
    OUT/heads/TASK.safetensors      heads that the models do not share

The base is not in it. See docs/compose.md.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.compose.deltas import delta_of
from cfmerge.compose.entries import About, headers_of
from cfmerge.compose.table import check_parts, read_table, table_of
from cfmerge.errors import CfmergeError, NonFiniteError, and_more, nearest
from cfmerge.formats import DirectorySink, Totals
from cfmerge.formats.composed import TABLE
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.formats.sinks import HEADS
from cfmerge.models import is_buffer


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
        return leaf if delta is None else added("base", name, leaf, delta)

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Raises `CfmergeError` unless the base's leaves are those that the result was made of; if traced by shape."""
        self.check_shapes({name: tuple(leaf.shape) for name, leaf in leaves.items()}, "base")
        for name, digest in self.about.digests.items():
            leaf = leaves.get(name)
            if leaf is None or isinstance(leaf, jax.core.Tracer) or self.about.checked.get(name) is leaf:
                continue
            check_digest("base", name, np.asarray(leaf), digest)
            if not isinstance(leaf, np.ndarray):  # nobody can write into it
                self.about.checked[name] = leaf

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], who: str) -> None:
        """Raises `CfmergeError` unless the base has the tensors that the result was made of, in their shapes."""
        lost = [name for name in self.about.digests if name not in shapes and not is_buffer(name, ())]
        if lost:
            raise CfmergeError(
                f"{who}: has no {and_more(list(map(repr, lost)))}, which the base had that the result was made of"
                f"{nearest(lost[0], shapes)}"
            )
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


def added(who: str, name: str, base: Any, delta: Any) -> Any:
    """Base plus delta, in the base's dtype.

    Raises:
        NonFiniteError: a NaN or infinity in it, unless it is traced.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        made = (base.astype(delta.dtype) + delta).astype(base.dtype)
    if not isinstance(made, jax.core.Tracer) and not finite(made):
        wrong = f"it does not fit {made.dtype}" if finite(delta) else "the result holds NaN or infinity"
        raise NonFiniteError(
            f"{who}: tensor {name!r} of the task's model holds NaN or infinity: {wrong}", source="", tensor=name
        )
    return made


def finite(array: Any) -> bool:
    """Whether an array holds neither NaN nor infinity: looked at where it lies."""
    return bool((np if isinstance(array, np.ndarray) else jnp).isfinite(array).all())


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
    about, scales, heads = read_table(place)
    source, table = HuggingFaceSource(place), place / TABLE
    parts: dict[str, dict[str, Any]] = {}
    for name, entry in about.entries.items():
        for part, (shape, dtype) in entry.parts.items():
            _check_part(source, table, f"{part}/{name}", shape, dtype)
            parts.setdefault(name, {})[part] = source.read(f"{part}/{name}")
    known = headers_of(about.entries)
    more = [name for name in source.tensors if name not in known]
    check_parts(table, about)
    if more:
        raise CfmergeError(f"{source.tensors[more[0]].file}: tensor {more[0]!r} is not in {table.name}")
    return Artifact(about, parts, scales, {task: _heads(place, task, names) for task, names in heads.items()})


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
