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


def chosen_folders(
    base: Source, experts: Mapping[str, Source], components: Sequence[str]
) -> tuple[Source, Mapping[str, Source], list[str]]:
    """Base and experts without the folders that are not among the components, and a note; all if none is named.

    Those of the base become side files of the output.

    Raises:
        CfmergeError: the base has no such folder.
    """
    if not components:
        return base, experts, []
    there = {folder.name or "." for folder in base.folders}
    for name in components:
        if name not in there:
            raise CfmergeError(
                f"components: the base ({base.path}) has no folder {name!r} with weights; it has "
                + ", ".join(sorted(there))
            )
    copied = [folder for folder in base.folders if (folder.name or ".") not in components]
    names = ", ".join(f"{folder.name}/" for folder in copied)
    told = [f"{names}: copied from the base, not merged: not among the components that are chosen"] if copied else []
    chosen = {}
    for name, expert in experts.items():
        others = [folder for folder in expert.folders if folder.prefix and (folder.name or ".") not in components]
        chosen[name] = _without(expert, others) if others else expert
    return (_without(base, copied) if copied else base), chosen, told


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
    gone = [folder.prefix for folder in folders]
    in_order = sorted((folder.prefix for folder in source.folders), key=len, reverse=True)
    kept = copy.copy(source)
    kept.folders = tuple(folder for folder in source.folders if folder not in folders)
    kept.tensors = {
        name: info
        for name, info in source.tensors.items()
        if next(prefix for prefix in in_order if name.startswith(prefix)) not in gone
    }
    kept.ties = {alias: name for alias, name in source.ties.items() if name in kept.tensors}
    indices = {source.path / folder.name: source.path / folder.name / folder.index for folder in folders}
    moved = [file for file in source.files if file.parent in indices]
    kept.files = tuple(file for file in source.files if file not in moved)
    moved += [index for index in indices.values() if index.is_file()]
    kept.side_files = {**source.side_files, **{file.relative_to(source.path).as_posix(): file for file in moved}}
    return kept
