"""A model whose layers are those of other models, under new numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfmerge.formats.base import Source, TensorInfo
from cfmerge.models.deltas import Delta, Dense


class Origin(NamedTuple):
    """The model that a tensor comes from, its name there, and a factor of it."""

    source: Source
    name: str
    factor: float = 1.0


class Stack:
    """A source of tensors of other sources: `origins` says which, by their new names.

    Config, side files, folders, metadata and ties are those of `main`.

    Args:
        main: the model that the output lies like.
        origins: `{name: Origin}` in the order of the output.
        edits: keys of config.json that change.
    """

    def __init__(self, main: Source, origins: Mapping[str, Origin], edits: Mapping[str, Any] | None = None):
        self.main, self.origins, self.edits = main, origins, dict(edits or {})
        used = (main, *(one.source for one in origins.values()))
        self.sources = list({id(source): source for source in used}.values())
        self.path: Path = main.path
        self.tensors: Mapping[str, TensorInfo] = {n: one.source.tensors[one.name] for n, one in origins.items()}
        self.config: Mapping[str, Any] = {**main.config, **self.edits}
        self.files = tuple(dict.fromkeys(file for source in self.sources for file in source.files))
        self.side_files, self.metadata, self.folders = main.side_files, main.metadata, main.folders
        self.ties: Mapping[str, str] = {alias: name for alias, name in main.ties.items() if name in origins}
        self.notes = tuple(dict.fromkeys(note for source in self.sources for note in source.notes))
        self.left_out = main.left_out

    def prepare(self) -> None:
        for source in self.sources:
            source.prepare()

    def grain(self, name: str) -> int:
        source, own, _ = self.origins[name]
        return source.grain(own)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        source, own, factor = self.origins[name]
        values = source.read(own, first, count)
        if factor == 1:
            return values
        compute = np.promote_types(np.float32, values.dtype) if values.dtype.itemsize > 2 else np.dtype(np.float32)
        return (values.astype(compute) * compute.type(factor)).astype(values.dtype)

    def rank(self, name: str) -> int | None:
        source, own, factor = self.origins[name]
        return source.rank(own) if factor == 1 else None

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        source, own, factor = self.origins[name]
        return source.delta(own, first, count) if factor == 1 else Dense(self.read(name, first, count))
