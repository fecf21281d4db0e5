"""Directories of results that are not one checkpoint, told by their table; `cfmerge.compose` reads them."""

from pathlib import Path

TABLE = "composition.json"


def is_composed(path: Path) -> bool:
    """Whether a directory holds a composed result, whose tensors are no model's."""
    return (path / TABLE).is_file()
