"""The commands that are about the files of one model: `convert`, `inspect`."""

from pathlib import Path
from typing import Annotated

import cfmerge
from cfmerge.cli import composing, show, tables
from cfmerge.cli import options as o
from cfmerge.recipe import Format

EXAMPLES = (  # of `convert`
    "cfmerge convert MODEL OUT --format torch",
    "cfmerge convert MODEL OUT.npz",
    "cfmerge convert MODEL OUT --names bert",
    "cfmerge convert OUT AGAIN --names bert",
)


def convert(
    source: Annotated[Path, o.argument("SRC", "A model: a directory or a file.")],
    output: Annotated[Path, o.argument("DST", "The directory to make, or one file.")],
    *,
    names: Annotated[
        str | None,
        o.option("--names", metavar="FAMILY", panel="What is converted", help="Rename too: llama3, bert, gpt2, ..."),
    ] = None,
    config: Annotated[
        Path | None,
        o.option("--config", metavar="PATH", panel="What is converted", help="For --names. Default: SRC's."),
    ] = None,
    format: Annotated[
        Format | None, o.option("--format", metavar="NAME", panel=o.WHERE, help="torch, orbax, ... Default: SRC's.")
    ] = None,
    shard_size: Annotated[
        str, o.option("--shard-size", metavar="SIZE", panel=o.WHERE, help="Largest file. Default: 5GB.")
    ] = "5GB",
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write a model in another format, bit for bit, or under other names."""
    opened = cfmerge.open_checkpoint(source)
    total = sum(info.nbytes for info in opened.tensors.values())
    with show.progress(total, json=json, quiet=quiet, what="converting") as told:
        done = cfmerge.convert(
            opened, output, format=format, names=names, config=config, shard_size=shard_size, overwrite=overwrite,
            progress=told,
        )  # fmt: skip
    show.converted(done, json, quiet)


def inspect(
    checkpoint: Annotated[
        str, o.argument("CHECKPOINT", "A model, an adapter, a composed result; ORG/NAME[@REVISION].")
    ],
    download: o.Download = False,
    cache_dir: o.CacheDir = None,
    json: o.Json = False,
) -> None:
    """Show a checkpoint's tensors: kinds, layouts, dtypes, ties."""
    from cfmerge.formats import located
    from cfmerge.formats.adapters import adapter_alone
    from cfmerge.formats.composed import is_composed

    place = Path(checkpoint).expanduser()
    if is_composed(place):
        from cfmerge import compose

        composing.inspected(compose.load(place), place, json)
        return
    adapter = None if "::" in checkpoint else adapter_alone(located(checkpoint, download, cache_dir))
    found = adapter or cfmerge.open_checkpoint(checkpoint, download=download, cache_dir=cache_dir)
    tables.checkpoint(found, json)
