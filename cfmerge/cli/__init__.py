"""The command line. JAX is imported by the commands that compute, not here."""

import json as json_module
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import cfmerge
from cfmerge.cli import bench, show
from cfmerge.cli import options as o
from cfmerge.errors import CfmergeError, nearest
from cfmerge.recipe import Recipe, parse_size

INTERRUPTED = 130

app = typer.Typer(
    name="cfmerge",
    help="Merge fine-tuned models into one, without data and without training, in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench.app, name="bench")


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
    recipe: o.RecipeFile = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make, or one .safetensors file.")],
    base: o.Base = None,
    expert: o.Experts = None,
    method: o.MethodName = None,
    param: o.Parameters = None,
    heads: o.HeadsChoice = None,
    on_nonfinite: o.OnNonFinite = None,
    allow: o.Allow = None,
    dtype: o.Dtype = None,
    precision: o.Precision = None,
    shard_size: o.ShardSize = None,
    side_files: o.SideFiles = None,
    statistics: o.Statistics = None,
    seed: o.Seed = None,
    plugin: o.Plugins = None,
    memory: o.Memory = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Merge a base and its experts into one model."""
    asked = o.make_recipe(
        recipe, base, expert, method, param, heads=heads, on_nonfinite=on_nonfinite, allow=allow, dtype=dtype,
        precision=precision, shard_size=shard_size, side_files=side_files, statistics=statistics, seed=seed,
        plugins=plugin,
    )  # fmt: skip
    limit = None if memory is None else parse_size(memory)
    with show.progress(_total_bytes(asked), json=json, quiet=quiet) as progress:
        result = cfmerge.merge_recipe(asked, output, overwrite=overwrite, memory=limit, progress=progress)
    if json:
        show.event("done", **result.summary())
    elif not quiet:
        show.merge_result(result)


@app.command()
def sweep(
    recipe: o.RecipeFile = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for the merged models.")],
    base: o.Base = None,
    expert: o.Experts = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method, such as 'ace(eps_rel=0.1)' or LABEL='...'; once for each."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", "-g", help="KEY=V1,V2,...: values of a parameter of the one method; once for each."),
    ] = None,
    heads: o.HeadsChoice = None,
    on_nonfinite: o.OnNonFinite = None,
    allow: o.Allow = None,
    dtype: o.Dtype = None,
    precision: o.Precision = None,
    seed: o.Seed = None,
    plugin: o.Plugins = None,
    memory: o.Memory = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Merge by several methods, or a grid of parameters, in one pass: one model for each."""
    from cfmerge.engine.plugins import load_plugins
    from cfmerge.engine.sweep import sweep_recipes

    load_plugins(plugin or [])
    asked = {
        label: o.make_recipe(
            recipe, base, expert, text, None, heads=heads, on_nonfinite=on_nonfinite, allow=allow, dtype=dtype,
            precision=precision, seed=seed, plugins=plugin,
        )
        for label, text in o.labelled_methods(method or [], grid or []).items()
    }  # fmt: skip
    limit = None if memory is None else parse_size(memory)
    with show.progress(_total_bytes(next(iter(asked.values()))), json=json, quiet=quiet) as progress:
        results = sweep_recipes(asked, output, overwrite, limit, progress)
    for label, result in results.items():
        if json:
            show.event("done", label=label, **result.summary())
        elif not quiet:
            show.line(f"{label}: {result.output}")


@app.command()
def accumulate(
    recipe: o.RecipeFile = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory of statistics to make.")],
    base: o.Base = None,
    expert: o.Experts = None,
    method: o.MethodName = None,
    param: o.Parameters = None,
    heads: o.HeadsChoice = None,
    precision: o.Precision = None,
    seed: o.Seed = None,
    plugin: o.Plugins = None,
    memory: o.Memory = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """What an additive method keeps of experts: to be added, forgotten, shipped, and solved by `merge --statistics`."""
    from cfmerge.engine.accumulate import accumulate_recipe

    asked = o.make_recipe(
        recipe, base, expert, method, param, heads=heads, precision=precision, seed=seed, plugins=plugin,
        allow=["one-expert"],
    )  # fmt: skip
    limit = None if memory is None else parse_size(memory)
    with show.progress(_total_bytes(asked), json=json, quiet=quiet) as progress:
        kept = accumulate_recipe(asked, output, overwrite, limit, progress)
    if json:
        show.event("done", output=str(output), experts=dict(kept.experts), tensors=len(kept.kinds))
    elif not quiet:
        show.line(f"{output}: statistics of {', '.join(kept.experts)} for {kept.method}")


@app.command()
def combine(
    statistics: Annotated[list[Path], typer.Argument(help="Directories of statistics to add.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory of statistics to make.")],
    forget: Annotated[list[Path] | None, typer.Option(help="Statistics to subtract; once for each.")] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Add statistics of experts, and forget others."""
    kept = cfmerge.Statistics.load(statistics[0])
    for other in statistics[1:]:
        kept = kept + cfmerge.Statistics.load(other)
    for other in forget or []:
        kept = kept - cfmerge.Statistics.load(other)
    kept.save(output, overwrite=overwrite, inputs=[*statistics, *(forget or [])])
    show.line(f"{output}: statistics of {', '.join(kept.experts) or 'no expert'} for {kept.method}")


@app.command()
def plan(
    recipe: o.RecipeFile = None,
    *,
    base: o.Base = None,
    expert: o.Experts = None,
    method: o.MethodName = None,
    param: o.Parameters = None,
    heads: o.HeadsChoice = None,
    allow: o.Allow = None,
    dtype: o.Dtype = None,
    shard_size: o.ShardSize = None,
    side_files: o.SideFiles = None,
    statistics: o.Statistics = None,
    plugin: o.Plugins = None,
    memory: o.Memory = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor, not only the counts.")] = False,
    json: o.Json = False,
) -> None:
    """What a merge would do and what it needs. Reads headers only."""
    asked = o.make_recipe(
        recipe, base, expert, method, param, heads=heads, allow=allow, dtype=dtype, shard_size=shard_size,
        side_files=side_files, statistics=statistics, plugins=plugin,
    )  # fmt: skip
    show.plan(cfmerge.make_plan(asked), None if memory is None else parse_size(memory), tensors, json)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A model directory or a .safetensors file.")],
    json: o.Json = False,
) -> None:
    """A checkpoint's tensors: kinds, layouts, dtypes, shards, ties."""
    show.checkpoint(cfmerge.open_checkpoint(checkpoint), json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    plugin: o.Plugins = None,
    json: o.Json = False,
) -> None:
    """The methods and transforms; of one of them its parameters and source."""
    from cfmerge.engine.plugins import load_plugins

    load_plugins(plugin or [])
    registry = cfmerge.methods.registry()
    if name is not None and name not in registry:
        raise CfmergeError(f"unknown method {name!r}{nearest(name, registry)}")
    show.methods([entry for entry in registry.values() if name in {None, entry.name}], json, full=name is not None)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything is left.")] = Path("cfmerge-demo"),
    seed: Annotated[int, typer.Option(help="Of data splits, initial weights and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Less training: a smoke test.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
    json: o.Json = False,
) -> None:
    """Train a small base and experts on real data, merge them, and compare."""
    from rich.console import Console

    from cfmerge import demo as demo_package

    console = Console(stderr=json)
    result = demo_package.run(output, seed=seed, quick=quick, overwrite=overwrite, console=console)
    if json:
        typer.echo(result.to_json())


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
