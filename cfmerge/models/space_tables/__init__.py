"""Permutation spaces of checkpoints by the names of their tensors: tables of families, and users' own."""

import functools
from collections.abc import Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.layouts import Shape
from cfmerge.models.patterns import tell
from cfmerge.models.space_tables import reading
from cfmerge.models.space_tables.table import OWN, Described, Table
from cfmerge.models.spaces import Spaces

# In the order in which they are tried for models without a model type.
FAMILIES = (
    "bert",
    "distilbert",
    "mpnet",
    "llama",
    "gpt2",
    "gpt_neox",
    "t5",
    "vit",
    "clip",
    "resnet",
    "torch_resnet",
    "convnext",
)
Headers = Mapping[str, Shape]


def spaces_of(headers: Headers, config: Mapping[str, Any]) -> Spaces:
    """The permutation spaces of a model, by the table of its family.

        >>> shapes = {"h.0.mlp.c_fc.weight": (4, 8), "h.0.mlp.c_fc.bias": (8,), "h.0.mlp.c_proj.weight": (8, 4)}
        >>> cfmerge.align.spaces_of(shapes, {}).table()["h.0.mlp.c_fc.weight"]
        'in hidden, mlp0'

    Args:
        headers: `{name: shape}` of its tensors, by their names in PyTorch.
        config: its config.json; it tells the number of heads, and the family by `model_type`. Empty where there is
            none: then names alone tell the family.

    Raises:
        CfmergeError: no table is for it; the config does not tell a size; a line does not fit a tensor's shape.
    """
    return describe(headers, config).spaces


def describe(headers: Headers, config: Mapping[str, Any], own: Table | None = None) -> Described:
    """The spaces of a model, the table that they are of, and notes.

        >>> shapes = {"h.0.mlp.c_fc.weight": (4, 8), "h.0.mlp.c_proj.weight": (8, 4)}
        >>> found = cfmerge.align.describe(shapes, {"model_type": "gpt2"})
        >>> found.table, found.spaces.sizes
        ('gpt2', {'hidden': 4, 'mlp0': 8})

    Args:
        headers: `{name: shape}` of its tensors.
        config: its config.json, or empty.
        own: the user's table (`read_table`), in place of the project's.

    Raises:
        CfmergeError: as `spaces_of` does.
    """
    return (own or _table_for(headers, config)).spaces(headers, config)


def read_table(given: Any) -> Table:
    """A user's table, from a YAML file or from what such a file holds.

        >>> table = cfmerge.align.read_table({"spaces": {"up.{l}.w": "mlp{l}, in h", "down.{l}.w": "h, in mlp{l}"}})
        >>> cfmerge.align.describe({"up.0.w": (6, 4), "down.0.w": (4, 6)}, {}, table).spaces.sizes
        {'mlp0': 6, 'h': 4}

    Args:
        given: the file's path, or a mapping with its keys: `spaces`, `sizes`, `fixed`, `like`.

    Raises:
        CfmergeError: what is wrong, with the file and the line.
    """
    return reading.read_table(given, family)


def write_table(spaces: Spaces, path: str | PathLike[str]) -> None:
    """Writes the spaces of a model as a YAML file that `read_table`, recipes and the command line take.

        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
        >>> cfmerge.align.write_table(spaces, "spaces.yaml")
        >>> table = cfmerge.align.read_table("spaces.yaml")
        >>> cfmerge.align.describe({"up": (3, 2), "down": (2, 3)}, {}, table).spaces == spaces
        True

    Args:
        spaces: traced, or parsed.
        path: the file, which is replaced if it is there.
    """
    found = {"sizes": dict(spaces.sizes), "spaces": spaces.table()}
    Path(path).write_text(yaml.safe_dump(found, sort_keys=False, width=1000), "utf-8")


@functools.cache
def family(name: str) -> Table:
    """One of the project's tables. Raises `CfmergeError` if there is none of this name."""
    if name not in FAMILIES:
        raise CfmergeError(f"spaces: unknown table {name!r}{nearest(name, FAMILIES)}")
    return reading.parse_table(resources.files(__package__).joinpath(f"{name}.yaml").read_text("utf-8"), name)


def _table_for(headers: Headers, config: Mapping[str, Any]) -> Table:
    """The project's table for a model: by its model type, or else by its names."""
    model_type = config.get("model_type")
    tables = [family(name) for name in FAMILIES]
    typed = [table for table in tables if model_type in table.model_types]
    covered = {table.name: table.cover(headers, config) for table in typed or tables}
    opened = {name: one.open for name, one in covered.items()}
    best = min(opened, key=lambda name: len(opened[name]))
    if not opened[best] and (typed or not model_type):
        return family(best)
    if model_type and not typed:
        types = ", ".join(known for table in tables for known in table.model_types)
        close = f"; its names are those of table {best!r}, but what they do may differ: if it does not, `like: {best}`"
        raise CfmergeError(
            f"spaces: no table is for models of type {model_type!r}; there are tables for {types}; the way out: "
            f"{OWN}{close if not opened[best] else ''}"
        )
    if not covered[best].lines:
        raise CfmergeError(
            f"spaces: no table is for this model: all have no line for {tell(opened[best], headers)}; there are tables "
            f"for {', '.join(FAMILIES)}; the way out: {OWN}, in Python cfmerge.align.chain_spaces for layers that are "
            "called one after the other"
        )
    raise CfmergeError(
        f"spaces: no table is for this model: the nearest, {best!r}, has no line for {tell(opened[best], headers)}; "
        f"there are tables for {', '.join(FAMILIES)}; the way out: {OWN}, which may begin with `like: {best}`"
    )
