"""The command line. JAX is imported by the commands that compute, not here."""

import dataclasses
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import msgspec
import typer

import cfmerge
from cfmerge.cli import aligning, bench, composing, diagnosing, files, recipes, reporting, show, tables, temporal
from cfmerge.cli import options as o
from cfmerge.cli.allocator import keep_freed_memory
from cfmerge.cli.ending import ended
from cfmerge.cli.texts import key_values, swept
from cfmerge.errors import CfmergeError, nearest
from cfmerge.mergekit import Stage, located, needed_by
from cfmerge.recipe import Recipe

app = typer.Typer(
    name="cfmerge",
    help="Merge fine-tuned models into one, without data and without training, in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(temporal.app, name="time")
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


@app.command(
    cls=o.Command,
    epilog=o.examples(
        "cfmerge merge --base BASE -e EXPERT -e code=PATH@0.5 -o OUT",
        "cfmerge merge --base BASE -e A -e B -m ties -p density=0.3 -o OUT",
        "cfmerge merge recipe.yaml -r 'match=*.embed*, method=keep-base' -o OUT",
        "cfmerge merge OUT/README.md -o AGAIN",
        "cfmerge merge mergekit.yml OUT",
        "cfmerge merge --run RUN --last 10 --decay inverse-sqrt -o OUT",
    ),
)
@o.takes_recipe(chains=True, runs=True)
def merge(
    asked: list[Stage],
    *,
    out: o.Out = None,
    output: o.ModelOutput = None,
    overwrite: o.Overwrite = False,
    fresh: o.Fresh = False,
    memory: o.Memory = None,
    no_compile_cache: o.NoCompileCache = False,
    devices: o.Devices = None,
    coordinator: o.Coordinator = None,
    processes: o.Processes = None,
    process: o.Process = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Merge a base and its experts into one model."""
    from cfmerge.products.processes import joined_by, together
    from cfmerge.products.stages import directory_of, is_made

    joined_by(coordinator, processes, process, devices)
    target = o.one_output(out, output)
    earlier = directory_of(target)
    how = {"overwrite": overwrite, "memory": memory, "fresh": fresh}
    for stage in located(asked, earlier):
        place = earlier / stage.name if stage.name else target
        with together(place, devices) as where:
            json, quiet = show.by_the_first(where, json, quiet)
            show.window_of(stage, json, quiet)
            planned = cfmerge.plan(stage.recipe)
            if stage.window is not None:
                planned = dataclasses.replace(planned, notes=(stage.window.note, *planned.notes))
            if stage.name and not overwrite and is_made(planned, place):
                show.stage(stage, place, json, quiet)
                continue
            result = show.run(planned, place, where, json, quiet, **how)
        show.stage(stage, result, json, quiet)


@app.command(
    cls=o.Command,
    epilog=o.examples(
        "cfmerge sweep --base BASE -e A -e B --grid eps_rel=0.01,0.1,1 -o RUNS",
        "cfmerge sweep recipe.yaml -m average -m light='ties(density=0.1)' -o RUNS",
    ),
)
@o.takes_recipe()
def sweep(
    asked: Recipe,
    *,
    method: Annotated[
        list[str] | None,
        o.option("--method", "-m", metavar="METHOD", panel=o.HOW, help="METHOD or LABEL=METHOD; repeat for each."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        o.option("--grid", "-g", metavar="KEY=V1,V2", panel=o.HOW, help="Values for the one method; repeat."),
    ] = None,
    parameters: o.Parameters = None,
    output: o.Output,
    overwrite: o.Overwrite = False,
    fresh: o.Fresh = False,
    memory: o.Memory = None,
    no_compile_cache: o.NoCompileCache = False,
    devices: o.Devices = None,
    coordinator: o.Coordinator = None,
    processes: o.Processes = None,
    process: o.Process = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Merge by several methods, or a grid of numbers, in one pass."""
    from cfmerge.planning.plugins import load_plugins
    from cfmerge.products.processes import joined_by, together

    joined_by(coordinator, processes, process, devices)
    with together(output, devices) as where:
        json, quiet = show.by_the_first(where, json, quiet)
        load_plugins(asked.plugins)
        planned = cfmerge.plan(swept(asked, method or [], grid or [], key_values(parameters or [])))
        how = {"overwrite": overwrite, "memory": memory, "fresh": fresh}
        results = show.run(planned, output, where, json, quiet, **how)
    for label, result in results.items():
        if json:
            show.event("done", label=label, **result.summary())
        elif not quiet:
            show.line(f"{label}: {result.output}")
            show.warnings(result)
    if not (json or quiet):
        told = [note for result in results.values() for note in (*result.resumed, *result.notes)]
        show.notes(list(dict.fromkeys(told)))


@app.command(
    cls=o.Command,
    epilog=o.examples(
        "cfmerge accumulate --base BASE -e A -e B -o STATS",
        "cfmerge combine STATS OTHERS -o ALL",
        "cfmerge merge --base BASE --statistics ALL -o OUT",
    ),
)
@o.takes_recipe("dtype", "format", "shard_size", "side_files", "adapter_out", "unmerged")
def accumulate(
    asked: Recipe,
    *,
    output: o.Output,
    overwrite: o.Overwrite = False,
    memory: o.Memory = None,
    no_compile_cache: o.NoCompileCache = False,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Make statistics of experts, to add, forget and merge later."""
    from cfmerge.engine.placement import placement_of
    from cfmerge.products.accumulate import accumulate_plan

    where = placement_of(devices)
    planned = cfmerge.make_plan(msgspec.structs.replace(asked, allow=[*asked.allow, "one-expert"]), sums=True)
    with show.progress(planned.bytes_to_read, json=json, quiet=quiet) as progress:
        kept = accumulate_plan(planned, output, overwrite, memory, where, progress)
    if json:
        show.event("done", output=str(output), experts=dict(kept.experts), tensors=len(kept.kinds))
    elif not quiet:
        show.line(f"{output}: statistics of {', '.join(kept.experts)} for {kept.method}")
        show.notes(planned.notes)


@app.command(cls=o.Command)
def combine(
    statistics: Annotated[list[Path], o.argument("STATISTICS", "Directories of statistics to add.")],
    *,
    forget: Annotated[
        list[Path] | None, o.option("--forget", metavar="PATH", panel=o.WHAT, help="Statistics to subtract; repeat.")
    ] = None,
    output: o.Output,
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


@app.command(cls=o.Command)
@o.takes_recipe(chains=True, runs=True)
def plan(
    asked: list[Stage],
    *,
    memory: o.Memory = None,
    devices: o.Devices = None,
    device_memory: o.DeviceMemory = None,
    no_calibration: o.NoCalibration = False,
    tensors: Annotated[bool, o.option("--tensors", help="List every tensor, not only the counts.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a merge would do and need, from headers; `auto` reads weights too."""
    names = {stage.name for stage in asked if stage.name}
    for stage in asked:
        waiting = needed_by(stage.recipe) & names
        if not json:
            show.recipe_of(stage, sorted(waiting))
        if not waiting:
            planned = composing.planned(stage.recipe)
            if planned.chooses:
                planned = planned.ready()
            forecast = planned.forecast(memory, devices, device_memory, not no_calibration)
            tables.plan(planned, forecast, tensors, json, stage.window)


@app.command(cls=o.Command)
def clean(
    places: Annotated[
        list[Path] | None, o.argument("DIRECTORY", "Outputs, or directories that hold them. Default: here.")
    ] = None,
    *,
    yes: Annotated[bool, o.option("--yes", "-y", help="Remove without asking.")] = False,
    json: o.Json = False,
) -> None:
    """List what merges that ended early have left, and remove it."""
    from cfmerge.cli.leftovers import listed_and_removed

    listed_and_removed(places or [Path()], yes, json)


app.command(cls=o.Command, epilog=o.examples(*diagnosing.EXAMPLES))(diagnosing.diagnose)
app.command(cls=o.Command, epilog=o.examples(*reporting.EXAMPLES))(reporting.report)
app.command(cls=o.Command, epilog=o.examples(*composing.COMPOSE))(composing.compose)
app.command(cls=o.Command)(composing.materialise)
app.command(cls=o.Command, epilog=o.examples(*files.EXAMPLES))(files.convert)
app.command(cls=o.Command)(files.inspect)
app.command(cls=o.Command)(recipes.recipes)
app.command(cls=o.Command, epilog=o.examples(*aligning.SPACES))(aligning.spaces)
app.command("zip", cls=o.Command, epilog=o.examples(*aligning.ZIP))(aligning.zip_models)


@app.command(cls=o.Command)
def methods(
    name: Annotated[str | None, o.argument("NAME", "A method, transform or system, to show all of it.")] = None,
    plugin: o.Plugins = None,
    json: o.Json = False,
) -> None:
    """List the methods and transforms, or show one in full."""
    from cfmerge import compose  # noqa: F401, it registers the systems
    from cfmerge.planning.plugins import load_plugins

    load_plugins(plugin or [])
    known = cfmerge.methods.registry() if name is None else cfmerge.methods.registry("method", "transform", "composer")
    if name is not None and name not in known:
        raise CfmergeError(f"unknown method {name!r}{nearest(name, known)}")
    tables.methods([entry for entry in known.values() if name in {None, entry.name}], json, full=name is not None)


@app.command(cls=o.Command)
def demo(
    output: Annotated[
        Path, o.option("--output", "-o", metavar="PATH", panel=o.WHERE, help="Default: cfmerge-demo.")
    ] = Path("cfmerge-demo"),
    seed: Annotated[int, o.option("--seed", metavar="N", help="For data, weights and training. Default: 0.")] = 0,
    quick: Annotated[bool, o.option("--quick", help="Train less: a smoke test.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Train a small base and experts, merge them, and compare."""
    from rich.console import Console

    from cfmerge import demo as demo_package

    console = Console(stderr=json)
    result = demo_package.run(output, seed=seed, quick=quick, overwrite=overwrite, console=console)
    if json:
        typer.echo(result.to_json())


def main() -> None:
    """The `cfmerge` command: errors become messages and exit codes."""
    keep_freed_memory()
    logging.basicConfig(format="%(message)s")  # on stderr
    logging.getLogger("cfmerge").setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *where, **how: f"warning: {message}\n"
    ended(app, json="--json" in sys.argv)
