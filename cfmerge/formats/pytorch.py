"""PyTorch's files, `.bin`, `.pt`, `.pth`, `.ckpt`: named tensors out of any kind of them, read without torch.

The file holds an object; `torch_objects` finds the one dictionary of tensors in it. Nothing of the file is run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import TensorInfo
from cfmerge.formats.mapped import mapped
from cfmerge.formats.pickles import Global
from cfmerge.formats.torch_archives import open_archive
from cfmerge.formats.torch_layouts import lay as lay
from cfmerge.formats.torch_objects import chosen, unwrapped
from cfmerge.formats.torch_tensors import MAX_CLAIM, MAX_REPEATED, View, read, view_of

KNOWN = {"collections.OrderedDict", "torch.Size", "torch.device"}
LISTED = 8


class TorchFile:
    """One mapped file. Its pickle is interpreted when it is opened; tensors are views of the map.

    Where the file has CRC-32s, those of its pickle are checked when it is opened, a storage's when it is first read.

    Args:
        key: the entry whose tensors are read, where the file holds several dictionaries of them.

    Attributes:
        key: the entry that they lie in; "" where the file is one dictionary of them, or a module.

    Raises:
        CfmergeError: it is no file of torch's, truncated or corrupt, would run something, or holds no named tensors.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    ties: Mapping[str, str]
    notes: tuple[str, ...]

    def __init__(self, path: Path, key: str = ""):
        self.path, self.files = path, (path,)
        self._content = mapped(path)
        archive = open_archive(self._content, str(path))
        self.metadata = archive.metadata
        found = chosen(archive.pickle.value, str(path), key)
        self.key = found.key
        values, taken_off = unwrapped(found.tensors)
        views = {
            name: view_of(value, archive, f"{path}: tensor {name!r}" if name else f"{path}: its tensor")
            for name, value in values.items()
        }
        self.ties = _ties(views)
        self._views = {name: view for name, view in views.items() if name not in self.ties}
        self.tensors = {name: TensorInfo(view.shape, view.dtype, path) for name, view in self._views.items()}
        _check_claim(path, self.tensors, len(self._content))
        notes = [*found.notes, *taken_off, _foreign(archive.pickle.globals), _shared(self._views)]
        if any(storage.crc.expected is None and storage.nbytes for storage in archive.storages.values()):
            notes.append("the file has no checksums: a damaged number in it would not be noticed")
        self.notes = tuple(f"{path.name}: {note}" for note in notes if note)

    def grain(self, name: str) -> int:
        return 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on."""
        view = self._views[name]
        view.storage.check(self._content, f"{self.path}: tensor {name!r}")
        return read(view, self._content, first, count)


def _ties(views: Mapping[str, View]) -> dict[str, str]:
    """`{alias: name}` of tensors that are the same view of the same storage; the first has the name."""
    first: dict[tuple, str] = {}
    ties = {}
    for name, view in views.items():
        if view.size:
            owner = first.setdefault((view.storage.key, *view[1:]), name)
            if owner != name:
                ties[name] = owner
    return ties


def _shared(views: Mapping[str, View]) -> str:
    """The note on tensors that share a part of their bytes."""
    by_storage: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for name, view in views.items():
        by_storage.setdefault(view.storage.key, []).append((view.span, name))
    names = []
    for spans in by_storage.values():
        spans.sort()
        end, owner = 0, ""
        for (first, last), name in spans:
            if first < end and last > first:
                names += [owner, name]
            if last > end:
                end, owner = last, name
    names = list(dict.fromkeys(names))
    return f"tensors that are views into the same bytes are read as copies: {and_more(names)}" if names else ""


def _foreign(names: Sequence[Global]) -> str:
    """The note on names that the file would import, other than those that every file of torch's names."""
    others = [str(name) for name in names if not (str(name) in KNOWN or name.module in ("torch", "torch._utils"))]
    others = [
        name for name in others if name not in ("torch.storage.UntypedStorage", "torch._tensor._rebuild_from_type_v2")
    ]
    more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
    told = ", ".join(others[:LISTED]) + more
    return f"names objects of other code, which are not made, only their tensors read: {told}" if others else ""


def _check_claim(path: Path, tensors: Mapping[str, TensorInfo], held: int) -> None:
    claim = sum(info.nbytes for info in tensors.values())
    if claim > max(MAX_CLAIM, MAX_REPEATED * held):
        raise CfmergeError(
            f"{path}: its tensors are to have {claim} bytes, and the file has {held}: they repeat the same bytes; "
            "save what they repeat"
        )
