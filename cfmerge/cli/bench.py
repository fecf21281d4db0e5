"""`cfmerge bench`: the project's benchmarks that need more than the package's own dependencies."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cfmerge.cli import options as o

app = typer.Typer(help="Benchmarks: does merging work?", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass


@app.command(cls=o.Command)
def accuracy(
    *,
    output: Annotated[
        Path, o.option("--output", "-o", metavar="PATH", panel=o.WHERE, help="The report; numbers there are kept.")
    ],
    zoo: Annotated[
        list[str] | None,
        o.option("--zoo", metavar="ZOO", panel=o.WHAT, help="Default: all; --quick: one of each kind. Repeat."),
    ] = None,
    seed: Annotated[
        list[int] | None, o.option("--seed", metavar="N", panel=o.WHAT, help="Default: 0, 1, 2; --quick: 0. Repeat.")
    ] = None,
    method: Annotated[
        list[str] | None,
        o.option("--method", "-m", metavar="ROW", panel=o.WHAT, help="A row of the tables. Default: all; repeat."),
    ] = None,
    variants: Annotated[bool, o.option("--variants", panel=o.WHAT, help="Rows with unpublished settings too.")] = False,
    quick: Annotated[bool, o.option("--quick", panel=o.WHAT, help="Small and short: does it run?")] = False,
    scale: Annotated[
        str, o.option("--scale", metavar="SCALE", panel=o.WHAT, help="small (default), or large: a ViT for a GPU.")
    ] = "small",
    engine: Annotated[
        str, o.option("--engine", metavar="ENGINE", help="For text models: auto (default), flax, torch.")
    ] = "auto",
    jobs: Annotated[
        int | None, o.option("--jobs", "-j", metavar="N", help="Processes. Default: the cores, at most 4; GPU: 1.")
    ] = None,
    quiet: o.Quiet = False,
) -> None:
    """Train experts on real data, merge them by every method, and compare.

    Experts are trained once, then come from the cache. Text models need the extra `bench`.

    Writes tables, plots and every number to the output folder.
    """
    from cfmerge_accuracy import cache, report, suite, workers

    console = Console(stderr=True)
    zoos, seeds = (suite.QUICK_ZOOS, suite.SEEDS[:1]) if quick else (suite.ZOOS, suite.SEEDS)
    asked = suite.Options(
        output,
        zoo or zoos,
        seed or seeds,
        method or (),
        variants,
        quick,
        scale,
        engine,
        shlex.join(["cfmerge", *sys.argv[1:]]),
        workers.default_jobs() if jobs is None else jobs,
    )
    cache.keep_compiled()
    suite.run(asked, (lambda line: None) if quiet else (lambda line: console.print(line, highlight=False)))
    report.summary(output, Console())


@app.command(cls=o.Command)
def published(
    *,
    checkpoints: Annotated[
        Path, o.option("--checkpoints", metavar="DIR", panel=o.WHERE, help="Models and data; hf download, its cache.")
    ],
    output: Annotated[
        Path, o.option("--output", "-o", metavar="PATH", panel=o.WHERE, help="The tables; numbers there are kept.")
    ],
    suite: Annotated[
        list[str] | None, o.option("--suite", metavar="SUITE", panel=o.WHAT, help="gpt2, clip. Default: both; repeat.")
    ] = None,
    task: Annotated[
        list[str] | None, o.option("--task", metavar="TASK", panel=o.WHAT, help="cola, svhn, ... Default: all; repeat.")
    ] = None,
    row: Annotated[
        list[str] | None, o.option("--row", metavar="ROW", panel=o.WHAT, help="ace, experts, ... Default: all; repeat.")
    ] = None,
    limit: Annotated[
        int | None, o.option("--limit", metavar="N", panel=o.WHAT, help="N examples of each task, evenly spread.")
    ] = None,
    check: Annotated[bool, o.option("--check", help="Check models and data, and stop.")] = False,
    batch: Annotated[int, o.option("--batch", metavar="N", help="Examples at a time. Default: 32.")] = 32,
    device: Annotated[
        str, o.option("--device", metavar="DEVICE", help="cpu, cuda, ... Default: a GPU if there is one.")
    ] = "auto",
    quiet: o.Quiet = False,
) -> None:
    """Measure published tables again, on the published checkpoints.

    GPT-2 on GLUE and CLIP on images. What is not in the directory is not run.

    It needs the extra `bench`.
    """
    from cfmerge_accuracy.published import run

    told = Console(stderr=True)
    asked = run.Options(checkpoints, output, suite or (), task or (), row or (), limit, batch, device, check)
    texts = run.run(asked, (lambda line: None) if quiet else (lambda line: told.print(line, highlight=False)))
    for text in texts if not quiet else ():
        print(text)
