"""Folders of a model with weights of their own, where not all models have them."""

import copy
from collections.abc import Mapping, Sequence

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder, Source


def check_folders(base: Source, experts: Mapping[str, Source]) -> None:
    """Raises `CfmergeError` if one model is a pipeline of components, and another a component alone."""
    for name, expert in experts.items():
        for whole, single, one, other in (
            (base, expert, f"expert {name!r}", "the base"),
            (expert, base, "the base", f"expert {name!r}"),
        ):
            pipeline = all(folder.prefix for folder in whole.folders)
            prefixes = tuple(folder.prefix for folder in whole.folders)
            if pipeline and not any(tensor.startswith(prefixes) for tensor in single.tensors):
                raise CfmergeError(
                    f"{one} ({single.path}) is one component, {other} a pipeline of several: name the component there, "
                    "one of " + ", ".join(str(whole.path / folder.name) for folder in whole.folders)
                )


def same_folders(base: Source, experts: Mapping[str, Source]) -> tuple[Source, list[Source], list[str]]:
    """Base and experts without folders that only one side has, and notes that say so.

    Those of the base that no expert has become side files of the output. Those of an expert that the base lacks are
    left out, unless the expert is said to consist of them: then their tensors are reported as others are.
    """
    has = {name: {folder.prefix for folder in expert.folders} for name, expert in experts.items()}
    shared = set().union(*has.values())
    alone = [folder for folder in base.folders if folder.prefix and folder.prefix not in shared]
    notes, kept = [], []
    if alone and experts:
        base = _without(base, alone)
        names = ", ".join(f"{folder.name}/" for folder in alone)
        notes.append(f"{names}: copied from the base, not merged: no expert has it")
    ours = {folder.prefix for folder in base.folders}
    for name, expert in experts.items():
        extra = [folder for folder in expert.folders if folder.prefix not in ours and not folder.declared]
        if extra:
            names = ", ".join(f"{folder.name}/" for folder in extra)
            notes.append(f"expert {name!r}: {names}: not merged: the base has no such folder")
        kept.append(_without(expert, extra) if extra else expert)
    return base, kept, notes


def _without(source: Source, folders: Sequence[Folder]) -> Source:
    """The source without the tensors in some folders, whose files become side files."""
    prefixes = tuple(folder.prefix for folder in folders)
    kept = copy.copy(source)
    kept.folders = tuple(folder for folder in source.folders if folder not in folders)
    kept.tensors = {name: info for name, info in source.tensors.items() if not name.startswith(prefixes)}
    kept.ties = {alias: name for alias, name in source.ties.items() if name in kept.tensors}
    indices = {source.path / folder.name: source.path / folder.name / folder.index for folder in folders}
    moved = [file for file in source.files if file.parent in indices]
    kept.files = tuple(file for file in source.files if file not in moved)
    moved += [index for index in indices.values() if index.is_file()]
    kept.side_files = {**source.side_files, **{file.relative_to(source.path).as_posix(): file for file in moved}}
    return kept
