"""Chains of merges, of which later ones take the results of earlier ones; these are kept beside the output."""

from pathlib import Path

from cfmerge import recipe as recipes
from cfmerge.errors import CfmergeError
from cfmerge.planning.resolved import Resolved


def directory_of(output: Path) -> Path:
    """The directory in which the results of the earlier merges lie: `OUT-stages`."""
    plain = output.with_suffix("") if output.suffix == ".safetensors" else output
    return plain.with_name(f"{plain.name}-stages")


def is_made(plan: Resolved, place: Path) -> bool:
    """Whether a directory holds the result of a plan already: its card repeats it, and no input is newer."""
    card = place / "README.md"
    try:
        made = recipes.load(card)
        since = card.stat().st_mtime_ns
    except (CfmergeError, OSError):
        return False
    files = {file for model in (plan.base, *plan.experts) for file in model.files}
    return made == plan.explicit_recipe and all(file.stat().st_mtime_ns <= since for file in files)
