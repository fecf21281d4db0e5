"""The files that stand beside an output's weights, and the keys that its copies of them have otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, located
from cfmerge.formats.side_files import check_whole, side_files
from cfmerge.planning.chat import with_template
from cfmerge.planning.opening import Models
from cfmerge.planning.stacks import Stacked
from cfmerge.recipe import Recipe

Edits = Mapping[str, Mapping[str, Any]]  # {name of a JSON side file: {key: value}}


class Beside(NamedTuple):
    """Side files by name, the keys that are others in the output, and notes."""

    files: Mapping[str, Path]
    edits: Edits
    notes: list[str]


def beside_of(recipe: Recipe, base: Source, models: Models, of_vocabulary: Edits) -> Beside:
    """The files beside an output.

    Args:
        base: in the output's vocabulary, with the tokenizer of that.
        of_vocabulary: the keys that it changes.
    """
    files, edits = dict(_side_files(recipe, base)), _joined(of_vocabulary, _of_layers(models.stack))
    if recipe.chat_template is None:
        return Beside(files, edits, [])
    files, of_chat, notes = with_template(recipe.chat_template, base, models.experts, files)
    return Beside(files, _joined(edits, of_chat), list(notes))


def _of_layers(stack: Stacked | None) -> Edits:
    """The keys that other layers change."""
    if stack is None or not stack.base.edits:
        return {}
    return {f"{stack.base.folders[0].name}/config.json".lstrip("/"): stack.base.edits}


def _joined(*edits: Edits) -> dict[str, dict[str, Any]]:
    """All edits of the side files, by file."""
    files = dict.fromkeys(name for some in edits for name in some)
    return {name: {key: value for some in edits for key, value in some.get(name, {}).items()} for name in files}


def _side_files(recipe: Recipe, base: Source) -> Mapping[str, Path]:
    if recipe.side_files is None:
        check_whole(base.side_files)
        return base.side_files
    directory = located(recipe.side_files, recipe.download, recipe.cache_dir, weights=False)
    if not directory.is_dir():
        raise CfmergeError(f"side_files: {directory} is not a directory")
    files = side_files(directory)
    check_whole(files)
    return files
