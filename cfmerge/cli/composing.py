"""The commands about results that are not one checkpoint: `compose`, `materialise`, and `inspect` of one."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from rich.table import Table

from cfmerge.cli import options as o
from cfmerge.cli import show
from cfmerge.cli.messages import out, say
from cfmerge.cli.tables import size
from cfmerge.recipe import Format, Recipe

if TYPE_CHECKING:
    from cfmerge.compose import Artifact
    from cfmerge.products.plan import Plan

COMPOSE = (
    "cfmerge compose emr --base BASE -e A -e B -o OUT",
    "cfmerge compose smile recipe.yaml -p rank=32 -p gate=16 -o OUT",
    "cfmerge materialise OUT --task A -o MODEL",
)


@o.takes_recipe("adapter_out", "layers", "statistics", "side_files", "format", "chat_template", "unmerged", system=True)
def compose(
    asked: Recipe,
    *,
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
    """Make one result for all tasks that is not one checkpoint."""
    from cfmerge import compose as composing
    from cfmerge.products.processes import joined_by, together

    joined_by(coordinator, processes, process, devices)
    with together(output, devices) as where:
        json, quiet = show.by_the_first(where, json, quiet)
        planned = composing.plan(asked)
        result = show.run(planned, output, where, json, quiet, overwrite=overwrite, memory=memory, fresh=fresh)
    if json:
        show.event("done", **result.summary())
    elif not quiet:
        out().print(show.counts(planned, "what is kept"))
        show.notes((*result.resumed, *result.notes))
        show.line(f"{result.output}  {size(result.bytes_written)} in {result.seconds:.1f} s")
        task = planned.expert_specs[0].name
        show.line(f"cfmerge materialise {result.output} --task {task} -o MODEL makes the model of a task")


def planned(recipe: Recipe) -> "Plan":
    """The plan of a recipe: of one checkpoint, or of a result that is not one, as its method says."""
    from cfmerge import compose as composing
    from cfmerge import make_plan, methods

    system = recipe.method.partition("(")[0].strip() in methods.registry("composer")
    return composing.plan(recipe) if system else make_plan(recipe)


def materialise(
    composed: Annotated[Path, o.argument("COMPOSED", "A directory that `cfmerge compose` has made.")],
    *,
    task: Annotated[str, o.option("--task", "-t", metavar="NAME", panel=o.WHAT, help="An expert's name.")],
    base: Annotated[str | None, o.option("--base", metavar="PATH", panel=o.WHAT, help="Default: where it was.")] = None,
    output: o.Output,
    format: Annotated[
        Format | None, o.option("--format", metavar="NAME", panel=o.WHERE, help="torch, orbax, ... Default: base's.")
    ] = None,
    shard_size: Annotated[
        str, o.option("--shard-size", metavar="SIZE", panel=o.WHERE, help="Largest file. Default: 5GB.")
    ] = "5GB",
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write the model of one task of a composed result."""
    from cfmerge import compose as composing

    artifact = composing.load(composed)
    with show.progress(artifact.about.base_bytes, json=json, quiet=quiet, what="writing") as told:
        done = composing.materialise(
            artifact, task, output, base=base, format=format, shard_size=shard_size, overwrite=overwrite, progress=told
        )
    show.converted(done, json, quiet)


def inspected(artifact: "Artifact", path: Path, json: bool) -> None:
    """Prints a composed result: its system and tasks, what it keeps, and its size beside the base and all experts."""
    told = _summary(artifact, path)
    if json:
        print(json_module.dumps(told, indent=2))
        return
    console = out()
    parameters = ", ".join(f"{key}={value}" for key, value in artifact.about.parameters.items())
    say(console, f"{artifact.system} ({parameters}) over {escape(artifact.about.base) or 'a tree'}", "bold")
    if artifact.scales is None:
        console.print(f"tasks   {escape(', '.join(artifact.tasks))}", soft_wrap=True)
    else:
        table = Table("task", "scale")
        for task, scale in zip(artifact.tasks, artifact.scales, strict=True):
            table.add_row(escape(task), f"{float(scale):.4f}")
        console.print(table)
    table = Table("part", "tensors", "size")
    for part, one in told["parts"].items():
        table.add_row(part, str(one["tensors"]), size(one["bytes"]))
    console.print(table)
    for task, names in told["heads"].items():
        say(console, f"heads of {task}: {', '.join(names)}")
    say(
        console,
        f"{size(told['bytes'])} beside a base of {size(told['base_bytes'])}: together {told['of_base']:.2f} of the "
        f"base, {told['of_experts']:.2f} of the base and all {len(artifact.tasks)} experts",
    )


def _summary(artifact: "Artifact", path: Path) -> dict[str, Any]:
    about, parts = artifact.about, dict[str, dict[str, int]]()
    for own in artifact.parts.values():
        for part, array in own.items():
            one = parts.setdefault(part, {"tensors": 0, "bytes": 0})
            one["tensors"] += 1
            one["bytes"] += array.nbytes
    base = about.base_bytes
    return {
        "path": str(path),
        "system": about.system,
        "tasks": list(about.tasks),
        "parameters": dict(about.parameters),
        "scales": None if artifact.scales is None else [float(scale) for scale in artifact.scales],
        "base": about.base,
        "parts": parts,
        "heads": {task: list(names) for task, names in artifact.heads.items()},
        "bytes": artifact.nbytes,
        "base_bytes": base,
        "of_base": (base + artifact.nbytes) / max(base, 1),
        "of_experts": (base + artifact.nbytes) / max((1 + len(about.tasks)) * base, 1),
    }
