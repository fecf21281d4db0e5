"""A base with the integers, buffers and objects (no tensors) of another model: all that a merge does not touch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cfmerge.formats.base import Folder, Source
from cfmerge.formats.wrapped import Wrapped


class Unmerged(Wrapped):
    """The base with some tensors of another model, whose side files and metadata it has too.

    Args:
        inner: the base.
        other: the model that the tensors come from; their headers are those of the base.
        names: `{the base's name: the other's}` of these tensors.
    """

    def __init__(self, inner: Source, other: Source, names: Mapping[str, str]):
        super().__init__(inner)
        self.other, self.changed = other, names
        self.files = (*inner.files, *(file for file in other.files if file not in inner.files))
        self.side_files: Mapping[str, Path] = other.side_files
        self.left_out = other.left_out
        self.metadata = other.metadata
        self.folders = tuple(_with_objects(folder, other) for folder in inner.folders)

    @property
    def told(self) -> str:
        """The names, for the digest of a plan."""
        return f"{getattr(self.inner, 'told', '')} {sorted(self.changed.items())}"

    def prepare(self) -> None:
        self.inner.prepare()
        self.other.prepare()

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        if name in self.changed:
            return self.other.read(self.changed[name], first, count)
        return self.inner.read(name, first, count)


def _with_objects(folder: Folder, other: Source) -> Folder:
    """The folder with the metadata and the objects of the other model's, where this has it in the same format."""
    theirs = next((one for one in other.folders if (one.prefix, one.format) == (folder.prefix, folder.format)), None)
    return dataclasses.replace(folder, metadata=theirs.metadata, like=theirs.like) if theirs else folder
