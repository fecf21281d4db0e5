"""`build`: a composed result out of a base and its experts, on disk or in memory, by the loop that merges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.compose.artifact import Artifact, load
from cfmerge.compose.planned import plan
from cfmerge.compose.trees import build_trees
from cfmerge.engine.placement import Devices
from cfmerge.errors import CfmergeError
from cfmerge.methods import Method
from cfmerge.planning.work import Progress
from cfmerge.products.plan import as_recipe
from cfmerge.products.processes import together
from cfmerge.recipe import Recipe
from cfmerge.report.result import MergeResult


def build(
    base: Any,
    experts: Any,
    system: str | Method,
    *,
    output: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    rules: Sequence[Any] = (),
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
    **options: Any,
) -> Artifact:
    """A result that is not one checkpoint: `emr`, `tall`, `tsv_c` or `smile`.

        >>> made = compose.build("base", ["math", "code"], "tsv_c", output="composed")
        >>> made.system, made.tasks, made.parts["layer.weight"]["up"].shape
        ('tsv_c', ('math', 'code'), (2, 4, 1))

    Args:
        base, experts: checkpoints on disk, as for `cfmerge.merge`, which are streamed; or pytrees, as for
            `cfmerge.merge_params`.
        system: its name, or text such as `"smile(rank=32, gate=16)"`.
        output: for checkpoints, the directory to make. It appears when it is complete.
        parameters: of a system that is given by its name.
        rules: as in a recipe; a rule may say `keep-base`, a layout, or a system with other parameters.
        overwrite, memory, devices, progress, fresh: as for `cfmerge.merge`; for checkpoints.
        **options: the other fields of `Recipe`; for checkpoints.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    if not isinstance(base, str | Path):
        if output is not None:
            raise CfmergeError("build of pytrees: the result is returned; its `save(directory)` writes it")
        given = {"overwrite": overwrite, "memory": memory, "devices": devices, "progress": progress, "fresh": fresh}
        of_files = [key for key, value in (given | options).items() if value not in (None, False) or key in options]
        if of_files:
            raise CfmergeError(f"build of pytrees: {', '.join(of_files)}: of checkpoints; leave it out")
        return build_trees(base, experts, system, parameters, rules)
    if output is None:
        raise CfmergeError("build of checkpoints: name a directory for the result with output=")
    recipe = as_recipe(base, experts, system, parameters, {"rules": rules, **options})
    how: Any = {"overwrite": overwrite, "memory": memory, "devices": devices, "progress": progress, "fresh": fresh}
    build_recipe(recipe, output, **how)
    return load(output)


def build_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> MergeResult:
    """The result of a recipe whose method is a system, written; see `build`.

        >>> recipe = cfmerge.Recipe(base="base", experts=["math", "code"], method="tall")
        >>> compose.build_recipe(recipe, "composed").output.name
        'composed'

    Args:
        recipe: base, experts, system and options.
        output, overwrite, memory, devices, progress, fresh: as in `build`.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    with together(output, devices) as where:
        made = plan(recipe)
        return made.run(output, overwrite=overwrite, memory=memory, devices=where, progress=progress, fresh=fresh)  # type: ignore[no-any-return]
