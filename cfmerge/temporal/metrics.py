"""Metrics of merging over time, out of scores by task and step: `{step: {task: score}}`, step 0 the base.

    KA_t  = mean over all adaptation tasks of score_t      knowledge accumulation; tasks not trained yet count too
    ZS_t  = mean over the held-out tasks of score_t        zero-shot retention; no step trains these tasks
    GM_t  = sqrt(KA_t ZS_t)                                the headline number
    BWT_t = mean over j of (score_t[j] - score_{s_j}[j])   backward transfer; s_j: the last step up to t that trained j;
                                                           over the tasks with s_j < t

KA, ZS and GM are those of Dziadzio et al., "How to Merge Your Multimodal Models Over Time?" (arXiv 2412.06712). That
article has no backward transfer: it is ours, in the usual definition (Lopez-Paz and Ranzato, arXiv 1706.08840), and
each step has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from cfmerge.errors import CfmergeError, nearest

Scores = Mapping[str, float]
History = Mapping[int, Scores]
Trained = Mapping[str, Sequence[str]]  # an expert's name, and the tasks that its data belong to

NAMES = {
    "knowledge_accumulation": "knowledge accumulation",
    "zero_shot_retention": "zero-shot retention",
    "geometric_mean": "geometric mean",
    "backward_transfer": "backward transfer",
}


class Metrics(msgspec.Struct, frozen=True):
    """One step's row of the table; a number that is not defined is None.

        >>> row = temporal.table({0: {"birds": 0.4}}, tasks=["birds"], held_out=["digits"], order=["birds"])[0]
        >>> row.knowledge_accumulation, row.zero_shot_retention
        (0.4, None)
        >>> row.undefined["zero_shot_retention"]
        "no score of 'digits' (1 of 1 held-out tasks)"

    Attributes:
        step: how many experts were stored when the model was deployed; 0 is the base.
        expert: the name of the expert that this step stored; None at step 0.
        undefined: by metric, the reason for which its number is None.
    """

    step: int
    expert: str | None
    knowledge_accumulation: float | None = None
    zero_shot_retention: float | None = None
    geometric_mean: float | None = None
    backward_transfer: float | None = None
    undefined: dict[str, str] = {}


def knowledge_accumulation(scores: Scores, adaptation: Iterable[str]) -> float:
    """The mean score over all adaptation tasks, those that no step has trained yet among them.

        >>> temporal.knowledge_accumulation({"birds": 0.75, "cars": 0.25, "digits": 0.9}, ["birds", "cars"])
        0.5

    Raises:
        CfmergeError: a task has no score, or there is no task.
    """
    return _mean(scores, adaptation, "adaptation")


def zero_shot_retention(scores: Scores, held_out: Iterable[str]) -> float:
    """The mean score over the held-out tasks, which no step trains.

        >>> temporal.zero_shot_retention({"birds": 0.8, "digits": 0.5, "faces": 0.75}, ["digits", "faces"])
        0.625

    Raises:
        CfmergeError: a task has no score, or there is no task.
    """
    return _mean(scores, held_out, "held-out")


def geometric_mean(accumulation: float, retention: float) -> float:
    """The geometric mean of knowledge accumulation and zero-shot retention.

        >>> round(temporal.geometric_mean(38.47, 67.93), 1)  # OpenCLIP ViT-B/32 before the first task of FoMo-in-Flux
        51.1

    Raises:
        CfmergeError: one of them is negative.
    """
    found = {"knowledge accumulation": float(accumulation), "zero-shot retention": float(retention)}
    negative = [f"{name} is {number:.6g}" for name, number in found.items() if number < 0]
    if negative:
        raise CfmergeError(f"the geometric mean needs numbers that are not negative: {' and '.join(negative)}")
    return math.sqrt(float(accumulation) * float(retention))


def backward_transfer(
    history: History, order: Sequence[str], *, step: int | None = None, trained: Trained | None = None
) -> float:
    """How much the tasks of earlier steps have gained since they were trained, on average; forgetting is negative.

        >>> history = {1: {"birds": 0.75, "cars": 0.2}, 2: {"birds": 0.5, "cars": 0.9}}
        >>> temporal.backward_transfer(history, ["birds", "cars"])
        -0.25

    The article of TIME has no such metric; this one is ours. A task that several steps train counts from the last one.

    Args:
        history: scores by step.
        order: the experts' names, in the order in which they were stored.
        step: the step that is asked about; none: the last.
        trained: the tasks that an expert's data belong to; none: the task of its own name.

    Raises:
        CfmergeError: no task was last trained before `step`, or a score of one is missing.
    """
    step = len(order) if step is None else step
    if not 0 <= step <= len(order):
        raise CfmergeError(f"step {step}: there are {len(order)} steps: {', '.join(order)}")
    since = {task: at for task, at in learned(order, trained, step).items() if at < step}
    if not since:
        raise CfmergeError(
            f"no task was last trained before step {step}: backward transfer compares with earlier steps"
        )
    pairs = [(at, task) for task, at in since.items()] + [(step, task) for task in since]
    lacking = [f"{task!r} at step {at}" for at, task in pairs if task not in history.get(at, {})]
    if lacking:
        raise CfmergeError(f"no score of {_some(lacking)}")
    return math.fsum(float(history[step][task]) - float(history[at][task]) for task, at in since.items()) / len(since)


def learned(order: Sequence[str], trained: Trained | None, step: int) -> dict[str, int]:
    """By task, the last step up to `step` whose expert was trained on it."""
    return {task: at for at, name in enumerate(order[:step], 1) for task in trained_by(name, trained)}


def trained_by(expert: str, trained: Trained | None) -> Sequence[str]:
    """The tasks that an expert's data belong to: those told, else the task of its own name."""
    return (expert,) if trained is None or expert not in trained else trained[expert]


