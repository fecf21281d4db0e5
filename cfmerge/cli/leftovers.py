"""`cfmerge clean`: what merges that ended early have left."""

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.markup import escape

from cfmerge.cli import show
from cfmerge.cli.messages import out
from cfmerge.cli.tables import size
from cfmerge.formats.leftovers import Leftover, leftovers


def listed_and_removed(places: Sequence[Path], yes: bool, json: bool) -> None:
    """Lists what is left at the places, and removes it: with `yes`, or if a user in a terminal says so."""
    found = list({one.path: one for place in places for one in leftovers(place)}.values())
    free = [one for one in found if not one.held]
    if not json:
        _listed(found)
        yes = yes or bool(free and sys.stdin.isatty() and typer.confirm("Remove what no process writes?"))
    gone = [one for one in free if one.remove()] if yes else []
    if json:
        print(json_module.dumps([_plain(one, one in gone) for one in found], indent=2))
    elif free:
        show.line(f"removed {len(gone)} of {len(found)}" if yes else "nothing was removed: pass --yes to remove it")


def _listed(found: Sequence[Leftover]) -> None:
    if not found:
        show.line("nothing is left")
    for one in found:
        state = "a process writes it now" if one.held else f"last written {ago(one.seconds)} ago"
        told = f"{one.done:.0%} done, {size(one.size)}, {state}"
        out().print(f"[bold]{escape(str(one.target))}[/]  {told}\n  {escape(str(one.path))}", soft_wrap=True)


def _plain(one: Leftover, removed: bool) -> dict[str, object]:
    return {
        "target": str(one.target), "staging": str(one.path), "bytes": one.size, "done": round(one.done, 4),
        "seconds": round(one.seconds), "held": one.held, "removed": removed,
    }  # fmt: skip


def ago(seconds: float) -> str:
    """A time in the unit that suits it: "3 hours"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
