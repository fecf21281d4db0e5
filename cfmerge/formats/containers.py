"""The formats of single files, and the one that a file has: told by its first bytes, never by its name alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cfmerge.formats import safetensors
from cfmerge.formats.base import Container, FileLayout, Header


class Format(NamedTuple):
    """A format of files of named tensors.

    Attributes:
        suffixes: the ends of its files' names, the usual one first.
        open: the container in a file.
        lay: where named tensors and metadata lie in a file that is written.
    """

    suffixes: tuple[str, ...]
    open: Callable[[Path], Container]
    lay: Callable[[Mapping[str, Header], Mapping[str, str]], FileLayout]


FORMATS: dict[str, Format] = {
    "safetensors": Format((".safetensors",), safetensors.SafetensorsFile, safetensors.lay),
}


def format_of(path: Path) -> str:
    """The format of a file, a key of `FORMATS`."""
    return "safetensors"


def open_container(path: Path) -> Container:
    """The container in a file."""
    return FORMATS[format_of(path)].open(path)
