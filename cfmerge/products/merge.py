"""`merge`: checkpoints in, one checkpoint out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge import recipe as recipes
from cfmerge.methods import Method
from cfmerge.planning.work import Progress
from cfmerge.products.plan import Experts, as_recipe, make_plan
from cfmerge.recipe import Recipe
from cfmerge.report.result import MergeResult
from cfmerge.statistics import Statistics


def merge(
    base: str | Path,
    experts: Experts,
    method: str | Method = "ace",
    *,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    rules: Sequence[recipes.Rule | Mapping[str, Any]] = (),
    overwrite: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> MergeResult:
    """Merges checkpoints on disk into one, streaming.

    Args:
        base: a Hugging Face directory (safetensors) or a `.safetensors` file.
        experts: the same of each expert; a mapping gives them names, `Expert` weights too.
        method: a registered method: its name, a chain as text, or the method itself; `parameters` are the
            arguments of one that is named.
        output: the directory to make, or the `.safetensors` file. It appears when it is complete.
        rules: `Rule`s, or mappings with their fields; the first whose pattern matches a tensor's name wins.
        overwrite: replace a model directory that is there.
        memory: bound of the working set, bytes or `"4GB"`; none: a quarter of what is free.
        progress: called with (tensor name, bytes read since the last call), from the working threads, one at a time.
        **options: the other fields of `Recipe`: heads, on_nonfinite, allow, dtype, precision, shard_size,
            side_files.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    recipe = as_recipe(base, experts, method, parameters, {"rules": rules, **options})
    return merge_recipe(recipe, output, overwrite=overwrite, memory=memory, progress=progress)


def merge_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
) -> MergeResult:
    """Carries out a recipe; see `merge`. `statistics` are what was kept of other experts, instead of a file of them."""
    return make_plan(recipe, statistics).run(output, overwrite=overwrite, memory=memory, progress=progress)
