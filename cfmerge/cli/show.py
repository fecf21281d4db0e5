"""How a merge looks while it runs and when it is done, in a terminal and as JSON."""

import contextlib
import json as json_module
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from cfmerge.cli.messages import out, say, tell
from cfmerge.cli.runs import show_window
from cfmerge.cli.tables import counts, size

if TYPE_CHECKING:
    from cfmerge.engine.placement import Placement
    from cfmerge.mergekit import Stage
    from cfmerge.products.convert import Converted
    from cfmerge.products.plan import Plan
    from cfmerge.report.result import MergeResult


def event(kind: str, **values: Any) -> None:
    """One line of JSON on stdout."""
    print(json_module.dumps({"event": kind, **values}), flush=True)


def done(json: bool, quiet: bool, text: str, **values: Any) -> None:
    """The end of a command: a line, or an event with values."""
    if json:
        event("done", **values)
    elif not quiet:
        line(text)


def run(planned: "Plan", output: Path, where: "Placement", json: bool, quiet: bool, **how: Any) -> Any:
    """The result of a plan on a placement, with its progress; `how` as `Plan.run` takes it."""
    with progress(planned.bytes_to_read // where.processes.count, json=json, quiet=quiet) as told:
        return planned.run(output, devices=where, progress=told, **how)


def by_the_first(where: "Placement", json: bool, quiet: bool) -> tuple[bool, bool]:
    """`json` and `quiet` for this process: the first alone shows anything."""
    return (json, quiet) if where.processes.number == 0 else (False, True)


@contextlib.contextmanager
def progress(
    total: int | None, *, json: bool, quiet: bool, what: str = "merging"
) -> Iterator[Callable[[str, int], None] | None]:
    """A callback for the engine: a bar in a terminal, lines of JSON with `--json`, nothing otherwise.

    `total`: the bytes that will be read; None: they are not known.
    """
    if json and not quiet and total is not None:
        yield _json_progress(total)
        return
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name, count: bar.update(task, advance=count, description=escape(name[-48:]))


def pulse(json: bool, quiet: bool) -> contextlib.AbstractContextManager[Callable[[str, int], None] | None]:
    """The progress of work whose size is not known."""
    return progress(None, json=json, quiet=quiet or json)


def _json_progress(whole: int) -> Callable[[str, int], None]:
    done, shown = 0, 0

    def tell(name: str, count: int) -> None:
        nonlocal done, shown
        done += count
        if done - shown >= whole / 100 or done >= whole > shown:
            shown = done
            event("progress", tensor=name, bytes=done, total=whole)

    return tell


def stage(stage: "Stage", done: "MergeResult | Path", json: bool, quiet: bool) -> None:
    """The result of a merge, or the place of one that was there already; and the notes on its recipe."""
    there = isinstance(done, Path)
    if json:
        named = {"stage": stage.name} if stage.name else {}
        told = {"notes_on_recipe": list(stage.notes)} if stage.notes else {}
        values = {"output": str(done), "kept": True} if isinstance(done, Path) else done.summary()
        event("done", **named, **values, **told)
    if json or quiet:
        return
    if stage.name:
        line(f"stage {stage.name}{f': {done} is there already' if there else ''}")
    notes(stage.notes)
    if not isinstance(done, Path):
        merge_result(done)


def window_of(stage: "Stage", json: bool, quiet: bool) -> None:
    """The steps of a training run that a stage merges, before it does; nothing of another recipe."""
    if stage.window is not None and json:
        event("window", **stage.window.summary())
    elif stage.window is not None and not quiet:
        show_window(stage.window)


def recipe_of(stage: "Stage", waiting: Sequence[str]) -> None:
    """A recipe that was made of a configuration of mergekit, and notes on it; nothing of a recipe as it was written."""
    console = out()
    if stage.window is not None:
        show_window(stage.window)
    if stage.name:
        say(console, f"stage {stage.name}", "bold")
    if stage.translated:
        console.print(escape(stage.recipe.brief()), soft_wrap=True)
    for note in stage.notes:
        tell(console, "note", note, "yellow")
    if waiting:
        say(console, f"it is planned when {' and '.join(waiting)} is merged")


def merge_result(result: "MergeResult") -> None:
    console = out()
    plan = result.plan
    merged = any(what not in ("keep-base", "skip") for _, what in plan.counts())
    console.print(f"merged by {escape(plan.method.name)}" if merged else "layers copied into a stack")
    console.print(counts(result.plan, "what was done"))
    warnings(result)
    notes((*result.resumed, *result.notes))
    console.print(
        f"[bold]{escape(str(result.output))}[/]  {size(result.bytes_written)} in {result.seconds:.1f} s",
        soft_wrap=True,
    )


def warnings(result: "MergeResult") -> None:
    """Prints the warnings about the merged model, above all notes."""
    for warning in result.warnings:
        tell(out(), "warning", warning, "bold yellow")


def converted(done: "Converted", json: bool, quiet: bool) -> None:
    """A model that was written tensor by tensor, with the notes on it."""
    if json:
        event("done", output=str(done.output), tensors=len(done.tensors), bytes=done.bytes, notes=list(done.notes))
    elif not quiet:
        notes(done.notes)
        line(f"{done.output}  {len(done.tensors)} tensors, {size(done.bytes)} in {done.seconds:.1f} s")


def notes(texts: Sequence[str]) -> None:
    for note in texts:
        tell(out(), "note", note, "yellow")


def line(text: str) -> None:
    out().print(escape(text), soft_wrap=True)
