"""Folders of a model with weights of their own, where not all models have them."""

import copy
from collections.abc import Mapping, Sequence

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Source


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


def without_folders(base: Source, experts: Sequence[Source]) -> tuple[Source, list[str]]:
    """The base without the folders that no expert has: their files become side files; and notes that say so."""
    shared = {
        folder.prefix for folder in base.folders if any(n.startswith(folder.prefix) for e in experts for n in e.tensors)
    }
    alone = [folder for folder in base.folders if folder.prefix and folder.prefix not in shared]
    if not alone or not shared:
        return base, []
    prefixes = tuple(folder.prefix for folder in alone)
    kept = copy.copy(base)
    kept.folders = tuple(folder for folder in base.folders if folder not in alone)
    kept.tensors = {name: info for name, info in base.tensors.items() if not name.startswith(prefixes)}
    kept.ties = {alias: name for alias, name in base.ties.items() if name in kept.tensors}
    files = {base.path / folder.name: base.path / folder.name / folder.index for folder in alone}
    copied = [file for file in base.files if file.parent in files]
    copied += [index for index in files.values() if index.is_file()]
    kept.files = tuple(file for file in base.files if file not in copied)
    kept.side_files = {**base.side_files, **{file.relative_to(base.path).as_posix(): file for file in copied}}
    names = ", ".join(f"{folder.name}/" for folder in alone)
    return kept, [f"{names}: copied from the base, not merged: no expert has it"]