def checked(scores: Mapping[str, Any], tasks: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """The scores as numbers of Python, once all of them belong to a task that is known.

        >>> temporal.checked({"birds": 0.5}, tasks=["birds", "cars"], held_out=["digits"])
        {'birds': 0.5}
        >>> try:
        ...     temporal.checked({"bird": 0.5}, tasks=["birds", "cars"], held_out=["digits"])
        ... except cfmerge.CfmergeError as error:
        ...     print(error)
        score of an unknown task 'bird'; did you mean 'birds'?

    Any finite number is a score: an accuracy, a percentage, a correlation. Some tasks may lack one.

    Raises:
        CfmergeError: a task is unknown, or a score is no finite number.
    """
    known = [*tasks, *held_out]
    for task, score in scores.items():
        if task not in known:
            raise CfmergeError(f"score of an unknown task {task!r}{nearest(str(task), known)}")
        try:
            finite = not isinstance(score, bool | str) and math.isfinite(float(score))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise CfmergeError(f"score of {task!r}: expected a finite number, found {score!r}")
    return {task: float(score) for task, score in scores.items()}


def table(
    history: History,
    tasks: Sequence[str],
    held_out: Sequence[str],
    order: Sequence[str],
    *,
    trained: Trained | None = None,
) -> list[Metrics]:
    """The metrics of each step, from step 0 (the base) to the last of `order`.

        >>> history = {
        ...     0: {"birds": 40, "cars": 20, "digits": 90},
        ...     1: {"birds": 80, "cars": 24, "digits": 81},
        ...     2: {"birds": 72, "cars": 56, "digits": 64},
        ... }
        >>> rows = temporal.table(history, tasks=["birds", "cars"], held_out=["digits"], order=["birds", "cars"])
        >>> [(row.step, row.expert, row.knowledge_accumulation, row.zero_shot_retention) for row in rows]
        [(0, None, 30.0, 90.0), (1, 'birds', 52.0, 81.0), (2, 'cars', 64.0, 64.0)]
        >>> rows[2].geometric_mean, rows[2].backward_transfer
        (64.0, -8.0)

    A number for which scores are missing is None, and the row's `undefined` says which.

    Args:
        history: scores by step.
        tasks: the adaptation tasks, all of them.
        held_out: the tasks that no step trains.
        order: the experts' names, in the order in which they were stored.
        trained: the tasks that an expert's data belong to; none: the task of its own name. An expert whose name is no
            task's, and of which nothing is told, counts as trained on none of them.

    Raises:
        CfmergeError: a score is of an unknown task or step, or is no finite number; a held-out task is trained or is an
            adaptation task too.
    """
    check_tasks(tasks, held_out, order, trained)
    for step in history:
        if not isinstance(step, int) or not 0 <= step <= len(order):
            raise CfmergeError(f"scores of step {step!r}: there are steps 0 (the base) to {len(order)}")
    numbers = {step: checked(scores, tasks, held_out) for step, scores in history.items()}
    own = {name: [task for task in trained_by(name, trained) if task in tasks] for name in order}
    return [_row(numbers, step, tasks, held_out, order, own) for step in range(len(order) + 1)]


def check_tasks(
    tasks: Sequence[str], held_out: Sequence[str], order: Sequence[str] = (), trained: Trained | None = None
) -> None:
    """Raises `CfmergeError` where a held-out task is an adaptation task, or one that an expert was trained on."""
    for names, called in ((tasks, "adaptation tasks"), (held_out, "held-out tasks")):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            raise CfmergeError(f"{called}: {_some(map(repr, twice))} stands there twice")
    both = [name for name in tasks if name in set(held_out)]
    if both:
        raise CfmergeError(f"{_some(map(repr, both))}: an adaptation task cannot be held out; name it once")
    for expert in order:
        for task in trained_by(expert, trained):
            if task in set(held_out):
                raise CfmergeError(
                    f"expert {expert!r} was trained on {task!r}, which is held out: no step may train it"
                )
            if trained is not None and expert in trained and task not in tasks:
                raise CfmergeError(f"expert {expert!r} was trained on an unknown task {task!r}{nearest(task, tasks)}")


def _row(
    history: History, step: int, tasks: Sequence[str], held_out: Sequence[str], order: Sequence[str], own: Trained
) -> Metrics:
    expert = order[step - 1] if step else None
    scores = history.get(step, {})
    if not scores:
        return Metrics(step=step, expert=expert, undefined=dict.fromkeys(NAMES, f"step {step} has no scores"))
    numbers: dict[str, float] = {}
    undefined: dict[str, str] = {}

    def known(metric: str) -> float:
        if metric not in numbers:
            raise CfmergeError(f"{NAMES[metric]} is not defined")
        return numbers[metric]

    formulas = {
        "knowledge_accumulation": lambda: knowledge_accumulation(scores, tasks),
        "zero_shot_retention": lambda: zero_shot_retention(scores, held_out),
        "geometric_mean": lambda: geometric_mean(known("knowledge_accumulation"), known("zero_shot_retention")),
        "backward_transfer": lambda: backward_transfer(history, order, step=step, trained=own),
    }
    for metric, formula in formulas.items():
        try:
            numbers[metric] = formula()
        except CfmergeError as error:
            undefined[metric] = str(error)
    return Metrics(step=step, expert=expert, undefined=undefined, **numbers)


def _mean(scores: Scores, names: Iterable[str], called: str) -> float:
    names = list(names)
    if not names:
        raise CfmergeError(f"there are no {called} tasks")
    lacking = [repr(name) for name in names if name not in scores]
    if lacking:
        raise CfmergeError(f"no score of {_some(lacking)} ({len(lacking)} of {len(names)} {called} tasks)")
    return math.fsum(float(scores[name]) for name in names) / len(names)


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
