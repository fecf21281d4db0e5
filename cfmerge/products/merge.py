"""`merge`: one checkpoint from a base and its experts on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge import recipe as recipes
from cfmerge.engine.placement import Devices
from cfmerge.methods import Method
from cfmerge.planning.work import Progress
from cfmerge.products.plan import Experts, as_recipe, make_plan
from cfmerge.products.processes import together
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
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
    **options: Any,
) -> MergeResult:
    """The result of merging checkpoints on disk into one, streamed tensor by tensor.

        >>> result = cfmerge.merge("base", ["math", "code"], "average", output="merged")
        >>> result.output.name
        'merged'
        >>> cfmerge.open_checkpoint("merged").read("layer.weight").shape
        (4, 3)

    Args:
        base: a model in any format: a directory, a file of tensors, a name on the hub; see docs/formats.md.
        experts: the same for each expert, or an adapter; a mapping `{name: path}` gives them names, `Expert` gives
            weights too.
        method: a registered method: its name, a chain as text, or the method itself. The default is ACE-Merging
            (Xu et al., CVPR 2026, arXiv 2603.02945).
        output: the directory to make, or the file: one that ends in `.safetensors`, `.pt`, `.msgpack` or `.npz`. It
            appears when it is complete.
        parameters: the arguments of a method that is given by its name.
        rules: `Rule`s, or mappings with their fields; the first whose pattern matches a tensor's name wins.
        overwrite: replace a model that is there.
        memory: bound of the working set, in bytes or as text such as `"4GB"`; None: a quarter of the free memory.
        devices: `"all"`, a number of devices, or `"cpu"`; None: all of an accelerator, one processor; see
            docs/devices.md.
        progress: called with (tensor name, bytes read since the last call), from the working threads, one at a time.
        fresh: start anew, whatever an earlier run of this merge has left; else go on from there.
        **options: the other fields of `Recipe`: rename, heads, on_nonfinite, allow, dtype, precision, shard_size,
            side_files, seed, plugins, statistics, format, components, vocabulary, dequantize, layers, adapter_out,
            chat_template, unmerged, download, cache_dir.

    Returns:
        A `MergeResult`: the output, the plan, warnings and notes.

    Raises:
        CfmergeError: bad input; nothing is written then.
        StoppedError: a full disk, say; what is done may be kept, and the same call goes on from there.
    """
    recipe = as_recipe(base, experts, method, parameters, {"rules": rules, **options})
    how = {"overwrite": overwrite, "memory": memory, "devices": devices, "progress": progress, "fresh": fresh}
    return merge_recipe(recipe, output, **how)  # type: ignore[arg-type]


def merge_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
    fresh: bool = False,
) -> MergeResult:
    """The result of a recipe; see `merge`.

        >>> recipe = cfmerge.Recipe(base="base", experts=["math", "code"], method="average")
        >>> cfmerge.merge_recipe(recipe, "merged").plan.method.name
        'average'

    Args:
        recipe: base, experts, method and options.
        output, overwrite, memory, devices, progress, fresh: as in `merge`.
        statistics: statistics of other experts to begin from, in place of the recipe's directory.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    with together(output, devices) as where:  # before JAX is used: a processor's devices are counted then
        plan = make_plan(recipe, statistics)
        return plan.run(output, overwrite=overwrite, memory=memory, devices=where, progress=progress, fresh=fresh)
