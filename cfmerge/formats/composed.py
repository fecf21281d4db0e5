"""Directories of results that are not one checkpoint, told by their table; `compose` and `align` read them."""

from pathlib import Path

TABLE = "composition.json"
ZIP = "zip.json"


def is_composed(path: Path) -> bool:
    """Whether a directory holds a composed result, whose tensors are no model's."""
    return (path / TABLE).is_file()


def is_zip(path: Path) -> bool:
    """Whether a directory holds a zip, a trunk and heads of several models."""
    return (path / ZIP).is_file()
