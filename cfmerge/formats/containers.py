"""The formats of single files, and the one that a file has: told by its first bytes, never by its name alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats import safetensors
from cfmerge.formats.base import Container, FileLayout, Header
from cfmerge.formats.magic import format_of, wrong_file


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


def open_container(path: Path) -> Container:
    """The container in a file.

    Raises:
        CfmergeError: it cannot be read, is of a format that is not read, or is corrupt.
    """
    try:
        wrong = wrong_file(path)
    except OSError as error:
        raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
    if wrong:
        raise CfmergeError(wrong)
    return FORMATS[format_of(path)].open(path)
