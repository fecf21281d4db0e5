"""The commands about models of different initialisation: `spaces`."""

import json as json_module
from typing import Annotated

import yaml
from rich.console import Console

import cfmerge
from cfmerge.cli import options as o
from cfmerge.cli.messages import tell

SPACES = (
    "cfmerge spaces MODEL",
    "cfmerge spaces MODEL --blank > spaces.yaml",
    "cfmerge spaces MODEL --spaces spaces.yaml",
)


def spaces(
    checkpoint: Annotated[str, o.argument("MODEL", "A directory, a file of tensors, ORG/NAME[@REVISION].")],
    table: Annotated[str | None, o.option("--spaces", metavar="FILE", help="A table of your own.")] = None,
    blank: Annotated[bool, o.option("--blank", help="A table to begin from: nothing permutes.")] = False,
    download: o.Download = False,
    cache_dir: o.CacheDir = None,
    json: o.Json = False,
) -> None:
    """Show which axes of a model permute together, as a table."""
    from cfmerge.models.space_tables import describe, read_table

    model = cfmerge.open_checkpoint(checkpoint, download=download, cache_dir=cache_dir)
    shapes = {name: info.shape for name, info in model.tensors.items()}
    if blank:
        found = {"spaces": {name: ", ".join("-" for _ in shape) for name, shape in shapes.items()}}
    else:
        described = describe(shapes, model.config, read_table(table) if table else None)
        found = {"sizes": dict(described.spaces.sizes), "spaces": described.spaces.table()}
        for note in described.notes:
            tell(Console(stderr=True, emoji=False), "note", note, "bold")
    print(json_module.dumps(found) if json else yaml.safe_dump(found, sort_keys=False, width=1000).rstrip())
