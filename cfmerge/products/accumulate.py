"""`accumulate` and `solve`: a merge in two halves, with the statistics between them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from cfmerge import recipe as recipes
from cfmerge.core.expressions import expression
from cfmerge.core.numbers import plain_number
from cfmerge.engine import run
from cfmerge.engine.placement import Devices, Placement, check_no_devices, placement_of
from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError
from cfmerge.formats import Sink, Totals
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.methods import Method
from cfmerge.planning.jobs import as_method
from cfmerge.planning.plugins import load_plugins
from cfmerge.planning.work import Job, Progress, Work, silent
from cfmerge.products.in_memory import merge_assigned
from cfmerge.products.merge import merge_recipe
from cfmerge.products.plan import Plan, as_recipe, make_plan
from cfmerge.products.sharded import automatic, nowhere, spread, statistic_home
from cfmerge.products.trees import Arrays, Problem
from cfmerge.statistics import (
    Statistics,
    fingerprint,
    full_form,
    leaf_names,
    pattern,
    statistic_name,
    statistics_sink,
)


def accumulate(
    base: Any,
    experts: Any,
    method: str | Method = "ace",
    *,
    output: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    **options: Any,
) -> Statistics:
    """The statistics of experts: all that an additive method needs of them to merge them.

        >>> base = {"weight": jnp.zeros((4, 3))}
        >>> math, code = [{"weight": base["weight"] + step} for step in (1.0, 3.0)]
        >>> statistics = cfmerge.accumulate(base, {"math": math, "code": code}, "average")
        >>> statistics = statistics - cfmerge.accumulate(base, {"math": math}, "average")
        >>> list(statistics.experts), float(cfmerge.solve(statistics, base)["weight"][0, 0])
        (['code'], 3.0)

    Checkpoints on disk are streamed into a directory of statistics:

        >>> statistics = cfmerge.accumulate("base", ["math", "code"], "ace", output="statistics")
        >>> list(statistics.experts)
        ['math', 'code']

    Experts go by their names: in a list of pytrees they are called "0", "1", ..., on disk after their directories.

    The sums are exact up to rounding. Forgetting leaves an error of about the machine's precision times the sums
    (float32: 1e-7); accumulate in float64 (`precision="float64"`, on disk) where that matters.

    Args:
        base, experts: checkpoints on disk, as for `cfmerge.merge`, or pytrees, as for `cfmerge.merge_params`.
        method: an additive method; `solve` may use any other that keeps the same statistic.
        output: the directory of statistics to make, for checkpoints.
        parameters: the method's, if it is given by name.
        overwrite, memory, devices, progress: as for `cfmerge.merge`.
        **options: further arguments of `cfmerge.merge`, or of `cfmerge.merge_params`.

    Raises:
        CfmergeError: the method is not additive, or bad input; nothing is written then.
    """
    if not isinstance(base, str | Path):
        if output is not None:
            raise CfmergeError("accumulate of pytrees: save what is returned: accumulate(...).save(directory)")
        check_no_devices("accumulate", devices)
        return _of_trees(base, experts, full_form(as_method(method, parameters)), **options)
    if output is None:
        raise CfmergeError("accumulate of checkpoints: name a directory for the statistics with output=")
    recipe = as_recipe(base, experts, method, parameters, options)
    return accumulate_recipe(recipe, output, overwrite, memory, devices, progress)


def accumulate_recipe(
    recipe: recipes.Recipe,
    output: str | Path,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of a recipe's experts, streamed into a directory; see `accumulate`."""
    where = placement_of(devices)
    return accumulate_plan(make_plan(recipe, sums=True), output, overwrite, memory, where, progress)


def accumulate_plan(
    plan: Plan,
    output: str | Path,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of a plan's experts, streamed into a directory; see `accumulate`."""
    where, tell = placement_of(devices), progress or silent
    return plan.attempted(memory, lambda plan, limit, _: _streamed(plan, Path(output), overwrite, limit, where, tell))


def _streamed(
    plan: Plan, output: Path, overwrite: bool, memory: int, placement: Placement, progress: Progress
) -> Statistics:
    for job in plan.work.merged:
        _check_job(job)
    stored = "float64" if plan.recipe.precision == "float64" else "float32"
    headers = {
        f"{job.name}:{leaf}": ((job.matrices, *shape), np.dtype(stored))
        for job in plan.work.merged for leaf, shape in _leaf_shapes(job).items()
    }  # fmt: skip
    kinds = {job.name: statistic_name(job.assignment.method) for job in plan.work.merged}
    weights = {**(plan.statistics.experts if plan.statistics else {}), **{s.name: s.weight for s in plan.expert_specs}}
    options = {"rules": msgspec.to_builtins(plan.recipe.rules), "heads": plan.recipe.heads}
    told = Statistics(
        expression(plan.method),
        weights,
        kinds,
        fingerprint(plan.base, list(kinds)),
        json.loads(json.dumps(options)),
        {},
    )
    checkpoints = (plan.base, *plan.experts)
    inputs = [path for checkpoint in checkpoints for path in (*checkpoint.files, checkpoint.path)]
    with statistics_sink(output, told.metadata(), overwrite, inputs) as sink:
        sink.declare(headers)
        take = functools.partial(_write, sink, stored)
        run.accumulate(plan.work, take, compute=stored, memory=memory, placement=placement, progress=progress)
        sink.finish(Totals())
        sink.commit()
    return Statistics.load(output)


def _check_job(job: Job) -> None:
    method = job.assignment.method
    if method.survey is not None:
        raise CfmergeError(
            f"{method.name} surveys the whole model with all its experts: it has no statistics of a part"
        )


def _leaf_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    like = pattern(job.method, job.seen_shape, "float32")
    return {name: tuple(leaf.shape) for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)}


