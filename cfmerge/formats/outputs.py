"""The output that a name and a format ask for: a directory that lies as its base does, or one file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import Folder, Totals
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.naming import format_by_name, in_format
from cfmerge.formats.sinks import FORMAT, UNBOUNDED, DirectorySink
from cfmerge.formats.staged import StagedDirectory, StagedFile


class FileSink(DirectorySink):
    """One file, and nothing beside it: no side files, no card, no heads."""

    def __init__(
        self,
        target: Path,
        folders: Sequence[Folder] = (Folder(),),
        *,
        metadata: Mapping[str, str] = FORMAT,
        **how: Any,
    ):
        if len(folders) > 1:
            names = ", ".join(folder.name or "its own directory" for folder in folders)
            raise CfmergeError(
                f"output {target}: one file cannot hold the base, whose weights lie in {names}; name a directory"
            )
        folder = dataclasses.replace(folders[0], name="", stem=target.stem, suffix=target.suffix, sharded=False)
        super().__init__(target, [folder], shard_bytes=UNBOUNDED, metadata=metadata, **how)

    def _stage(self, target: Path, **how: Any) -> StagedDirectory:
        return StagedFile(target, **how)

    def finish(self, totals: Totals) -> None:
        super().finish(Totals())


def open_sink(
    target: Path,
    folders: Sequence[Folder] = (Folder(),),
    *,
    shard_bytes: int,
    side_files: Mapping[str, Path],
    edits: Mapping[str, Mapping[str, Any]],
    format: str | None = None,
    heads: bool = False,
    recipe: str = "",
    **how: Any,
) -> DirectorySink:
    """The sink that the output's name asks for: one file where its ending is a format's, otherwise a directory.

    Args:
        format: the format of the files, a key of `FORMATS`; None: as the name of a file says, else the base's.
        heads: heads will be written beside the model.
        recipe: kept in the metadata of a file, which has no card.
        **how: overwrite, inputs, digest, keep, resume and join, see `DirectorySink`.

    Raises:
        CfmergeError: it is the name of a file of another format, or one file cannot hold it all.
    """
    single = format_by_name(target, format)
    folders = [in_format(folder, single or format) for folder in folders]
    whole = [folder.format for folder in folders if not FORMATS[folder.format].suffixes]
    if whole and len(folders) > 1:
        files = ", ".join(name for name, one in FORMATS.items() if one.suffixes)
        raise CfmergeError(
            f"output {target}: {whole[0]} is one directory as a whole, and the weights lie in "
            f"{', '.join(folder.name or 'its own directory' for folder in folders)}; write one of {files}"
        )
    if single is None:
        return DirectorySink(target, folders, shard_bytes=shard_bytes, side_files=side_files, edits=edits, **how)
    if heads:
        raise CfmergeError(f"output {target}: exported heads lie beside the model; name a directory")
    told = single == "safetensors"
    metadata = FORMAT | ({"cfmerge.recipe": recipe} if recipe and told else {})
    sink = FileSink(target, folders, metadata=metadata, **how)
    if side_files:
        sink.notes += (
            f"{target.name} is one file{', with its recipe in its metadata,' if told else ''} and not beside it: "
            f"{and_more(list(side_files))} of the base; name a directory to have that too",
        )
    return sink
