"""Models on disk: a directory of weights and side files, as on the Hugging Face hub; or one file, or checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import Container, Folder, TensorInfo
from cfmerge.formats.components import Component, find_components
from cfmerge.formats.containers import FORMATS, kind_of, open_container
from cfmerge.formats.layout import Weights, read_json
from cfmerge.formats.side_files import about, look_around, look_beside
from cfmerge.models.deltas import Delta, Dense
from cfmerge.models.ties import likely_ties


class HuggingFaceSource:
    """A directory with weights of any format, in one file, shards or components in folders; or one file or checkpoint.

    Args:
        part: of one file or checkpoint the part that is named, such as `ema` or `params`; "": all parameters.
    """

    def __init__(self, path: Path, part: str = ""):
        self.path = path
        directory = path if path.is_dir() else None
        components = find_components(directory) if directory else [_one_file(path)]
        if part and len(components) > 1:
            raise CfmergeError(f"{path}::{part}: is a model of several folders; name the file that holds the part")
        self._where: dict[str, tuple[Container, str]] = {}  # {name: (file, the tensor's name in it)}
        self.folders: tuple[Folder, ...] = ()
        self.ties: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        files: list[Path] = []
        apart: list[Path] = []  # folders that hold the model once more
        for component in components:
            opened = [open_container(file, part) for file in component.weights.files]
            where = _chosen(path, component.weights, opened)
            if not component.declared and self._is_again(where):
                apart.append(path / component.folder)
                continue
            self._where |= {component.prefix + name: (file, name) for name, file in where.items()}
            config = read_json(path / component.folder / "config.json") if directory else {}
            metadata = opened[0].metadata
            stored = {alias: name for file in opened for alias, name in file.ties.items() if name in where}
            folder = component.weights.folder(component.prefix, component.folder)
            self.folders += (
                dataclasses.replace(
                    folder, metadata=metadata, declared=component.declared, format=kind_of(opened[0].path),
                    ties=stored, key=getattr(opened[0], "key", ""), like=opened[0],
                ),
            )  # fmt: skip
            found = {**likely_ties(where, config, metadata), **stored}
            self.ties |= {component.prefix + alias: component.prefix + name for alias, name in found.items()}
            self.notes += _notes(component.weights, where, opened, path)
            files += [file for container in opened for file in container.files]
        self.tensors: Mapping[str, TensorInfo] = {n: file.tensors[own] for n, (file, own) in self._where.items()}
        if not self.tensors:
            raise CfmergeError(f"{path}: holds no tensors")
        self.files = tuple(files)
        main = components[0]
        own = directory is not None and not main.prefix  # a pipeline has no config of its own
        self.config: Mapping[str, Any] = read_json(path / main.folder / "config.json") if own else {}
        self.metadata: Mapping[str, str] = self.folders[0].metadata
        self.side_files: Mapping[str, Path] = {}
        self.left_out: tuple[str, ...] = ()
        if directory and directory not in main.weights.files:
            ignored = [file for component in components for file in component.weights.ignored]
            ignored += [component.weights.index for component in components if component.weights.index]
            beside = look_beside(directory, files, ignored, apart)
            self.side_files, self.left_out = beside.files, about(beside, path)
        elif directory:
            of_checkpoint = getattr(self.folders[0].like, "side_files", {})  # Megatron's
            self.side_files = {**look_around(directory, files), **of_checkpoint}

    def prepare(self) -> None:
        pass

    def grain(self, name: str) -> int:
        file, own = self._where[name]
        return file.grain(own)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        file, own = self._where[name]
        return file.read(own, first, count)

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        return Dense(self.read(name, first, count))

    def rank(self, name: str) -> int | None:
        return None

    def _is_again(self, names: Mapping[str, Any]) -> bool:
        """Whether a folder's tensors are those that the main part has already: another version of the model."""
        return bool(names) and 2 * sum(name in self._where for name in names) > len(names)


def _one_file(path: Path) -> Component:
    suffixes = FORMATS[kind_of(path)].suffixes
    suffix = path.suffix if path.suffix in suffixes or not suffixes else suffixes[0]
    return Component("", "", Weights([path], None, {}, path.stem, [], suffix))


def _chosen(path: Path, weights: Weights, opened: Sequence[Container]) -> dict[str, Container]:
    """`{name: the file that it is read from}`; the index decides, where there is one.

    Raises:
        CfmergeError: a tensor is not where the index says, or in no index, or in two files without one.
    """
    holders: dict[str, list[Container]] = {}
    for file in opened:
        for name in file.tensors:
            holders.setdefault(name, []).append(file)
    index = weights.index
    if index is None:
        return {name: files[0] for name, files in holders.items()}
    chosen = {}
    for name, place in weights.where.items():
        found = next((file for file in holders.get(name, ()) if file.path.name == place), None)
        if found is None:
            both = [f"; {n!r} is in both {f[0].path.name} and {f[1].path.name}" for n, f in holders.items() if f[1:]]
            twice = both[0] if both else ""
            raise CfmergeError(f"{index}: tensor {name!r} should be in {place}, and is not{twice}; fetch it again")
        chosen[name] = found
    unlisted = sorted(set(holders) - set(chosen))
    if unlisted:
        raise CfmergeError(
            f"{index}: does not list {len(unlisted)} tensors of its shards, such as {unlisted[0]!r}; "
            "the index is of another version of the model, fetch it again"
        )
    return {name: chosen[name] for name in holders}  # in the order in which they lie in the files


def _notes(
    weights: Weights, where: Mapping[str, Container], opened: Sequence[Container], path: Path
) -> tuple[str, ...]:
    """Notes on how a folder was read, where it is not as expected."""
    notes = []
    stale = [(name, file.path.name) for file in opened for name in file.tensors if where[name] is not file]
    if stale:
        name, file = stale[0]
        notes.append(
            f"{path}: {len(stale)} tensors are in two files; {weights.index.name if weights.index else ''} decides: "
            f"{name!r} is read from {where[name].path.name}, not from {file}"
        )
    if weights.ignored:
        ignored = and_more([file.name for file in weights.ignored])
        read = and_more([file.name for file in weights.files])
        notes.append(f"{path}: {ignored}: not read; the model's weights are {read}")
    told = dict.fromkeys(note.removeprefix(f"{path.name}: ") for file in opened for note in file.notes)
    notes += [f"{path}: {note}" for note in told]
    return tuple(notes)
