"""A setting run on checkpoints that are there: each expert stored in the setting's order, a model deployed after each.

The experts are trained already, so no model is made from which a task would start; the rule for that is kept in the
store all the same, and tells how they should have been trained.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError, nearest
from cfmerge.temporal.metrics import checked
from cfmerge.temporal.report import Report
from cfmerge.temporal.rules import Rule
from cfmerge.temporal.settings import Setting, published
from cfmerge.temporal.stages import Time

Judge = Callable[[int, Path], Mapping[str, float]]  # of a step and the model that was deployed after it


@dataclass(frozen=True)
class Run:
    """How far a setting has come; made by `run_setting`.

    Attributes:
        setting: the setting, on the stream that was run.
        time: its store.
        served: by step, the model to evaluate; step 0 is the base.
        waiting: tasks whose experts are not there yet.
    """

    setting: Setting
    time: Time
    served: Mapping[int, Path]
    waiting: Sequence[str]

    @property
    def unscored(self) -> list[int]:
        """The steps that lack the score of some data set."""
        known, every = self.time.report().history, {*self.setting.adaptation, *self.setting.held_out}
        return [step for step in range(self.time.step + 1) if every - set(known.get(step, {}))]

    def report(self) -> Report:
        """The report of the scores so far; it has `markdown()`, `to_json()` and `save(directory)`."""
        made = self.time.report()
        setting = {"setting": f"{self.setting.name}, stream {self.setting.stream}"}
        return dataclasses.replace(made, about={**setting, **made.about})


def run_setting(
    setting: Setting | str | Path,
    store: str | Path,
    base: str | Path,
    experts: str | Path,
    served: str | Path,
    *,
    protocol: str | None = None,
    init: str | Rule | None = None,
    deploy: str | Rule | None = None,
    stream: str | None = None,
    scores: Mapping[int, Mapping[str, float]] | Judge | None = None,
    link: bool = True,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Run:
    """Stores the experts of a setting in its order, and deploys a model after each; goes on after a stop.

        >>> tasks = {"math": {"sums": 10}, "code": {"tests": 2}}
        >>> setting = temporal.Setting("mine", ("sums", "tests"), ("chat",), streams={"one": tasks}, stream="one")
        >>> rules = {"init": "base", "deploy": "ema(weight=0.5)"}
        >>> run = temporal.run_setting(setting, "store", "base", experts=".", served="served", **rules)
        >>> [path.name for path in run.served.values()], run.waiting
        (['base', '01-math', '02-code'], ())
        >>> scores = {0: {"sums": 0.2, "tests": 0.1, "chat": 0.9}, 2: {"sums": 0.7, "tests": 0.5, "chat": 0.8}}
        >>> run = temporal.run_setting(setting, "store", "base", ".", "served", scores=scores, **rules)
        >>> run.unscored, run.report().rows[2].knowledge_accumulation
        ([1], 0.6)

    Args:
        setting: a setting, its name, or its file.
        store: the directory of the store, made or opened again.
        base: the checkpoint from which all experts were trained.
        experts: the directory with a checkpoint for each task, by its name: `task-01`, or a file `task-01.safetensors`.
            Tasks at the stream's end may be missing still; a later run takes them in.
        served: the directory into which the model after each step is written.
        protocol: the rules by a name in the setting; none: its first. Its stream is run.
        init, deploy: rules of your own, both, in place of a protocol.
        stream: another stream of the setting.
        scores: by step, those that are known; or a function that evaluates a model: it gets the step and the path, and
            is called where a step lacks scores.
        link: refer to the experts where they lie in place of copying them into the store.
        options: what else a new store is made with, see `Time`: window, keep, options of every merge.
        **how: memory, devices and progress, as for `cfmerge.merge`.

    Raises:
        CfmergeError: a task in the middle has no checkpoint, the store holds another order, or as `Time` does.
    """
    chosen, rules = _chosen(setting, protocol, init, deploy, stream)
    found, waiting = _found(chosen, Path(experts))
    table = {} if scores is None or callable(scores) else dict(scores)
    for step, known in table.items():
        checked(known, chosen.adaptation, chosen.held_out)
        if step not in range(len(found) + 1):
            raise CfmergeError(f"scores of step {step!r}: there are steps 0 (the base) to {len(found)}")
    time = Time(
        store,
        base,
        tasks=chosen.adaptation,
        held_out=chosen.held_out,
        trained=chosen.trained,
        **rules,
        **(options or {}),
    )
    if time.done != list(chosen.tasks[: len(time.done)]):
        raise CfmergeError(
            f"store {time.path}: holds the experts {', '.join(time.done)}, in this order; stream {chosen.stream!r} "
            f"begins with {', '.join(chosen.tasks[: len(time.done)])}: name another store"
        )
    models = {0: Path(base)}
    for step, (task, path) in enumerate(found.items(), 1):
        if step > time.step:
            time.store(path, task, link=link, **how)
        model = Path(served) / f"{step:02d}-{task}"
        if step == time.step and not model.exists():
            time.deploy(model, **how)
        if model.exists():
            models[step] = model
    run = Run(chosen, time, models, waiting)
    for step, given in table.items():
        time.evaluate(given, step)
    if callable(scores):
        for step in run.unscored:
            if step in models:
                time.evaluate(scores(step, models[step]), step)
    return run


def read_scores(path: str | Path) -> dict[int, dict[str, float]]:
    """The scores by step in a file: JSON `{"0": {"cub200": 64.1, ...}, ...}`, or CSV with columns step, task, score.

    Raises:
        CfmergeError: the file cannot be read as such a table, or tells a score twice.
    """
    try:
        text = Path(path).read_text("utf-8")
        if not text.lstrip().startswith("{"):
            return _of_csv(text)
        content = json.loads(text)
        return {int(step): {str(task): float(score) for task, score in row.items()} for step, row in content.items()}
    except CfmergeError as error:
        raise CfmergeError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CfmergeError(f"{path}: is no table of scores by step and task: {error}") from None


def _of_csv(text: str) -> dict[int, dict[str, float]]:
    rows = csv.DictReader(text.splitlines())
    if set(rows.fieldnames or ()) != {"step", "task", "score"}:
        raise CfmergeError(f"expected the columns step, task, score; found {', '.join(rows.fieldnames or ())}")
    scores: dict[int, dict[str, float]] = {}
    for row in rows:
        known = scores.setdefault(int(row["step"]), {})
        if row["task"] in known:
            raise CfmergeError(f"step {row['step']} has two scores of {row['task']!r}")
        known[row["task"]] = float(row["score"])
    return scores


def _chosen(
    setting: Setting | str | Path,
    protocol: str | None,
    init: str | Rule | None,
    deploy: str | Rule | None,
    stream: str | None,
) -> tuple[Setting, dict[str, Any]]:
    """The setting on the stream that is asked for, and the rules."""
    chosen = setting if isinstance(setting, Setting) else published(setting)
    if (init is None) != (deploy is None):
        raise CfmergeError("name both rules, init= and deploy=, or a protocol of the setting")
    if init is not None and protocol is not None:
        raise CfmergeError(f"protocol={protocol!r} says both rules; leave init and deploy out")
    if init is None:
        if not chosen.protocols:
            raise CfmergeError(f"setting {chosen.name}: names no protocols; name the rules, init= and deploy=")
        tried = chosen.tried(protocol or next(iter(chosen.protocols)))
        init, deploy, stream = tried.init, tried.deploy, stream or tried.stream
    return chosen.on(stream or chosen.stream), {"init": init, "deploy": deploy}


def _found(setting: Setting, folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The checkpoints of the tasks that are there, in order, and the tasks at the end that are not."""
    if not folder.is_dir():
        raise CfmergeError(f"experts {folder}: is no directory; it should hold a checkpoint for each task")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    by_task = {task: [one for one in entries if task in (one.name, one.stem)] for task in setting.tasks}
    for task, paths in by_task.items():
        if len(paths) > 1:
            told = " and ".join(path.name for path in paths)
            raise CfmergeError(f"experts {folder}: {told} are both named after task {task!r}; keep one")
    there = [bool(paths) for paths in by_task.values()]
    count = there.index(False) if False in there else len(there)
    missing = setting.tasks[count] if count < len(there) else ""
    if not count or any(there[count:]):
        near = nearest(missing, [entry.name for entry in entries])
        raise CfmergeError(f"experts {folder}: there is no checkpoint of task {missing!r}, which comes next{near}")
    return {task: paths[0] for task, paths in list(by_task.items())[:count]}, setting.tasks[count:]
