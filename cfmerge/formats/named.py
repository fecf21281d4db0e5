"""A model's tensors as a mapping by name, each read when it is asked for; and some of a mapping's, by other names."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cfmerge.formats.base import Source, TensorInfo


class Tensors(Mapping[str, np.ndarray]):
    """A model's tensors by name, each read when it is asked for: read-only, of a mapped file as a view.

    Attributes:
        source: the model as `open_checkpoint` opens it.
        tensors: `{name: header}`, with `shape` and `dtype`; `config`, `metadata`: the model's.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self.config: Mapping[str, Any] = source.config
        self.metadata: Mapping[str, str] = source.metadata

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise KeyError(name)
        return self.source.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self.source.path}>"


class Chosen(Mapping[str, Any]):
    """Some of a mapping's values, each taken when it is asked for.

    Args:
        inner: the mapping.
        names: `{name: name in the mapping}`.
    """

    def __init__(self, inner: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.inner, self.names = inner, names

    def __getitem__(self, name: str) -> Any:
        return self.inner[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
