"""Many results from one pass over base and experts: several methods, or a grid of one method's parameters."""

import dataclasses
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge import methods as registered
from cfmerge import recipe as recipes
from cfmerge.engine.batches import check_memory
from cfmerge.engine.in_memory import merge_params_by
from cfmerge.engine.merge import MergeResult, Progress, as_recipe, carry_out, free_memory, without_expert
from cfmerge.engine.plan import Plan, make_plan
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.formats import check_directory_name
from cfmerge.methods import Method
from cfmerge.methods._registry import expression
from cfmerge.methods._several import several

Methods = Mapping[str, Method | str] | Sequence[Method | str]


def grid(method: str, **parameters: Any) -> dict[str, Method]:
    """The method at every combination of parameters: `grid("ace", eps_rel=[0.01, 0.1], tau=0.3)`.

    Args:
        method: a registered method's name.
        **parameters: a list holds the values to try; anything else is the same for all.

    Returns:
        `{label: method}`, labels such as `ace(eps_rel=0.01)`.
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
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merges the same base and experts by several methods; each expert is read once.

    Methods that keep the same statistic share it: N ridges or scales cost one pass. Methods that differ in numbers
    alone are solved together: a ridge path from one eigendecomposition.

    Args:
        base, experts: checkpoints on disk, as for `cfmerge.merge`, or pytrees, as for `cfmerge.merge_params`.
        methods: methods, or texts such as `"trim(density=0.2) >> disjoint_mean"`; a mapping labels the results
            (others are labelled by their text), see also `grid`.
        output: of checkpoints: a directory that gets one model directory for each label.
        overwrite, memory, progress: as for `cfmerge.merge`.
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
        made = {label: method if isinstance(method, Method) else registered.make(method)
                for label, method in labelled.items()}  # fmt: skip
        return dict(zip(made, merge_params_by(base, experts, list(made.values()), **options), strict=True))
    if output is None:
        raise CfmergeError("sweep of checkpoints: name a directory for the results with output=")
    texts = {label: expression(method) if isinstance(method, Method) else method for label, method in labelled.items()}
    asked = [as_recipe(base, experts, text, {}, options) for text in texts.values()]
    return sweep_recipes(dict(zip(texts, asked, strict=True)), output, overwrite, memory, progress)


def sweep_recipes(
    asked: Mapping[str, recipes.Recipe],
    output: str | Path,
    overwrite: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> dict[str, MergeResult]:
    """Carries out recipes that differ in method and parameters alone, in one pass; see `sweep`."""
    started = time.monotonic()
    limit = free_memory() // 4 if memory is None else recipes.parse_size(str(memory))
    check_directory_name(Path(output))
    outputs = [Path(output) / directory_name(label) for label in asked]
    if len(set(outputs)) < len(outputs):
        raise CfmergeError(f"sweep: two labels give the same directory; the labels are {list(asked)}")
    dropped: list[str] = []
    while True:
        plans = [make_plan(recipe) for recipe in asked.values()]
        together = _together(plans)
        for job in together.jobs:
            check_memory(job, limit)
        try:
            results = carry_out(together, plans, outputs, overwrite, limit, progress, dropped)
        except NonFiniteError as error:
            asked = {label: without_expert(plan, error, dropped[:0]) for label, plan in zip(asked, plans, strict=True)}
            without_expert(plans[0], error, dropped)
            continue
        seconds = time.monotonic() - started
        return {label: dataclasses.replace(r, seconds=seconds) for label, r in zip(asked, results, strict=True)}


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


def directory_name(label: str) -> str:
    """The label as the name of a directory: what is not a letter, digit or one of `._-=,` becomes `_`."""
    return re.sub(r"[^\w.=,-]+", "_", label).strip("_.") or "_"


def _together(plans: Sequence[Plan]) -> Plan:
    """One plan whose methods do what all the plans' methods do."""
    if len(plans) == 1:
        return plans[0]
    jobs = []
    for row in zip(*(plan.jobs for plan in plans), strict=True):
        job = row[0]
        if job.assignment.action == "merge":
            method = several(tuple(other.assignment.method for other in row))
            job = dataclasses.replace(job, assignment=dataclasses.replace(job.assignment, method=method))
        jobs.append(job)
    return dataclasses.replace(plans[0], jobs=tuple(jobs))
