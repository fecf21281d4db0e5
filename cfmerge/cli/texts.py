"""Texts of the command line as parts of a recipe: experts, rules, renames, parameters, methods."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from os.path import exists  # says no to texts that are too long for a path
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cfmerge import mergekit
from cfmerge.errors import CfmergeError
from cfmerge.recipe import Layers, Recipe, load, parse, parse_rule

RULE = "match=GLOB, method=NAME, parameters.KEY=VALUE"
PREFIX = "parameters."  # in front of a rule's keys that are parameters of its method
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"


def make_stages(file: Path | None, given: Mapping[str, Any]) -> list[mergekit.Stage]:
    """The recipes that a file stands for: one, or those of several documents of mergekit.

    `given`, the command line's values by the recipe's keys, is put over the last. A list replaces the file's, but for
    rules and renames: those of the command line stand in front of the file's.

    Raises:
        CfmergeError: base or experts are missing, or a value cannot be read.
    """
    if file is None or not mergekit.is_file(file):
        return [mergekit.Stage("", make_recipe(file, given))]
    *earlier, last = mergekit.load(file)
    return [*earlier, last._replace(recipe=_changed(msgspec.to_builtins(last.recipe), given, str(file)))]


def make_recipe(file: Path | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe of a file of cfmerge, or of none, with the command line's values put over it; see `make_stages`."""
    content = {} if file is None else msgspec.to_builtins(load(file))
    return _changed(content, given, str(file or "command line"))


def _changed(content: dict[str, Any], given: Mapping[str, Any], source: str) -> Recipe:
    given = values_of(given)
    if given.get("method", content.get("method")) != content.get("method"):
        content["parameters"] = {}
    for key, joined in JOINED.items():
        if key in given:
            given[key] = joined(given[key], content.get(key))
    content |= given
    if content.get("statistics") and "method" not in content:
        from cfmerge.statistics import Statistics

        content["method"] = Statistics.load(content["statistics"]).method  # that they were accumulated for
    needed = ("base",) if content.get("statistics") or content.get("layers") else ("base", "experts")
    missing = [key for key in needed if not content.get(key)]
    if missing:
        raise CfmergeError(f"no {' and no '.join(missing)}: give --base and --expert, a recipe file, or --run")
    return parse(content, source)


def values_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the keys that are given on the command line."""
    return {key: READ.get(key, _as_it_is)(value) for key, value in given.items() if value not in (None, [])}


def _as_it_is(value: Any) -> Any:
    return value


def expert(text: str) -> dict[str, Any]:
    """An expert from `PATH`, `NAME=PATH`, `NAME=PATH@WEIGHT` or a mapping; a path that exists is taken as it is."""
    if exists(text):
        return {"path": text}
    if text.lstrip().startswith("{"):
        return mapping(text, "--expert", "{path: PATH, name: NAME, weight: 0.5}")
    name, separator, path = text.partition("=")
    name, path = (name, path) if separator else ("", text)
    bare, at, weight = path.rpartition("@")
    if at and not exists(path):
        try:
            return {"path": bare, "name": name, "weight": float(weight)}
        except ValueError:
            pass
    return {"path": path, "name": name}


def rule(text: str) -> dict[str, Any]:
    """A rule from `match=GLOB, method=NAME, parameters.KEY=VALUE`, or from the text of a mapping."""
    if re.match(r"\s*(- *)?\{|\s*(- +)?\w+:\s", text):
        content = mapping(text, "--rule", "{match: 'GLOB', method: NAME}")
    else:
        content = {}
        for key, value in _pairs(text):
            if key.startswith(PREFIX):
                content.setdefault("parameters", {})[key.removeprefix(PREFIX)] = plain(value)
            else:
                content[key] = _kinds(value) if key == "kinds" else value
    parse_rule(content)
    return content


def rename(text: str) -> dict[str, Any]:
    """A rename from `REGEX => TEXT`, or from the text of a mapping with `from` and `to`."""
    if text.lstrip().startswith("{"):
        return mapping(text, "--rename", "{from: 'REGEX', to: TEXT}")
    before, arrow, after = text.partition("=>")
    if not arrow or not before.strip():
        raise CfmergeError(f"--rename {text!r}: write 'REGEX => TEXT', such as --rename '^model[.] => language_model.'")
    return {"from": before.strip(), "to": after.strip()}


def run_of_layers(text: str) -> dict[str, Any]:
    """Layers from `FIRST:END`, `PATH@FIRST:END`, or from the text of a mapping."""
    if text.lstrip().startswith("{"):
        return mapping(text, "--layers", "{range: [0, 24], base: PATH}")
    match = re.fullmatch(r"(?:(.+)@)?(\d+):(\d+)", text)
    if not match:
        raise CfmergeError(
            f"--layers {text!r}: write FIRST:END, PATH@FIRST:END or {{range: [FIRST, END], ...}}, such as "
            "--layers 0:24 --layers other@8:32; END is one past the last layer"
        )
    return {"range": [int(match[2]), int(match[3])], **({"base": match[1]} if match[1] else {})}


def told_run(run: Layers) -> str:
    """A run of layers for people."""
    where = "all" if run.range is None else f"{run.range[0]} to {run.range[1] - 1}"
    names = [one if isinstance(one, str) else one.name for one in run.experts or []]
    with_experts = f", with {', '.join(names)}" if names else ""
    return f"{where}{f' of {run.base}' if run.base else ''}{with_experts}{f', by {run.method}' if run.method else ''}"


def alignment(text: str) -> dict[str, Any]:
    """How models are aligned from `METHOD`, from `method=METHOD, to=EXPERT`, or from the text of a mapping."""
    if text.lstrip().startswith("{"):
        return mapping(text, "--align", "{method: weights, to: base}")
    if "=" not in text:
        return {"method": text.strip()}
    return {key: int(value) if value.isdigit() else value for key, value in _pairs(text, "--align", "method=weights")}


def mapping(text: str, option: str, example: str) -> dict[str, Any]:
    """A mapping written in YAML or JSON, with or without braces, or as an item of a list."""
    for form in (text, f"{{{text}}}"):
        with contextlib.suppress(yaml.YAMLError):
            content = yaml.safe_load(form)
            content = content[0] if isinstance(content, list) and len(content) == 1 else content
            if isinstance(content, dict) and None not in content.values():
                return content
    raise CfmergeError(
        f"{option} {text!r}: cannot be read; write a mapping such as {example}, with quotes around globs"
    )


def plain(value: str) -> Any:
    """A parameter's value: lists and mappings as YAML has them; the method reads all else."""
    if value[:1] not in {"[", "{"}:
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise CfmergeError(f"{value!r} cannot be read as a list or a mapping") from None


