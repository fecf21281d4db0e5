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


@app.command()
def accuracy(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Of the report; numbers that are there are kept.")],
    zoo: Annotated[
        list[str] | None,
        typer.Option(help="One of the zoos; may be repeated. Default: all, or with --quick one of each kind."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="May be repeated. Default: 0, 1 and 2, or with --quick 0.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="One row of the tables; may be repeated. Default: all but variants."),
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="All rows: with other settings than the published defaults.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Small networks, little training, few tasks and methods: does it run?")
    ] = False,
    scale: Annotated[
        str, typer.Option(help='"small", or "large": a ViT of the shape of CLIP-B/32, for a GPU.')
    ] = "small",
    engine: Annotated[str, typer.Option(help='What evaluates text models: "flax", "torch", "auto".')] = "auto",
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Processes. Default: one for each core, at most 4; 1 on a GPU.")
    ] = None,
    quiet: o.Quiet = False,
) -> None:
    """Train experts on real data (once, then from the cache), merge them by every method, and compare.

    Needs the extra `bench`, where text models are trained. Data come from package registries. Writes tables,
    plots and every number to the output folder.
    """
    from cfmerge_accuracy import cache, report, suite, workers

    console = Console(stderr=True)
    zoos, seeds = (suite.QUICK_ZOOS, suite.SEEDS[:1]) if quick else (suite.ZOOS, suite.SEEDS)
    asked = suite.Options(
        output, zoo or zoos, seed or seeds, method or (), variants, quick, scale, engine,
        shlex.join(["cfmerge", *sys.argv[1:]]), workers.default_jobs() if jobs is None else jobs,
    )  # fmt: skip
    cache.keep_compiled()
    suite.run(asked, (lambda line: None) if quiet else (lambda line: console.print(line, highlight=False)))
    report.summary(output, Console())
