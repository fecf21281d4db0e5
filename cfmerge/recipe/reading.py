"""Recipes and their parts out of plain values, texts and files; rules as the command line takes them; sizes."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import yaml

from cfmerge.errors import CfmergeError, nearest
from cfmerge.recipe.parts import Align, Expert, LayerExpert, Layers, Rename, Rule
from cfmerge.recipe.recipe import Recipe
from cfmerge.recipe.shipped import names, shipped


def parse(content: Any, source: str) -> Recipe:
    """A recipe from plain values, as YAML gives them; `source` is named in errors.

    Raises:
        CfmergeError: unknown keys (with the nearest known ones), missing keys, values of a wrong type.
    """
    try:
        return msgspec.convert(content, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"{source}: {_explain(str(error))}") from None


def rule_option(match: str, method: str, layout: str = "") -> str:
    """A rule as the command line takes it, such as `--rule "match=*.bias, method=average"`."""
    parts = {key: value for key, value in {"match": match, "method": method, "layout": layout}.items() if value}
    plain = match.isprintable() and match == match.strip() and not re.search(r"[,'\"(){}]", match)
    plain = plain and match.count("[") == match.count("]")
    pairs = ", ".join(f"{key}={value}" for key, value in parts.items())
    text = pairs if plain else json.dumps(parts, ensure_ascii=False)
    return "--rule " + (shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"')


def parse_rule(content: Any) -> Rule:
    """One rule from plain values; raises `CfmergeError` as `parse` does."""
    try:
        return msgspec.convert(content, Rule)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"rule {content!r}: {_explain(str(error), Rule)}") from None


def _explain(message: str, struct: type[msgspec.Struct] | None = None) -> str:
    other = re.fullmatch(r"Invalid enum value '(.*)' - at `\$\.(align\.)?(\w+)`", message, re.DOTALL)
    if other and other[3] in (hints := get_type_hints(Align if other[2] else Recipe)):
        choices = _choices(hints[other[3]])
        return f"{other[2] or ''}{other[3]}: expected one of {', '.join(choices)}, found {other[1]!r}"
    unknown = re.search(r"unknown field `(.+?)`(?: - at `(.+)`)?", message)
    if not unknown:
        return message
    key, place = unknown.groups()
    inside: dict[str, type[msgspec.Struct]] = {
        "layers[...].experts": LayerExpert, "layers": Layers, "rename": Rename, "experts": Expert, "rules": Rule,
        "align": Align,
    }  # fmt: skip
    anywhere = re.sub(r"\[\d+\]", "[...]", place or "")
    found = struct or next((kind for part, kind in inside.items() if part in anywhere), Recipe)
    known = [field.encode_name for field in msgspec.structs.fields(found)]
    return f"unknown key {key!r}{f' at {place}' if place else ''}{nearest(key, known)}"


def _choices(hint: Any) -> list[str]:
    """The words that a type allows; `a number` for numbers."""
    if hint is int:
        return ["a number"]
    if isinstance(hint, str):
        return [hint]
    return [choice for inner in get_args(hint) for choice in _choices(inner)]


def load(path: str | Path) -> Recipe:
    """The recipe in a file, or in a model card (`.md`) or a `.safetensors` file that cfmerge wrote.

    Where there is no such file, the recipe of that name that comes with cfmerge; its base is still to be named.
    """
    path = Path(path)
    if str(path) in names() and not path.exists():
        return parse(shipped(str(path)).content, str(path))
    if path.is_dir():
        raise CfmergeError(
            f"recipe {path}: is a directory, and a recipe is a file, such as the README.md of a merge; models are "
            "given by --base and -e, to diagnose as BASE EXPERT EXPERT"
        )
    try:
        text = _of_metadata(path) if path.suffix == ".safetensors" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        named = isinstance(error, FileNotFoundError) and path.name == str(path) and not path.suffix
        hint = f"; no recipe of that name comes with cfmerge{nearest(str(path), names())}" if named else ""
        raise CfmergeError(f"recipe {path}: cannot be read: {error}{hint}") from None
    if path.suffix == ".md":
        block = re.search(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if not block:
            raise CfmergeError(f"{path}: holds no recipe (a ```yaml block, as cfmerge writes into model cards)")
        text = block.group(1)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CfmergeError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.__struct_fields__)}")
    return parse(content, str(path))


def _of_metadata(path: Path) -> str:
    """The recipe that a merged model in one file has in its metadata."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        return json.loads(header)["__metadata__"]["cfmerge.recipe"]
    except (ValueError, KeyError, TypeError):
        raise CfmergeError(f"{path}: holds no recipe (cfmerge.recipe in its metadata)") from None


def parse_size(text: str) -> int:
    """`5GB`, `512MiB`, `1000000` in bytes; decimal units unless `i` is given."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    try:
        number = float(match.group(1)) if match else float("nan")
    except ValueError:
        number = float("nan")
    if not match or not number > 0:
        raise CfmergeError(f"{text!r} is not a size; write 5GB, 512MiB or a number of bytes")
    power = " KMGT".index(match.group(2).upper() or " ")
    return int(number * (1024 if match.group(3) else 1000) ** power)
