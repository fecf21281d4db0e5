"""`cfmerge time`: merging over time, from a training script in any framework, one command for each stage."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cfmerge.cli import options as o
from cfmerge.cli import settings, show
from cfmerge.cli.messages import out, say
from cfmerge.cli.scores import by_name, table
from cfmerge.cli.tables import size
from cfmerge.errors import CfmergeError

app = typer.Typer(help="Merge over time: experts that come one after another (TIME).", no_args_is_help=True)

Model = Annotated[
    Path | None, o.option("--output", "-o", metavar="PATH", panel=o.WHERE, help="Default: a place in the store.")
]
OF_MERGES = (
    "unmerged", "rules", "rename", "heads", "allow", "precision", "seed", "plugins", "dtype", "format", "shard_size",
    "side_files",
)  # fmt: skip
INIT = (
    "cfmerge time init STORE --base BASE --protocol best-in-time --weight 0.5 -o START",
    "cfmerge time init STORE --base BASE --init zero-shot --deploy 'all(by_time=sqrt)'",
    "cfmerge time init STORE -o START --overwrite",
)

STORE = (
    "cfmerge time store STORE runs/cars/checkpoint-900 --task cars",
    "cfmerge time store STORE runs/cars/lora --task cars --over START",
)


@app.callback()
def _time() -> None:
    pass


@app.command(cls=o.Command, epilog=o.examples(*INIT))
@o.takes_options(*OF_MERGES)
def init(
    options: Mapping[str, Any],
    store: o.StorePath,
    *,
    base: Annotated[
        str | None, o.option("--base", metavar="PATH", panel=o.WHAT, help="Makes the store; later: where it is now.")
    ] = None,
    task: Annotated[
        list[str] | None, o.option("--task", metavar="NAME", panel=o.WHAT, help="An adaptation task; repeat in order.")
    ] = None,
    held_out: Annotated[
        list[str] | None, o.option("--held-out", metavar="NAME", panel=o.WHAT, help="A task never trained; repeat.")
    ] = None,
    protocol: Annotated[
        str | None, o.option("--protocol", metavar="NAME", panel=o.HOW, help="Both rules: best-in-time, offline, ...")
    ] = None,
    init_rule: Annotated[
        str | None, o.option("--init", metavar="RULE", panel=o.HOW, help="zero-shot, fine-tuned, ema, merged.")
    ] = None,
    deploy_rule: Annotated[
        str | None, o.option("--deploy", metavar="RULE", panel=o.HOW, help="last, ema, offline, paint, ...")
    ] = None,
    technique: Annotated[
        str | None,
        o.option("--technique", metavar="METHOD", panel=o.HOW, help="Both rules' method. Default: average."),
    ] = None,
    weight: Annotated[
        float | None, o.option("--weight", metavar="W", panel=o.HOW, help="The newest expert's, in ema and paint.")
    ] = None,
    window: Annotated[
        int | None, o.option("--window", metavar="K", panel=o.HOW, help="Merge the newest K experts alone.")
    ] = None,
    keep: Annotated[
        int | None, o.option("--keep", metavar="K", panel=o.HOW, help="Keep the tensors of the newest K experts.")
    ] = None,
    output: Model = None,
    no_model: Annotated[
        bool, o.option("--no-model", panel=o.WHERE, help="Make the store, or change it: write no model.")
    ] = False,
    overwrite: o.Overwrite = False,
    memory: o.Memory = None,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write the checkpoint from which the next task starts."""
    from cfmerge.temporal import Time

    time = Time(
        store, base, init=init_rule, deploy=deploy_rule, protocol=protocol, technique=technique, weight=weight,
        window=window, keep=keep, tasks=task, held_out=held_out, **options,
    )  # fmt: skip
    left = f"; the next is {time.left[0]}" if time.left else ""
    if no_model:
        show.done(json, quiet, f"{store}: the store{left}", step=time.step, left=time.left)
        return
    with show.pulse(json, quiet) as progress:
        model = time.init(output, overwrite=overwrite, memory=memory, devices=devices, progress=progress)
    text = f"{model}  from which the next task starts{left}"
    show.done(json, quiet, text, output=str(model), step=time.step, left=time.left)


