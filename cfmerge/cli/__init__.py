"""The command line. JAX is imported by the commands that compute, not here."""

import json as json_module
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import msgspec
import typer

import cfmerge
from cfmerge.cli import show
from cfmerge.errors import CfmergeError, nearest
from cfmerge.recipe import Expert, Recipe, load, parse, parse_size

INTERRUPTED = 130

app = typer.Typer(
    name="cfmerge",
    help="Merge fine-tuned models into one, without data and without training, in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[
    Path | None, typer.Argument(help="A recipe (YAML), or a model card that cfmerge wrote.", show_default=False)
]
Base = Annotated[str | None, typer.Option(help="The base: a model directory or a .safetensors file.")]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", "-e", help="An expert: PATH, NAME=PATH or NAME=PATH@WEIGHT; once for each."),
]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="See `cfmerge methods`. Default: ace.")]
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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cfmerge {cfmerge.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def merge(
    recipe: RecipeFile = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.")],
    base: Base = None,
    expert: Experts = None,
    method: MethodName = None,
    param: Parameters = None,
    heads: HeadsChoice = None,
    on_nonfinite: OnNonFinite = None,
    allow: Allow = None,
    dtype: Dtype = None,
    precision: Precision = None,
    shard_size: ShardSize = None,
    side_files: SideFiles = None,
    memory: Memory = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    json: Json = False,
) -> None:
    """Merge a base and its experts into one model."""
    asked = _recipe(recipe, base, expert, method, param, {
        "heads": heads, "on_nonfinite": on_nonfinite, "allow": allow, "dtype": dtype, "precision": precision,
        "shard_size": shard_size, "side_files": side_files,
    })  # fmt: skip
    limit = None if memory is None else parse_size(memory)
    with show.progress(_total_bytes(asked), json=json, quiet=quiet) as progress:
        result = cfmerge.merge_recipe(asked, output, overwrite=overwrite, memory=limit, progress=progress)
    if json:
        show.event("done", **result.summary())
    elif not quiet:
        show.merge_result(result)


@app.command()
def plan(
    recipe: RecipeFile = None,
    *,
    base: Base = None,
    expert: Experts = None,
    method: MethodName = None,
    param: Parameters = None,
    heads: HeadsChoice = None,
    allow: Allow = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    side_files: SideFiles = None,
    memory: Memory = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor, not only the counts.")] = False,
    json: Json = False,
) -> None:
    """What a merge would do and what it needs. Reads headers only."""
    asked = _recipe(recipe, base, expert, method, param, {
        "heads": heads, "allow": allow, "dtype": dtype, "shard_size": shard_size, "side_files": side_files,
    })  # fmt: skip
    show.plan(cfmerge.make_plan(asked), None if memory is None else parse_size(memory), tensors, json)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A model directory or a .safetensors file.")],
    json: Json = False,
) -> None:
    """A checkpoint's tensors: kinds, layouts, dtypes, shards, ties."""
    show.checkpoint(cfmerge.open_checkpoint(checkpoint), json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """The methods, with each one's parameters and source."""
    registry = cfmerge.methods.registry()
    if name is not None and name not in registry:
        raise CfmergeError(f"unknown method {name!r}{nearest(name, registry)}")
    show.methods([entry for entry in registry.values() if name in {None, entry.name}], json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything is left.")] = Path("cfmerge-demo"),
    seed: Annotated[int, typer.Option(help="Of data splits, initial weights and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Less training: a smoke test.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
    json: Json = False,
) -> None:
    """Train a small base and experts on real data, merge them, and compare."""
    from rich.console import Console

    from cfmerge import demo as demo_package

    console = Console(stderr=json)
    result = demo_package.run(output, seed=seed, quick=quick, overwrite=overwrite, console=console)
    if json:
        typer.echo(result.to_json())


def _recipe(
    file: Path | None,
    base: str | None,
    experts: list[str] | None,
    method: str | None,
    parameters: list[str] | None,
    options: dict[str, Any],
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
    missing = [key for key in ("base", "experts") if not content.get(key)]
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


def _total_bytes(recipe: Recipe) -> int:
    return cfmerge.make_plan(recipe).bytes_to_read


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The `cfmerge` command: runs it, and turns errors into messages and exit codes (1; 130 interrupted)."""
    signal.signal(signal.SIGTERM, _terminate)
    json = "--json" in sys.argv
    try:
        app()
    except CfmergeError as error:
        if json:
            typer.echo(json_module.dumps({"event": "error", "message": str(error)}))
        show.error(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns KeyboardInterrupt into this
            show.error("interrupted; nothing was written")
        raise
