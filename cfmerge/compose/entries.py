"""What a composed result keeps of each tensor, and how that lies in its files.

A part of a tensor, such as the masks of `layer.weight`, is the tensor `masks/layer.weight` of the files. Masks are
packed, eight entries a byte, the first in the highest bit: `(T, ceil(entries / 8))`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.base import Header

PACKED = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is kept of one tensor.

    Attributes:
        shape, dtype: of the base's tensor.
        layout: in which its canonical matrices are seen; empty where it is taken as it is stored.
        parts: `{part: header}` as they lie in the files.
        by_entry: the last axes of its parts are the tensor's, and a part may be written in pieces.
        tasks: numbers of the tasks that it is kept of, in order; the others leave it at the base.
        also: further names that the base has the same tensor under.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str
    parts: Mapping[str, Header]
    by_entry: bool
    tasks: tuple[int, ...]
    also: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many canonical matrices the tensor stacks; its parts have an axis of them, the first, if it does."""
        return math.prod(size for size, at in zip(self.shape, self.layout, strict=False) if at == "b")

    def ranges(self, part: str, first: int, count: int) -> Iterator[tuple[int, int]]:
        """`(first, count)` of the part's flat entries that belong to so many entries of the tensor."""
        shape, dtype = self.parts[part]
        if not self.by_entry:
            each, own = self.size // self.matrices, math.prod(shape) // self.matrices
            yield first // each * own, count // each * own
            return
        row = self.size
        if dtype == PACKED:  # pieces begin at whole bytes
            first, count, row = first // 8, -(-(first + count) // 8) - first // 8, -(-row // 8)
        yield from ((start + first, count) for start in range(0, math.prod(shape), row))

    def pieces(self, part: str, values: Any, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """`(first, flat values)` of a part, out of its values for a piece of the tensor from entry `first` on."""
        array = np.asarray(values)
        if not self.by_entry:
            yield next(self.ranges(part, first, self.size))[0], array.reshape(-1)
            return
        shape, dtype = self.parts[part]
        row = -(-self.size // 8) if dtype == PACKED else self.size
        rows = array.reshape(math.prod(shape) // row, -1)
        count = rows.shape[1]
        rows = np.packbits(rows, axis=1) if dtype == PACKED else rows
        yield from ((start, own) for (start, _), own in zip(self.ranges(part, first, count), rows, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class About:
    """All of a composed result but its arrays.

    Attributes:
        system: `emr`, `tall`, `tsv_c` or `smile`.
        tasks: the experts' names, in order.
        parameters: the system's.
        entries: `{tensor: what is kept of it}`.
        digests: `{tensor of the base: SHA-256}`; empty of trees that were traced.
        base: the path of the base, in full, or its name on the hub.
        base_bytes: the size of its tensors.
        configs: `{task: {key of config.json: value}}`, where a task's head needs another.
        recipe: the recipe as YAML; empty of trees.
        place: the directory that it was loaded from.
        checked: `{tensor: array of JAX}` of a base, that were compared with the digests.
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
    place: Path | None = None
    checked: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def names(self) -> Mapping[str, str]:
        """`{name in the base: name of its entry}`: tensors that are tied have one."""
        return {own: name for name, entry in self.entries.items() for own in (name, *entry.also)}

    def number(self, task: str) -> int:
        """The number of a task. Raises `CfmergeError` if there is none of that name."""
        if task not in self.tasks:
            raise CfmergeError(f"unknown task {task!r}{nearest(task, self.tasks)}")
        return self.tasks.index(task)


def headers_of(entries: Mapping[str, Entry]) -> dict[str, Header]:
    """`{PART/NAME: header}` of all that is kept."""
    return {f"{part}/{name}": header for name, entry in entries.items() for part, header in entry.parts.items()}