def key_values(texts: Sequence[str], option: str = "--param") -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping."""
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise CfmergeError(f"{option} {text!r}: write KEY=VALUE")
        pairs[key.strip()] = plain(value.strip())
    return pairs


def _pairs(text: str, option: str = "--rule", example: str = RULE) -> list[tuple[str, str]]:
    pairs = []
    for part in split(text):
        key, separator, value = part.partition("=")
        if not separator or key.strip() in {"", PREFIX}:
            raise CfmergeError(
                f"{option} {text!r}: {part!r} is not KEY=VALUE; write '{example}', "
                "with quotes around a value that has a comma in it"
            )
        pairs.append((key.strip(), _unquoted(value.strip())))
    return pairs


def split(text: str) -> list[str]:
    """The parts of a text between commas that stand in no quotes and no brackets.

    Raises:
        CfmergeError: a quote or bracket is left open.
    """
    parts, closers = [""], ""
    for character in text:
        if closers and closers[-1] in QUOTES:
            closers = closers[:-1] if character == closers[-1] else closers
        elif character in QUOTES and parts[-1].rstrip()[-1:] in {"=", *OPENING, ","}:
            closers += character
        elif character in OPENING:
            closers += CLOSING[OPENING.index(character)]
        elif closers and character == closers[-1]:
            closers = closers[:-1]
        elif character == "," and not closers:
            parts.append("")
            continue
        parts[-1] += character
    if closers:
        raise CfmergeError(
            f"--rule {text!r}: {closers[-1]!r} is missing; put quotes around a value that has an odd one"
        )
    return [part.strip() for part in parts if part.strip()]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in QUOTES else value


def _kinds(value: str) -> list[str]:
    return re.findall(r"[^\s+,\[\]]+", value)


# How the texts of a key become its value.
READ: dict[str, Callable[[Any], Any]] = {
    "experts": lambda texts: [expert(text) for text in texts],
    "rules": lambda texts: [rule(text) for text in texts],
    "rename": lambda texts: [rename(text) for text in texts],
    "layers": lambda texts: [run_of_layers(text) for text in texts],
    "align": alignment,
    "parameters": key_values,
    "adapter_out": lambda text: int(text) if text.isdigit() else text,
}
# How a value of the command line meets the file's, where it does not replace it.
JOINED: dict[str, Callable[[Any, Any], Any]] = {
    "rules": lambda ours, files: [*ours, *(files or [])],
    "rename": lambda ours, files: [*ours, *(files or [])],
    "parameters": lambda ours, files: {**(files or {}), **ours},
}


def swept(
    asked: Recipe, texts: Sequence[str], grids: Sequence[str], parameters: Mapping[str, Any]
) -> dict[str, Recipe]:
    """`{label: recipe}` of a sweep: the methods of `texts`, or a grid of the only one (none: the recipe's)."""
    if not grids:
        return {
            label: msgspec.structs.replace(asked, method=method, parameters=dict(parameters))
            for label, method in _labelled(texts).items()
        }
    from cfmerge.core.expressions import expression
    from cfmerge.products.sweep import grid

    if len(texts) > 1:
        raise CfmergeError(f"--grid is for one method, found {len(texts)}")
    method = texts[0] if texts else asked.method
    fixed = {**(asked.parameters if method == asked.method else {}), **parameters}
    values = {key: value.split(",") for key, value in key_values(grids, "--grid").items()}
    same = {key: [value] if isinstance(value, list) else value for key, value in fixed.items() if key not in values}
    return {
        label: msgspec.structs.replace(asked, method=expression(made), parameters={})
        for label, made in grid(method, **same, **values).items()
    }


def _labelled(texts: Sequence[str]) -> dict[str, str]:
    """`{label: method}`: `LABEL=METHOD` labels a method, others are labelled by their text."""
    labelled = {}
    for text in texts:
        label, separator, method = text.partition("=")
        named = bool(separator) and re.fullmatch(r"[\w.-]+", label) is not None
        labelled[label if named else text] = method if named else text
    if len(labelled) < max(len(texts), 1):
        raise CfmergeError("a sweep needs different methods: -m METHOD once for each, or --grid KEY=V1,V2")
    return labelled
