"""Recipes that come with cfmerge, each a file of `shipped/`: all but base and experts, which the user names."""

from importlib import resources
from typing import NamedTuple

import yaml

from cfmerge.errors import CfmergeError, nearest


class Shipped(NamedTuple):
    """A recipe that comes with cfmerge: its name, its first line without the mark of a comment, its YAML."""

    name: str
    about: str
    text: str

    @property
    def content(self) -> dict[str, object]:
        """Plain values, with a base that is still to be named."""
        return {"base": "", **yaml.safe_load(self.text)}


def names() -> list[str]:
    """The names of all of them, in order."""
    files = (resources.files("cfmerge.recipe") / "shipped").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def shipped(name: str) -> Shipped:
    """The recipe of a name.

    Raises:
        CfmergeError: there is none of that name.
    """
    if name not in names():
        raise CfmergeError(f"unknown recipe {name!r}{nearest(name, names())}")
    text = (resources.files("cfmerge.recipe") / "shipped" / f"{name}.yaml").read_text()
    return Shipped(name, text.partition("\n")[0].lstrip("# "), text)
