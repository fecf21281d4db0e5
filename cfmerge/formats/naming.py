"""The names of an output's files, in the format of its base or in another."""

import dataclasses
from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.layout import KINDS

USUAL = {files.format: files.stems[0] for files in KINDS}
BOTH = "diffusion_pytorch_model"  # the stem of diffusers' components, in safetensors and in PyTorch's files


def in_format(folder: Folder, wanted: str | None) -> Folder:
    """The folder with files of the wanted format, under the stem that clients of that format look for.

    A stem that no client of the old format looks for is kept.
    """
    if wanted in {None, folder.format}:
        return folder
    suffixes = FORMATS[str(wanted)].suffixes
    if not suffixes:  # a directory as a whole
        return dataclasses.replace(
            folder, stem="model", suffix="", format=str(wanted), sharded=True, metadata={}, key=""
        )
    stem, dot, variant = folder.stem.partition(".")
    known = {name for files in KINDS for name in files.stems}
    if stem in known and not (stem == BOTH and wanted in {"safetensors", "torch"}):
        stem = USUAL[str(wanted)]
    suffix = suffixes[0]
    sharded = any(stem in files.stems and files.format == wanted != "npz" for files in KINDS)
    return dataclasses.replace(
        folder, stem=stem + dot + variant, suffix=suffix, format=str(wanted), sharded=sharded, metadata={}, key="",
        index=f"{stem}{suffix}.index{dot}{variant}.json",
    )  # fmt: skip


def format_by_name(target: Path, wanted: str | None) -> str | None:
    """The format of an output that is one file, by its name; None for a directory.

    Raises:
        CfmergeError: the name is that of a file of a format that is not written, or not of the wanted one.
    """
    found = next((name for name, one in FORMATS.items() if target.suffix.lower() in one.suffixes), None)
    if found and wanted not in {None, found}:
        if target.suffix.lower() in FORMATS.get(wanted or "", FORMATS[found]).suffixes:
            return wanted
        raise CfmergeError(
            f"output {target}: {target.suffix} is the ending of a file of format {found}, not {wanted}; name a "
            "directory, or leave out the format"
        )
    return found
