"""Many results from one pass over base and experts: several methods, or a grid of one method's parameters."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge import methods as registered
from cfmerge.core.expressions import expression
from cfmerge.engine.placement import Devices, check_no_devices
from cfmerge.errors import CfmergeError
from cfmerge.methods import Method
from cfmerge.planning.jobs import as_method
from cfmerge.planning.work import Progress
from cfmerge.products.in_memory import merge_params_by
from cfmerge.products.plan import as_recipe, planned
from cfmerge.products.processes import together
from cfmerge.recipe import Recipe
from cfmerge.report.result import MergeResult

Methods = Mapping[str, Method | str] | Sequence[Method | str]


def grid(method: str, **parameters: Any) -> dict[str, Method]:
    """The method at every combination of parameters, by label.

        >>> list(cfmerge.grid("ace", eps_rel=[0.01, 0.1], tau=0.3))
        ['ace(eps_rel=0.01)', 'ace(eps_rel=0.1)']

    Args:
        method: a registered method's name.
        **parameters: a list holds the values to try; anything else is the same for all.

    Returns:
        `{label: method}`, labels such as `ace(eps_rel=0.01)`.

    Raises:
        CfmergeError: no parameter has a list, or the method does not know one.
    """
    keys = [key for key, value in parameters.items() if isinstance(value, list | tuple)]
    if not keys:
        raise CfmergeError(f"grid of {method}: no parameter has a list of values")
    made = {}
    for values in itertools.product(*(parameters[key] for key in keys)):
        chosen = dict(zip(keys, values, strict=True))
        label = f"{method}({', '.join(f'{key}={value}' for key, value in chosen.items())})"
        made[label] = registered.make(method, {**parameters, **chosen})
    return made


def sweep(
    base: Any,
    experts: Any,
    methods: Methods,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The results of merging the same base and experts by several methods; each expert is read once.

        >>> base = {"weight": jnp.zeros((4, 3))}
        >>> experts = [{"weight": base["weight"] + step} for step in (1.0, 3.0)]
        >>> trees = cfmerge.sweep(base, experts, cfmerge.grid("task_arithmetic", scale=[0.5, 1.0]))
        >>> {label: float(tree["weight"][0, 0]) for label, tree in trees.items()}
        {'task_arithmetic(scale=0.5)': 2.0, 'task_arithmetic(scale=1.0)': 4.0}

    Methods that keep the same statistic share it: N ridges or scales cost one pass. Methods that differ in numbers
    alone are solved together: a ridge path from one eigendecomposition.

    Args:
        base, experts: checkpoints on disk, as for `cfmerge.merge`, or pytrees, as for `cfmerge.merge_params`.
        methods: methods, or texts such as `"trim(density=0.2) >> disjoint_mean"`; a mapping labels the results
            (others are labelled by their text), see also `grid`.
        output: for checkpoints, a directory that gets one model directory for each label.
        overwrite, memory, devices, progress, fresh: as for `cfmerge.merge`.
        **options: further arguments of `cfmerge.merge`, or of `cfmerge.merge_params`.

    Returns:
        `{label: MergeResult}` of checkpoints, `{label: tree}` of pytrees.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    labelled = _labelled(methods)
    if not isinstance(base, str | Path):
        if output is not None:
            raise CfmergeError("sweep of pytrees: the results are returned, and output is for checkpoints")
        check_no_devices("sweep", devices)
        made = {label: as_method(method) for label, method in labelled.items()}
        return dict(zip(made, merge_params_by(base, experts, list(made.values()), **options), strict=True))
    if output is None:
        raise CfmergeError("sweep of checkpoints: name a directory for the results with output=")
    asked = {label: as_recipe(base, experts, method, None, options) for label, method in labelled.items()}
    return sweep_recipes(asked, output, overwrite, memory, devices, progress, fresh)


def sweep_recipes(
    asked: Mapping[str, Recipe],
    output: str | Path,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> dict[str, MergeResult]:
    """The results of recipes that differ in method and parameters alone, in one pass; see `sweep`."""
    with together(output, devices) as where:
        how = {"overwrite": overwrite, "memory": memory, "devices": where, "progress": progress, "fresh": fresh}
        return planned(asked).run(output, **how)  # type: ignore[arg-type]


def _labelled(methods: Methods) -> dict[str, Method | str]:
    if isinstance(methods, Mapping):
        labelled = dict(methods)
    else:
        texts = [expression(method) if isinstance(method, Method) else method for method in methods]
        labelled = dict(zip(texts, methods, strict=True))
    if not labelled:
        raise CfmergeError("sweep: no methods")
    if len(labelled) < len(methods):
        raise CfmergeError("sweep: the same method is there twice; label them with a mapping {label: method}")
    return labelled