@app.command(cls=o.Command, epilog=o.examples(*STORE))
def store(
    store: o.StorePath,
    checkpoint: Annotated[Path, o.argument("CHECKPOINT", "The trained expert, in any format, or an adapter.")],
    *,
    task: Annotated[str, o.option("--task", "-t", metavar="NAME", panel=o.WHAT, help="The expert's task.")],
    link: Annotated[bool, o.option("--link", panel=o.WHERE, help="Refer to it where it lies: copy nothing.")] = False,
    over: Annotated[
        str | None, o.option("--over", metavar="PATH", panel=o.WHAT, help="The model that an adapter changes.")
    ] = None,
    memory: o.Memory = None,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Take in the trained expert of a task."""
    from cfmerge.temporal import Time

    time = Time(store)
    with show.pulse(json, quiet) as progress:
        time.store(checkpoint, task, link=link, over=over, memory=memory, devices=devices, progress=progress)
    how = "linked" if link else "copied"
    show.done(json, quiet, f"{store}: {task} is step {time.step}, {how}", task=task, step=time.step, left=time.left)


@app.command(
    cls=o.Command,
    epilog=o.examples(
        "cfmerge time deploy STORE -o SERVED --overwrite", "cfmerge time deploy STORE --rule offline -o OTHER"
    ),
)
def deploy(
    store: o.StorePath,
    *,
    rule: Annotated[
        str | None, o.option("--rule", metavar="RULE", panel=o.HOW, help="Another rule than the store's, once.")
    ] = None,
    output: Model = None,
    overwrite: o.Overwrite = False,
    memory: o.Memory = None,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write the model to serve now."""
    from cfmerge.temporal import Time

    time = Time(store)
    with show.pulse(json, quiet) as progress:
        model = time.deploy(
            output, rule=rule, overwrite=overwrite, memory=memory, devices=devices, progress=progress
        )  # fmt: skip
    used = rule or time.rules[1].text
    told = f"{model}  by {used} over {', '.join(time.seen) or 'no expert yet: the base'}"
    show.done(json, quiet, told, output=str(model), step=time.step, rule=used, experts=time.seen)


@app.command(
    cls=o.Command,
    epilog=o.examples(
        "cfmerge time evaluate STORE scores.json",
        "cfmerge time evaluate STORE of_the_base.json --step 0",
        "cfmerge time evaluate STORE -s cars=0.81 -s birds=0.4",
    ),
)
def evaluate(
    store: o.StorePath,
    scores: Annotated[Path | None, o.argument("SCORES", "A table: JSON {task: score}, or CSV task,score.")] = None,
    *,
    score: Annotated[
        list[str] | None, o.option("--score", "-s", metavar="TASK=SCORE", panel=o.WHAT, help="A score; repeat.")
    ] = None,
    step: Annotated[
        int | None, o.option("--step", metavar="N", panel=o.WHAT, help="The scored step; 0: the base. Default: now.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Take in the scores by task of the model that was deployed."""
    from cfmerge.temporal import Time

    time = Time(store)
    found = (table(scores) if scores is not None else {}) | by_name(score or [])
    if not found:
        raise CfmergeError("no scores: name a table of them, or give --score TASK=SCORE")
    time.evaluate(found, step)
    at = time.step if step is None else step
    count = "1 score" if len(found) == 1 else f"{len(found)} scores"
    show.done(json, False, f"{store}: {count} of step {at}", step=at, scores=found)


@app.command(cls=o.Command, epilog=o.examples("cfmerge time report STORE -o REPORT"))
def report(
    store: o.StorePath,
    *,
    output: Annotated[
        Path | None,
        o.option("--output", "-o", metavar="PATH", panel=o.WHERE, help="Write report.md, .json, scores.png."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Show the metrics of each step; with -o write them, the scores by task, and a picture."""
    from cfmerge.temporal import Time

    made = Time(store).report()
    if output is not None:
        made.save(output)
    if json:
        print(made.to_json(), end="")
        return
    console, rows = out(), Table("step", "expert", "accumulation", "retention", "geometric mean", "backward")
    for row in made.rows:
        numbers = (row.knowledge_accumulation, row.zero_shot_retention, row.geometric_mean, row.backward_transfer)
        rows.add_row(str(row.step), escape(row.expert or "(the base)"), *map(made.shown, numbers))
    console.print(rows)
    for reason in made.reasons():
        say(console, f"not defined: {reason}")
    if output is not None:
        show.line(f"{output}  report.md, report.json, scores.png")


@app.command(cls=o.Command)
def forget(
    store: o.StorePath,
    task: Annotated[str, o.argument("TASK", "The task of the expert.")],
    *,
    memory: o.Memory = None,
    devices: o.Devices = None,
    json: o.Json = False,
) -> None:
    """Take an expert out of the store and of its running models."""
    from cfmerge.temporal import Time

    time = Time(store)
    time.forget(task, memory=memory, devices=devices)
    show.done(
        json, False, f"{store}: {task} is forgotten; there is {', '.join(time.done) or 'no expert'}", experts=time.done
    )


@app.command(cls=o.Command)
def plan(store: o.StorePath, *, json: o.Json = False) -> None:
    """Show how the next models are made and what that needs, from headers."""
    from cfmerge.temporal import Time

    time = Time(store)
    axes = time.plan()
    if json:
        print(
            json_module.dumps(
                {"experts": time.done, "left": time.left, "axes": [one.summary() for one in axes]}, indent=2
            )
        )
        return
    console = out()
    say(console, f"{store}: {', '.join(time.done) or 'no expert yet'}", "bold")
    for one in axes:
        say(console, f"{one.axis}: {one.rule}", "bold")
        rows = Table(show_header=False)
        rows.add_row(
            "reads",
            escape(", ".join(one.reads)) or "the base"
            if not one.experts
            else escape(", ".join(one.reads)) or "the running model",
        )
        rows.add_row("bytes", size(one.bytes_read))
        rows.add_row("memory", "-" if one.memory is None else size(one.memory))
        console.print(rows)
        say(console, one.note)


app.command(cls=o.Command, epilog=o.examples(settings.RUN))(settings.run)
