"""`cfmerge recipes`: the recipes that come with cfmerge."""

from typing import Annotated

from rich.markup import escape
from rich.table import Table

from cfmerge.cli import options as o
from cfmerge.cli.messages import out, say
from cfmerge.recipe.shipped import names, shipped


def recipes(name: Annotated[str | None, o.argument("NAME", "A recipe, to show all of it.")] = None) -> None:
    """List the recipes that come with cfmerge, or show one in full."""
    if name is not None:
        print(shipped(name).text, end="")
        return
    table = Table("recipe", "", box=None, padding=(0, 2, 0, 0))
    for one in map(shipped, names()):
        table.add_row(f"[bold]{one.name}[/]", escape(one.about))
    out().print(table)
    say(
        out(), "\n`cfmerge merge NAME --base BASE -e EXPERT ... -o OUT` merges by one; `cfmerge recipes NAME` shows it."
    )
