"""The two sides of every format: a `Source` is where tensors come from, a `Sink` is where they go.

A format is one file beside this one. It is a Source, a Sink or both; `open_checkpoint` chooses a Source by what the
files hold, `open_sink` a Sink by the output's name. The engine knows no format, a format knows no method.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from cfmerge.models import Shape
from cfmerge.models.deltas import Delta

Header = tuple[Shape, np.dtype]


def bytes_of(header: Header) -> int:
    """How many bytes a tensor has."""
    return math.prod(header[0]) * np.dtype(header[1]).itemsize


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's header: all that is known without reading it."""

    shape: Shape
    dtype: np.dtype
    file: Path

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Folder:
    """The weights in one folder of a model as they lie, so that an output can lie as its base does.

    Attributes:
        prefix: the beginning of its tensors' names; "" for the main one.
        name: its path below the model's directory; "" for the directory itself.
        stem: `STEM.safetensors`, `STEM-00001-of-00002.safetensors`.
        index: the name of the index of its shards.
        sharded: whether its client looks for an index at all; otherwise it is one file, however large.
        declared: whether the model says that it consists of such folders; otherwise it may hold something else.
        metadata: its first file's, text.
        format: its files', a key of `containers.FORMATS`.
        suffix: its files'.
        ties: `{alias: name}` of names that its files hold once, without the prefix.
        key: the entry under which its files have their tensors, in a format that has such.
        like: the container that it was read from, where a writer copies from it what is no tensor.
    """

    prefix: str = ""
    name: str = ""
    stem: str = "model"
    index: str = "model.safetensors.index.json"
    sharded: bool = True
    declared: bool = True
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: str = "safetensors"
    suffix: str = ".safetensors"
    ties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    key: str = ""
    like: "Container | None" = None


class Container(Protocol):
    """One file, or one directory, of named tensors: headers when it is opened, tensors when asked for.

    A model on disk is one container or several. Reading is safe from several threads.

    Attributes:
        path: the file or directory that was named.
        files: the files that hold the tensors.
        tensors: `{name: TensorInfo}` in the order in which they lie.
        metadata: the format's own, text.
        ties: `{alias: name}`: names that are stored once under another, and are not among `tensors`.
        notes: notes for the user on reading it.
    """

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def ties(self) -> Mapping[str, str]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def grain(self, name: str) -> int:
        """See `Source`."""
        ...

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """See `Source`."""
        ...


class Checksum(NamedTuple):
    """A CRC-32 of so many bytes of a file, which stands in it at some places, 4 bytes little-endian."""

    first: int
    size: int
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """Where everything lies in a file that is written: all but the tensors' bytes is known before the first of them.

    Attributes:
        size: of the whole file.
        fixed: `(offset, bytes)` of all that is no tensor.
        places: `{name: offset}` of the tensors; or of pieces of one, `((first byte in the tensor, offset), ...)`.
        checksums: those that are written when the tensors are.
    """

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    places: Mapping[str, int | tuple[tuple[int, int], ...]]
    checksums: tuple[Checksum, ...] = ()


class Source(Protocol):
    """A model on disk: headers at once, tensors when asked for. Reading is safe from several threads.

    Attributes:
        path: the path that the user named.
        tensors: `{name: TensorInfo}` in the order in which they lie in the files.
        config: the model's config.json, or {}.
        files: the files that hold tensors.
        side_files: config, tokenizer and other files beside them, `{name in the directory: path}`.
        ties: `{alias: name}`, tensors that are stored once under another name.
        metadata: the format's own metadata, text.
        folders: how the weights lie; the first is the main one.
        notes: notes for the user on reading it: files that are not read, metadata that is odd.
        left_out: why an output lacks files that lie beside the base's weights; notes too, of a base alone.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    side_files: Mapping[str, Path]
    ties: Mapping[str, str]
    metadata: Mapping[str, str]
    folders: tuple[Folder, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    def prepare(self) -> None:
        """Looks at the whole model, where its tensors cannot be told before (a permutation that is matched, say).

        The loop calls it once, before it reads, and it may read tensors. Most sources have nothing to do.
        """
        ...

    def grain(self, name: str) -> int:
        """The least number of flat entries that are read at once: 1 for mapped files, a chunk where chunks are packed.

        `read` takes any range; one that is no multiple of the grain costs what the multiples around it cost.
        """
        ...

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The whole tensor in its shape; with `count`, so many entries of the flat tensor from `first` on.

        It is read-only, and a view of the mapped file where the format allows it.
        """
        ...

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        """An expert's delta, in the form that the format has, of a tensor or of so many flat entries.

        A model's own tensor is `Dense`: its delta is the tensor less the base's. An adapter has `Factors` and no
        tensor: its delta is their product, exactly, wherever its base lies.
        """
        ...

    def rank(self, name: str) -> int | None:
        """The rank of the factors that `delta` will have, known from headers; None where the delta is dense.

        It is 0 of a tensor that an adapter does not touch.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Totals:
    """The facts of an output that are known only when all tensors are written.

    Attributes:
        card: the text of README.md.
        heads: `(expert, {name: tensor})` of the heads that are written beside the model, one expert at a time.
        files: `{name: text}` of other small files.
    """

    card: str = ""
    heads: Iterable[tuple[str, Mapping[str, np.ndarray]]] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Sink(Protocol):
    """An output that appears whole or not at all: `with sink:`, then these calls in this order.

        declare(headers) -> write(name, values, first) ... -> finish(totals) -> commit()

    Leaving the `with` block without `commit` removes all that was written. Errors of the file system (a full disk, no
    permission) are `CfmergeError`s that name the output, from every call.

    Attributes:
        target: the directory or the file that appears.
        notes: notes for the user on writing it.
    """

    target: Path
    notes: tuple[str, ...]

    def __enter__(self) -> "Sink":
        """Takes hold of the place. Raises `CfmergeError` if there is something that may not be replaced."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`abort`, unless it was committed."""
        ...

    def declare(self, headers: Mapping[str, Header]) -> None:
        """Names, shapes and dtypes of all tensors, before the first `write`: the space for them is reserved here."""
        ...

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Writes a tensor, or a piece of the flat tensor from entry `first` on; in any order, from any thread."""
        ...

    def finish(self, totals: Totals) -> None:
        """Checks that every tensor is there as a whole, and writes what stands beside them."""
        ...

    def commit(self) -> None:
        """Flushes everything to the disk and gives the output its final name."""
        ...

    def abort(self) -> None:
        """Closes and removes everything that was written; nothing happens after `commit`, or a second time."""
        ...
