"""The commands about models of different initialisation: `spaces`, `zip`."""

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from rich.console import Console

import cfmerge
from cfmerge.cli import options as o
from cfmerge.cli.messages import out, say, tell
from cfmerge.cli.texts import expert
from cfmerge.recipe import Expert, Recipe

SPACES = (
    "cfmerge spaces MODEL",
    "cfmerge spaces MODEL --blank > spaces.yaml",
    "cfmerge spaces MODEL --spaces spaces.yaml",
)
ZIP = (
    "cfmerge zip birds=A fish=B --moments joint.safetensors --stop-at stage2 -o OUT",
    "cfmerge zip A B --moments joint.safetensors -o MODEL",
    "cfmerge zip A B --from-weights -o MODEL",
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
    found: dict[str, Any]
    head = ""
    if blank:
        found = {"spaces": {name: ", ".join("-" for _ in shape) for name, shape in shapes.items()}}
    else:
        described = describe(shapes, model.config, read_table(table) if table else None)
        head = f"# by the table {described.table}\n"
        found = {"sizes": dict(described.spaces.sizes), "spaces": described.spaces.table()}
        for note in described.notes:
            tell(Console(stderr=True, emoji=False), "note", note, "bold")
    print(json_module.dumps(found) if json else head + _as_yaml(found, shapes if blank else {}))


def _as_yaml(found: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> str:
    """A table as YAML; the shapes of tensors that are given stand beside their lines."""
    text = yaml.safe_dump(dict(found), sort_keys=False, width=1000).rstrip()
    head, *lines = text.splitlines()
    if len(lines) != len(shapes):  # nothing is to be told, or a long name takes two lines
        return text
    told = [f"{line}  # {tuple(shape)}" for line, shape in zip(lines, shapes.values(), strict=True)]
    return "\n".join((head, *told))


def zip_models(
    models: Annotated[list[str], o.argument("MODELS", "PATH or NAME=PATH, two or more.")],
    *,
    output: o.Output,
    overwrite: o.Overwrite = False,
    moments: Annotated[
        str | None, o.option("--moments", metavar="FILE", panel=o.HOW, help="Joint moments of their features.")
    ] = None,
    from_weights: Annotated[
        bool, o.option("--from-weights", panel=o.HOW, help="Similarities from weights: an extension.")
    ] = False,
    stop_at: Annotated[
        str | None, o.option("--stop-at", metavar="SPACE", panel=o.HOW, help="The last space that is zipped.")
    ] = None,
    method: Annotated[
        Literal["zip", "permute", "identity"], o.option("--method", "-m", metavar="NAME", panel=o.HOW,
        help="zip (default), permute, identity.")
    ] = "zip",
    budget: Annotated[
        float, o.option("--budget", metavar="B", panel=o.HOW, help="Share merged within a model (0.125).")
    ] = 0.125,
    penalty: Annotated[
        float, o.option("--penalty", metavar="A", panel=o.HOW, help="Factor of merged features (0.3).")
    ] = 0.3,
    table: Annotated[str | None, o.option("--spaces", metavar="FILE", panel=o.HOW, help="A table of your own.")] = None,
    reset_norms: Annotated[
        bool, o.option("--reset-norms", panel=o.HOW, help="BatchNorm: I estimate it again, with inputs.")
    ] = False,
    head: Annotated[
        str | None, o.option("--head", metavar="NAME", panel=o.HOW, help="The model whose head is kept. Default: mean.")
    ] = None,
    download: o.Download = False,
    cache_dir: o.CacheDir = None,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Merge features within and across models of different initialisation: ZipIt!."""
    experts = Recipe("", [Expert(**expert(text)) for text in models]).resolved_experts()
    zipped = cfmerge.zip_checkpoints(
        {one.name: one.path for one in experts}, output, moments=moments, from_weights=from_weights, stop_at=stop_at,
        method=method, budget=budget, penalty=penalty, spaces=table, reset_norms=reset_norms, head=head,
        overwrite=overwrite, download=download, cache_dir=cache_dir,
    )  # fmt: skip
    told = {
        "output": str(Path(output)),
        "models": list(zipped.models),
        "spaces": {space: groups.width for space, groups in zipped.groups.items()},
        "trunk": len(zipped.trunk),
        "heads": len(zipped.heads[zipped.models[0]]),
        "notes": list(zipped.notes),
    }
    if json:
        print(json_module.dumps(told))
        return
    for note in zipped.notes:
        tell(Console(stderr=True, emoji=False), "note", note, "bold")
    say(out(), f"{output}: {', '.join(zipped.models)} zipped in {len(zipped.groups)} spaces; {told['trunk']} tensors "
        f"of all, {told['heads']} of each model")  # fmt: skip
