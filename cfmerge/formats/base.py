"""What every checkpoint format offers to the engine."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cfmerge.models import Shape


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's header: what can be known without reading it."""

    shape: Shape
    dtype: np.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """A model on disk: headers at once, tensors when asked for.

    Attributes:
        path: what the user named.
        tensors: `{name: TensorInfo}` in the order in which they lie in the files.
        config: the model's config.json, or {}.
        files: the files that hold tensors.
        side_files: config, tokenizer and other files beside them, `{name in the directory: path}`.
        ties: `{alias: name}`, tensors that are stored once under another name.
        metadata: the format's own metadata.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    side_files: Mapping[str, Path]
    ties: Mapping[str, str]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a read-only view of the mapped file where the format allows it."""
        ...