def _write(sink: Sink, stored: str, unit: Unit, statistics: Any) -> None:
    for job, first, leaves in unit.shares(statistics):
        for leaf, array in leaves.items():
            values = np.asarray(array, stored)
            size = values[0].size if unit.row is None else 1  # `first` counts layers, or entries
            sink.write(f"{job.name}:{leaf}", values, first * size)


def _of_trees(
    base: Any,
    experts: Any,
    method: Method,
    *,
    weights: Any = None,
    rules: Any = (),
    moments: Any = None,
    seed: int = 0,
) -> Statistics:
    problem = Problem.of(base, experts, [method], rules)
    weights, given = problem.by_expert(weights, "weights"), problem.moments(moments)
    arrays = Arrays.of(problem.assignments, problem.trees, weights, given)
    kinds: dict[str, str] = {}

    def summed(arrays: Arrays) -> dict[str, dict[str, Any]]:
        work = arrays.work(problem.assignments, problem.names, seed, sums=True)
        for job in work.merged:
            _check_job(job)
        kinds.update({job.name: statistic_name(job.method) for job in work.merged})
        return _sums(work)

    def homes(tensors: dict[str, dict[str, Any]], mesh: Any) -> Any:
        return jax.tree.map(lambda leaf: statistic_home(leaf, mesh), tensors)

    tensors = automatic(summed, arrays, homes)
    base_print = automatic(lambda leaves: fingerprint(leaves, list(kinds)), problem.trees[0], nowhere)
    options = {"rules": [msgspec.to_builtins(rule) for rule in rules], "heads": None}
    plain = jax.tree.map(plain_number, [1.0] * len(problem.names) if weights is None else list(weights))
    names = dict(zip(problem.names, plain, strict=True))
    return Statistics(expression(method), names, kinds, base_print, options, tensors)


def _sums(work: Work) -> dict[str, dict[str, Any]]:
    """The statistics of the work's tensors, `{tensor: {leaf: array}}`, over all devices that a tensor lies on."""
    pieces: dict[str, dict[str, list[Any]]] = {job.name: {} for job in work.merged}

    def take(unit: Unit, statistics: Any) -> None:
        for job, _, leaves in unit.shares(statistics):
            where = work.sharded.get(job.name)
            for leaf, array in leaves.items():
                own = array if where is None else jax.device_put(array, spread(array.shape, where))
                pieces[job.name].setdefault(leaf, []).append(own)

    run.accumulate(work, take)
    shapes = {job.name: _leaf_shapes(job) for job in work.merged}
    return {
        job.name: {
            leaf: jnp.concatenate(parts).reshape(job.matrices, *shapes[job.name][leaf])
            for leaf, parts in pieces[job.name].items()
        }
        for job in work.merged
    }


def solve(
    statistics: Statistics | str | Path,
    base: Any,
    method: str | Method | None = None,
    *,
    output: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The merged model from statistics, as a merge of the base with their experts would give it.

        >>> statistics = cfmerge.accumulate("base", ["math", "code"], "average", output="statistics")
        >>> result = cfmerge.solve("statistics", "base", "task_arithmetic(scale=0.5)", output="merged")
        >>> result.output.name
        'merged'

    Args:
        statistics: the `Statistics` from `accumulate`, or the directory that it made.
        base: the checkpoint, or the pytree, that they were accumulated over.
        method: any method that keeps the same statistic; None: the one that they were accumulated for.
        output: the directory of the merged model, for checkpoints.
        parameters: the method's, if it is given by name.
        **options: further arguments of `cfmerge.merge`.

    Returns:
        A `MergeResult` of checkpoints, a tree like the base of pytrees.

    Raises:
        CfmergeError: another base, or a method that keeps another statistic.
    """
    kept = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    load_plugins(options.get("plugins", ()))
    chosen = full_form(as_method(method if method is not None else kept.method, parameters))
    if not isinstance(base, str | Path):
        leaves, treedef = flatten(base)
        merged = merge_assigned(base, chosen, kept)
        return unflatten(treedef, dict(leaves) | merged)
    if output is None:
        raise CfmergeError("solve of checkpoints: name a directory for the merged model with output=")
    path = "" if isinstance(statistics, Statistics) else str(statistics)
    known = ("overwrite", "memory", "devices", "progress", "fresh")
    run = {key: options.pop(key) for key in known if key in options}
    recipe = as_recipe(base, [], expression(chosen), {}, {"statistics": path, **options})
    return merge_recipe(recipe, output, statistics=kept, **run)
