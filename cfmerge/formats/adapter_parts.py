"""The parts of an adapter: each changes one tensor of its model, whose name is as the adapter has it.

    Pair    W + s B A; with a magnitude m (DoRA) m (W + s B A) / norms, norms over the other axes
    Full    a tensor in place of the model's
    Rows    rows in place of the model's, as many as there are indices
    Added   W + s b

The formulas are those of PEFT's `merge_and_unload`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cfmerge.formats.base import Container
from cfmerge.models import Shape

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Targeted:
    """A change of one tensor.

    Attributes:
        targets: the tensor's name; several where the base, or its shape, decides which.
    """

    targets: tuple[str, ...]

    @property
    def target(self) -> str:
        return self.targets[0]


@dataclasses.dataclass(frozen=True)
class Pair(Targeted):
    """A product of two factors.

    Attributes:
        down, up: the names of A and B in the file.
        shapes: theirs.
        scale: `alpha / r` or the like.
        rank: r; where experts of a mixture are stacked, each one's.
        form: `matrix`: A (r, in, ...), B (out, r); `embedding`: A (r, rows), B (columns, r); `stack`: A (E r, in),
            B (out, r E).
        turned: whether the adapter says that the tensor is stored `(in, out)`.
        magnitude: the name of DoRA's vector.
        numbers: rank and scale for each of the targets, where they may differ.
        input_norms: a magnitude of shape (1, in, ...) belongs to the inputs, as LyCORIS has it.
    """

    down: str
    up: str
    shapes: tuple[Shape, Shape]
    scale: float
    rank: int
    form: Literal["matrix", "embedding", "stack"] = "matrix"
    turned: bool = False
    magnitude: str = ""
    input_norms: bool = False
    numbers: tuple[tuple[int, float], ...] = ()

    @property
    def rows(self) -> int:
        """The rows of `B A`."""
        return self.shapes[1][0]

    @property
    def shape(self) -> Shape:
        """The shape of the tensor, as far as the factors tell it."""
        inner = self.shapes[0][1:]
        if self.form == "embedding":
            return (*inner, self.rows)
        return (*inner, self.rows) if self.turned and len(inner) == 1 else (self.rows, *inner)


@dataclasses.dataclass(frozen=True)
class Full(Targeted):
    name: str  # in the file, as of all that follow


@dataclasses.dataclass(frozen=True)
class Rows(Targeted):
    name: str
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Added(Targeted):
    name: str
    scale: float


Part = Pair | Full | Rows | Added


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's file, and what its parts do.

    Attributes:
        path: as the user named it.
        container: the file.
        files: all that it is made of.
        parts: what it changes.
        trained_on: the name of the base that it says it was trained on; "" if it says nothing.
        tied: a tensor under one of several tied names is meant for all of them.
        notes: notes for the user.
    """

    path: Path
    container: Container
    files: tuple[Path, ...]
    parts: Sequence[Part]
    trained_on: str = ""
    tied: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Product:
    """A pair that has found its tensor, or one expert's share of a stack that the base stores one by one.

    Attributes:
        turned: the tensor is stored `(in, out)`.
        number: which expert; None: the pair is no stack, or the tensor is one too.
        part: where the rows of `B A` that the tensor has begin and end; None: all.
    """

    pair: Pair
    turned: bool = False
    number: int | None = None
    part: tuple[int, int] | None = None

    @property
    def stacked(self) -> bool:
        return self.pair.form == "stack" and self.number is None

    def factors(self, read: Read, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`(left, right)` in rows and columns of the tensor as it is stored, the scale in `left`; of one expert."""
        pair, number = self.pair, self.number if number is None else number
        down, up = (read(name).astype(np.float32) for name in (pair.down, pair.up))
        if number is not None:
            count = len(down) // pair.rank
            down = down.reshape(count, pair.rank, -1)[number]
            up = up.reshape(len(up), pair.rank, count)[:, :, number]
        left = up.reshape(pair.rows, pair.rank)[slice(*(self.part or (None,)))]
        right = down.reshape(pair.rank, -1)
        left, right = (right.T, left.T) if self.turned else (left, right)
        return np.float32(pair.scale) * np.ascontiguousarray(left), np.ascontiguousarray(right)
