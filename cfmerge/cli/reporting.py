"""`cfmerge report`: a page of HTML about a merged model or a recipe."""

from pathlib import Path
from typing import Annotated

from cfmerge.cli import options as o
from cfmerge.cli import show
from cfmerge.errors import CfmergeError

EXAMPLES = (
    "cfmerge report OUT",
    "cfmerge report OUT -o page.html",
    "cfmerge report recipe.yaml -o before.html",
)


def report(
    asked: Annotated[Path, o.argument("OUT|RECIPE", "A merged model with its card, or a recipe.")],
    *,
    output: Annotated[
        Path | None,
        o.option("--output", "-o", metavar="FILE", panel=o.WHERE, help="Default: NAME-report.html, here."),
    ] = None,
    overwrite: o.Overwrite = False,
    memory: o.Memory = None,
    devices: o.Devices = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Write a page of HTML: what was merged, how, and what it did, layer by layer.

    The page is one file that needs no network. Inputs that are gone or changed are told, and not measured.
    """
    import cfmerge
    from cfmerge.cli.texts import make_stages
    from cfmerge.formats.whole import write_whole
    from cfmerge.products.report import is_merged
    from cfmerge.recipe.shipped import names

    path = asked.expanduser()
    target = output or Path(f"{path.resolve().stem if path.is_file() else path.resolve().name}-report.html")
    if not target.parent.is_dir():
        raise CfmergeError(f"output {target}: there is no directory {target.parent}")
    if target.is_dir() or ((target.exists() or target.is_symlink()) and not overwrite):
        raise CfmergeError(f"output {target}: is there already; give another -o, or --overwrite")
    if not path.exists():
        also = ", with a base and experts in it, which a recipe that is shipped leaves to you" * (str(asked) in names())
        raise CfmergeError(f"{path}: no such file or directory; give a merged model or a recipe's file{also}")
    stages = [] if is_merged(path) else make_stages(path, {})
    if len(stages) > 1:
        raise CfmergeError(f"{path}: {len(stages)} documents are a chain of merges, and a report is of one; split it")
    with show.pulse(json, quiet) as told:
        made = cfmerge.make_report(
            stages[0].recipe if stages else path, name=path.name, memory=memory, devices=devices, progress=told
        )
    try:
        write_whole(target.resolve(), made.html.encode("utf-8", "backslashreplace"))  # file names may hold any bytes
    except OSError as error:
        raise CfmergeError(f"output {target}: cannot be written: {error}") from None
    if json:
        show.event("done", output=str(target), lacking=list(made.lacking))
    elif not quiet:
        show.notes(made.lacking)
        show.line(str(target))
