"""A source over another: the same model with some of its tensors seen otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.formats.base import Folder, Source, TensorInfo
from cfmerge.models.deltas import Delta, Dense


class Wrapped:
    """The inner source, unchanged; a subclass changes what it sees otherwise.

    A subclass whose tensors differ overrides `read`; it says in `changed` which ones they are, and their deltas are
    dense.
    """

    changed: Mapping[str, Any] = {}

    def __init__(self, inner: Source):
        self.inner = inner
        self.path: Path = inner.path
        self.tensors: Mapping[str, TensorInfo] = inner.tensors
        self.config: Mapping[str, Any] = inner.config
        self.files: tuple[Path, ...] = inner.files
        self.side_files: Mapping[str, Path] = inner.side_files
        self.ties: Mapping[str, str] = inner.ties
        self.metadata: Mapping[str, str] = inner.metadata
        self.folders: tuple[Folder, ...] = inner.folders
        self.notes: tuple[str, ...] = inner.notes
        self.left_out: tuple[str, ...] = inner.left_out

    def prepare(self) -> None:
        self.inner.prepare()

    def grain(self, name: str) -> int:
        return 1 if name in self.changed else self.inner.grain(name)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        return self.inner.read(name, first, count)

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        return Dense(self.read(name, first, count)) if name in self.changed else self.inner.delta(name, first, count)

    def rank(self, name: str) -> int | None:
        return None if name in self.changed else self.inner.rank(name)
