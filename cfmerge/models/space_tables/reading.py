"""Tables of permutation spaces, read from YAML: the project's own, and users'.

like: llama                        # a table of the project, for what is not said here
sizes:
  kv{l}: num_key_value_heads       # a key of the config, or a number
spaces:
  layers.{l}.adapter.up.weight: adapter{l}, in hidden
  layers.{l}.adapter.down.weight: hidden, in adapter{l}
fixed: [rope.cache]                # tensors that do not permute, whatever their shape
"""

import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.names.rules import PIECES, Name
from cfmerge.models.space_tables.table import Line, Table

KEYS: dict[str, type[yaml.Node]] = {
    "like": yaml.ScalarNode,
    "model_types": yaml.SequenceNode,
    "sizes": yaml.MappingNode,
    "spaces": yaml.MappingNode,
    "fixed": yaml.SequenceNode,
}
KINDS: dict[type[yaml.Node], str] = {
    yaml.ScalarNode: "a word",
    yaml.SequenceNode: "a list",
    yaml.MappingNode: "a mapping",
}
SIZE = re.compile(r"[\w.]+( / [\w.]+)*( or [\w.]+( / [\w.]+)*)*")
EXAMPLE = "    spaces:\n      blocks.{l}.up.weight: mlp{l}, in hidden"


class Entry(NamedTuple):
    """A key and its value as text, or an item of a list, and where it stands."""

    key: str
    value: str
    where: str


def read_table(given: str | PathLike[str] | Mapping[str, Any], known: Callable[[str], Table]) -> Table:
    """A user's table from a YAML file, or from what such a file holds.

    Args:
        given: the file's path, or a mapping with its keys.
        known: the project's table of a name, for `like`.

    Raises:
        CfmergeError: what is wrong, with the file and the line.
    """
    if isinstance(given, Mapping):
        return parse_table(yaml.safe_dump(dict(given), sort_keys=False), "the table of spaces", known, lines=False)
    try:
        return parse_table(Path(given).read_text(encoding="utf-8"), str(given), known)
    except (OSError, UnicodeDecodeError) as error:
        raise CfmergeError(f"spaces: {given}: cannot be read: {error}") from None


def parse_table(text: str, name: str, known: Callable[[str], Table] | None = None, lines: bool = True) -> Table:
    """A table from YAML.

    Args:
        text: the YAML.
        name: what messages call it.
        known: the project's table of a name, in a user's table.
        lines: messages tell the line.
    """
    parts, users = _parts(text, name, lines), known is not None
    like = _like(parts["like"][0], known) if known and "like" in parts else None
    own = [_line(entry, users) for entry in parts.get("spaces", ())]
    own += [Line(_name(entry), None, entry.where, own=users) for entry in parts.get("fixed", ())]
    if not own and like is None:
        raise CfmergeError(f"spaces: {name} has no lines; a table is\n{EXAMPLE}")
    sizes = {entry.key: _size(entry) for entry in parts.get("sizes", ())}
    return Table(
        name,
        (*own, *(like.lines if like else ())),
        sizes | {key: size for key, size in (like.sizes if like else {}).items() if key not in sizes},
        tuple(entry.key for entry in parts.get("model_types", ())),
        like.name if like else "" if users else name,
    )


def _parts(text: str, name: str, lines: bool) -> dict[str, list[Entry]]:
    """`{key: its entries}`."""

    def entry(key: yaml.Node, value: yaml.Node | None = None) -> Entry:
        where = f"{name}, line {key.start_mark.line + 1}" if lines else name
        if not all(isinstance(node, yaml.ScalarNode) for node in (key, value or key)):
            raise CfmergeError(f"spaces: {where}: the axes of a tensor are a text; a table is\n{EXAMPLE}")
        return Entry(key.value, value.value if value else "", where)

    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        hint = "; an axis `-` alone stands in quotes, '-'" if "sequence entries" in str(error) else ""
        raise CfmergeError(f"spaces: {name} is no YAML: {error}{hint}") from None
    if not isinstance(root, yaml.MappingNode):
        raise CfmergeError(f"spaces: {name} is no table, which is\n{EXAMPLE}")
    parts: dict[str, list[Entry]] = {}
    for key, value in root.value:
        where = entry(key).where
        if key.value not in KEYS or key.value in parts:
            unknown = f"unknown key {key.value!r}{nearest(key.value, KEYS)}"
            raise CfmergeError(f"spaces: {where}: {f'{key.value!r} is there twice' if key.value in parts else unknown}")
        if not isinstance(value, KEYS[key.value]):
            raise CfmergeError(f"spaces: {where}: {key.value!r} is {KINDS[KEYS[key.value]]}")
        if isinstance(value, yaml.MappingNode):
            parts[key.value] = [entry(*pair) for pair in value.value]
        else:
            parts[key.value] = [entry(item) for item in ([value] if key.value == "like" else value.value)]
        _check_once(parts[key.value])
    return parts


def _check_once(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.key in seen:
            raise CfmergeError(f"spaces: {entry.where}: {entry.key!r} stands there already, at {seen[entry.key]}")
        seen[entry.key] = entry.where


def _like(entry: Entry, known: Callable[[str], Table]) -> Table:
    try:
        return known(entry.key)
    except CfmergeError as error:
        raise CfmergeError(f"spaces: {entry.where}: {str(error).removeprefix('spaces: ')}") from None


def _line(entry: Entry, own: bool) -> Line:
    text, _, needs = entry.key.partition(" if ")
    name = _name(entry._replace(key=text.strip()))
    return Line(name, entry.value, entry.where, _name(entry._replace(key=needs), name) if needs else None, own)


def _name(entry: Entry, other: Name | None = None) -> Name:
    try:
        name = Name(entry.key, other.choices if other else None)
    except re.error as error:
        raise CfmergeError(f"spaces: {entry.where}: {entry.key!r} is no pattern of names: {error}") from None
    if re.search(r"[{}\[\]]", PIECES.sub("", entry.key)):
        raise CfmergeError(f"spaces: {entry.where}: {entry.key!r} is no pattern of names: a bracket has no partner")
    return name


def _size(entry: Entry) -> str:
    if not SIZE.fullmatch(entry.value):
        raise CfmergeError(
            f"spaces: {entry.where}: the size of {entry.key!r} is a number, or made of keys of the config, such as "
            f"num_key_value_heads or num_attention_heads; found {entry.value!r}"
        )
    return entry.value
