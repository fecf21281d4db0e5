"""The options that commands share, and the recipe that they make."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from cfmerge.errors import CfmergeError
from cfmerge.recipe import Expert, Recipe, load, parse

RecipeFile = Annotated[
    Path | None, typer.Argument(help="A recipe (YAML), or a model card that cfmerge wrote.", show_default=False)
]
Base = Annotated[str | None, typer.Option(help="The base: a model directory or a .safetensors file.")]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", "-e", help="An expert: PATH, NAME=PATH or NAME=PATH@WEIGHT; once for each."),
]
MethodName = Annotated[
    str | None, typer.Option("--method", "-m", help="See `cfmerge methods`; A >> B chains transforms. Default: ace.")
]
Parameters = Annotated[
    list[str] | None, typer.Option("--param", "-p", help="A parameter of the method, KEY=VALUE; once for each.")
]
HeadsChoice = Annotated[
    Literal["keep-base", "drop", "export"] | None,
    typer.Option(help="What happens to heads that the models do not share."),
]
OnNonFinite = Annotated[
    Literal["error", "skip-expert"] | None, typer.Option(help="When an expert holds NaN or infinity.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="duplicate-experts, one-expert or base-as-expert; once for each."),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of the output. Default: the base's.")
]
Precision = Annotated[
    Literal["auto", "float32", "float64"] | None, typer.Option(help="Of the computation. Default: auto.")
]
ShardSize = Annotated[str | None, typer.Option(help="Largest output file, such as 5GB (the default) or 500MB.")]
SideFiles = Annotated[
    str | None, typer.Option(help="Where config, tokenizer and the like come from. Default: the base.")
]
Memory = Annotated[
    str | None, typer.Option(help="Bound of the working set, such as 4GB. Default: a quarter of what is free.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Statistics = Annotated[str | None, typer.Option(help="A directory of statistics to begin from (see `accumulate`).")]
Seed = Annotated[int | None, typer.Option(help="Of random methods. Default: 0.")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="A Python file that registers methods; once for each.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]


def make_recipe(
    file: Path | None,
    base: str | None,
    experts: list[str] | None,
    method: str | None,
    parameters: list[str] | None,
    **options: Any,
) -> Recipe:
    """The recipe of a file, with what the command line says put over it."""
    content: dict[str, Any] = {}
    if file is not None:
        content = msgspec.to_builtins(load(file))
    if base is not None:
        content["base"] = base
    if experts:
        content["experts"] = [_expert(text) for text in experts]
    if method is not None and method != content.get("method"):
        content |= {"method": method, "parameters": {}}
    if parameters:
        content["parameters"] = {**content.get("parameters", {}), **_key_values(parameters)}
    content |= {key: value for key, value in options.items() if value is not None}
    needed = ("base",) if content.get("statistics") else ("base", "experts")
    missing = [key for key in needed if not content.get(key)]
    if missing:
        raise CfmergeError(f"no {' and no '.join(missing)}: give --base and --expert, or a recipe file")
    return parse(msgspec.to_builtins(content), str(file or "command line"))


def _expert(text: str) -> Expert:
    """`PATH`, `NAME=PATH` or `NAME=PATH@WEIGHT`; a path that exists as written is taken as it is."""
    if Path(text).exists():
        return Expert(text)
    name, separator, path = text.partition("=")
    name, path = (name, path) if separator else ("", text)
    bare, at, weight = path.rpartition("@")
    if at and not Path(path).exists():
        try:
            return Expert(bare, name, float(weight))
        except ValueError:
            pass
    return Expert(path, name)


def _key_values(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise CfmergeError(f"--param {text!r}: write KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def labelled_methods(texts: Sequence[str], grids: Sequence[str]) -> dict[str, str]:
    """`{label: method}` of a sweep: the methods as given (`LABEL=METHOD` labels one), or a grid of the only one."""
    if grids:
        from cfmerge.core.expressions import expression
        from cfmerge.engine.sweep import grid

        if len(texts) > 1:
            raise CfmergeError(f"--grid is for one method, found {len(texts)}")
        values = {key: value.split(",") for key, value in _key_values(grids).items()}
        return {label: expression(method) for label, method in grid((texts or ["ace"])[0], **values).items()}
    labelled = {}
    for text in texts:
        label, separator, method = text.partition("=")
        named = bool(separator) and re.fullmatch(r"[\w.-]+", label) is not None
        labelled[label if named else text] = method if named else text
    if len(labelled) < max(len(texts), 1):
        raise CfmergeError("a sweep needs different methods: -m METHOD once for each, or --grid KEY=V1,V2")
    return labelled
