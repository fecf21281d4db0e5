"""The sink of a composed result: the parts of its tensors as tensors of their own."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.compose.entries import Entry
from cfmerge.formats import DirectorySink, Folder
from cfmerge.formats.base import Header
from cfmerge.formats.ranges import Covered, Range
from cfmerge.formats.sinks import FORMAT


class PartsSink(DirectorySink):
    """A directory of parts, written as a merge of their tensors goes on.

    Args:
        entries: what is kept of each tensor.
        **how: see `DirectorySink`.
    """

    def __init__(self, target: Path, entries: Mapping[str, Entry], **how: Any):
        super().__init__(target, (Folder(),), metadata=FORMAT, **how)
        self._entries = entries

    def declare(self, headers: Mapping[str, Header], done: Covered | None = None) -> None:
        super().declare(headers, None if done is None else Covered(self._ranges(done.ranges())))

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Nothing: a tensor that stays as it is in the base is not kept."""

    def write_parts(self, name: str, parts: Mapping[str, Any], first: int) -> None:
        """Writes all parts of a tensor, or of a piece of it from entry `first` on."""
        entry = self._entries[name]
        for part, values in parts.items():
            for start, own in entry.pieces(part, values, first):
                super().write(f"{part}/{name}", own, start)

    def covers(self, ranges: Iterable[Range]) -> None:
        super().covers(self._ranges(ranges))

    def _ranges(self, ranges: Iterable[Range]) -> Iterator[Range]:
        for name, first, count in ranges:
            entry = self._entries.get(name)
            for part in entry.parts if entry else ():
                yield from ((f"{part}/{name}", *own) for own in entry.ranges(part, first, count))  # type: ignore[union-attr]
