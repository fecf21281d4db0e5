"""A training run on the command line: its options as a recipe, and its steps and weights in a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cfmerge.cli.messages import out, say
from cfmerge.cli.texts import values_of
from cfmerge.errors import CfmergeError
from cfmerge.mergekit import Stage

if TYPE_CHECKING:
    from cfmerge.temporal.trajectory import Window

WIDTH = 32  # of the longest bar
IN_PLACE = {"experts": "--expert", "statistics": "--statistics", "layers": "--layers"}  # that the run stands for
SPELLED = {"start": "--from", "end": "--to", "extra_from": "--extra-from"}


def stages_of_run(file: Path | None, given: Mapping[str, Any], of_run: Mapping[str, Any]) -> list[Stage]:
    """The recipe of a training run, as the only stage; none where no run is named.

    Args:
        file: a recipe's file, which a run has no use for.
        given: the command line's values by the recipe's keys.
        of_run: its values that are about the run.

    Raises:
        CfmergeError: options that do not go together, or what `temporal.along` raises.
    """
    asked = {key: value for key, value in of_run.items() if value is not None}
    run = asked.pop("run", None)
    if run is None:
        if asked:
            option = _spelled(next(iter(asked)))
            raise CfmergeError(f"{option}: is of a training run; name its directory: --run DIR")
        return []
    other = [option for key, option in IN_PLACE.items() if given.get(key)]
    if file is not None or other:
        more = " (--base names a model from which the deltas of all steps are taken)"
        what, more = (other[0], more) if other else (f"the recipe {file}", ", or name it as the output: -o")
        raise CfmergeError(f"--run {run}: the run's steps are what is merged; leave {what} out{more}")
    from cfmerge.temporal.trajectory import along

    if "weights" in asked:
        asked["weights"] = _numbers(asked["weights"])
    found = along(run, **asked, **values_of(given))
    return [Stage("", found.recipe, found.notes, window=found)]


def _spelled(key: str) -> str:
    return SPELLED.get(key, f"--{key}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise CfmergeError(f"--weights {text!r}: write a number for each step, such as --weights 0.2,0.3,0.5") from None


def show_window(window: "Window") -> None:
    """Prints the steps and weights of a window, each with a bar as long as its weight is large."""
    console = out()
    how = f"decay {window.decay}" if window.decay else "weights as given"
    by = "weighted mean" if window.mean else window.recipe.method
    say(
        console,
        f"{window.run}: {len(window.steps)} steps, {by}{f', {how}' if window.mean or window.decay else ''}",
        "bold",
    )
    table = Table("step", "weight", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    most = max((abs(weight) for weight in window.weights if weight is not None), default=0.0) or 1.0
    for step, weight in zip(window.steps, window.weights, strict=True):
        told = "base" if weight is None else f"{weight:.4f}"
        table.add_row(str(step.number), told, "" if weight is None else bar(weight / most))
    console.print(table)


def bar(share: float, width: int = WIDTH) -> str:
    """A bar of eighths of a character, `width` long for a share of 1; hollow for one below 0."""
    eighths = round(abs(share) * width * 8)
    full, rest = divmod(eighths, 8)
    if share < 0:
        return "\u2591" * max(1, full)
    return "\u2588" * full + ("" if not rest else chr(0x2590 - rest))
