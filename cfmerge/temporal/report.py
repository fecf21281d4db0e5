"""Reports of merging over time: the metrics of each step, the scores by task and step, and their picture."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cfmerge.errors import CfmergeError
from cfmerge.formats.staged import StagedFile
from cfmerge.temporal.metrics import NAMES, History, Metrics, Trained, checked, table, trained_by

REPORT, VERSION = "cfmerge-time-report", 1
NO_NUMBER = "-"


@dataclass(frozen=True)
class Report:
    """All that is told of a store's scores; made by `report_of`.

        >>> report = temporal.report_of({0: {"birds": 0.25, "cars": 0.5}}, [], ["birds", "cars"], [])
        >>> report.shown(report.rows[0].knowledge_accumulation), report.rows[0].geometric_mean
        ('0.375', None)

    Attributes:
        history: scores by step and task.
        order: the experts' names, in the order in which they were stored.
        tasks: the adaptation tasks.
        held_out: the tasks that no step trains.
        about: what else stands at the report's head, by name.
        trained: the tasks that an expert's data belong to.
        rows: the metrics of each step.
    """

    history: History
    order: Sequence[str]
    tasks: Sequence[str]
    held_out: Sequence[str]
    about: Mapping[str, Any]
    trained: Trained
    rows: Sequence[Metrics] = field(repr=False)

    def markdown(self) -> str:
        """The report as Markdown: the metrics of each step, then the scores by task."""
        about = [f"- {name}: {_plain(value)}" for name, value in self.about.items()]
        parts = ["# Merging over time", "\n".join(about), self._headline(), "![scores](scores.png)"]
        parts += ["## Metrics by step", self._metrics(), self._undefined(), DEFINITIONS]
        parts += ["## Scores by task", SCORES, self._scores()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self) -> str:
        """The report as JSON; a number that is not defined is null."""
        content = {
            "format": REPORT,
            "version": VERSION,
            "about": dict(self.about),
            "tasks": list(self.tasks),
            "held_out": list(self.held_out),
            "order": list(self.order),
            "trained": {name: list(tasks) for name, tasks in self.trained.items()},
            "rows": msgspec.to_builtins(list(self.rows)),
            "scores": {str(step): dict(scores) for step, scores in sorted(self.history.items())},
        }
        return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"

    def save(self, directory: str | Path) -> Path:
        """Writes report.md, report.json and scores.png, each whole or not at all; returns the directory.

        Files of these names that are there are replaced.

        Raises:
            CfmergeError: the directory is a file, or cannot be written.
        """
        from cfmerge.temporal.plots import draw

        place = Path(directory)
        if place.exists() and not place.is_dir():
            raise CfmergeError(f"report {place}: is a file; name a directory")
        texts = {"report.json": self.to_json(), "report.md": self.markdown()}
        writers: dict[str, Callable[[Path], Any]] = {"scores.png": lambda path: draw(self, path)}
        writers |= {name: lambda path, text=text: path.write_text(text, "utf-8") for name, text in texts.items()}  # type: ignore[misc]
        try:
            for name, write in writers.items():
                with StagedFile(place / name, overwrite=True) as staged:
                    write(staged.path / name)
                    staged.commit()
        except OSError as error:
            raise CfmergeError(f"report {place}: cannot be written: {error}; name another directory") from None
        return place

    def shown(self, number: float | None) -> str:
        """A score or a metric as text, with the digits that fit: of accuracies three, of percentages two."""
        return NO_NUMBER if number is None else f"{number:.{3 if self.is_fraction else 2}f}"

    @property
    def scored(self) -> bool:
        """Whether there is any score."""
        return any(self.history.values())

    @functools.cached_property
    def is_fraction(self) -> bool:
        """Whether all scores lie between -1 and 1."""
        return all(abs(score) <= 1 for scores in self.history.values() for score in scores.values())

    @functools.cached_property
    def steps_of(self) -> dict[str, list[int]]:
        """By task, the steps that trained it; none for a held-out task."""
        steps: dict[str, list[int]] = {task: [] for task in (*self.tasks, *self.held_out)}
        for step, name in enumerate(self.order, 1):
            for task in trained_by(name, self.trained):
                if task in steps:
                    steps[task].append(step)
        return steps

    def first_step(self, task: str) -> int:
        """The first step that trained a task; one past the last where none did."""
        return min(self.steps_of[task], default=len(self.order) + 1)

    def sorted_tasks(self) -> list[str]:
        """The adaptation tasks in the order in which steps trained them, those that no step trained last."""
        return sorted(self.tasks, key=self.first_step)

    def _headline(self) -> str:
        """The last step that has a geometric mean, beside the base."""
        told = [row for row in self.rows if row.geometric_mean is not None]
        if not told:
            return "No step has a geometric mean yet."
        last, first = told[-1], self.rows[0]
        base = f" The base has {self.shown(first.geometric_mean)}." if first.geometric_mean is not None else ""
        after = f"step {last.step} (`{last.expert}`)" if last.step else "step 0 (the base)"
        return f"Geometric mean after {after}: **{self.shown(last.geometric_mean)}**." + (base if last.step else "")

    def _metrics(self) -> str:
        rows = [
            [
                row.step,
                "(base)" if row.expert is None else row.expert,
                *(self.shown(getattr(row, name)) for name in NAMES),
            ]
            for row in self.rows
        ]
        return _table(["step", "expert", *NAMES.values()], rows)

    def _undefined(self) -> str:
        """The reasons for numbers that are missing, but for those that no score could mend."""
        lines: list[str] = []
        for row in self.rows:
            reasons: dict[str, list[str]] = {}
            for metric, reason in row.undefined.items():
                reasons.setdefault(reason, []).append(NAMES[metric])
            lines += [
                f"- {reason}" if len(metrics) == len(NAMES) else f"- step {row.step}, {' and '.join(metrics)}: {reason}"
                for reason, metrics in reasons.items()
                if not reason.endswith("is not defined") and "last trained before" not in reason
            ]
        return "\n".join(["Not defined:", "", *lines]) if lines else ""

    def _scores(self) -> str:
        steps = range(len(self.order) + 1)
        rows = [[task, *(self._cell(step, task) for step in steps)] for task in self.sorted_tasks()]
        rows += [[f"{task} (held out)", *(self._cell(step, task) for step in steps)] for task in self.held_out]
        return _table(["task", *(f"{step} {name}" for step, name in enumerate(["base", *self.order]))], rows)

    def _cell(self, step: int, task: str) -> str:
        score = self.history.get(step, {}).get(task)
        text = self.shown(score)
        if score is None:
            return text
        if step in self.steps_of[task]:
            return f"**{text}**"
        return text if task in self.held_out or step > self.first_step(task) else f"*{text}*"


DEFINITIONS = """\
Knowledge accumulation is the mean score over all adaptation tasks, those that no step has trained
yet among them; zero-shot retention the mean over the held-out tasks, which no step trains. Backward
transfer is the mean gain of the tasks of earlier steps since they were trained; the article of TIME
(arXiv 2412.06712) has no such metric."""

SCORES = "Bold: the step that trained the task. Italic: no step had trained it yet."


def report_of(
    history: History,
    order: Sequence[str],
    tasks: Sequence[str],
    held_out: Sequence[str],
    about: Mapping[str, Any] | None = None,
    *,
    trained: Trained | None = None,
) -> Report:
    """The report of a history of scores: its rows, as Markdown, as JSON, and saved with a picture.

        >>> history = {
        ...     0: {"birds": 0.3, "cars": 0.2, "digits": 0.9},
        ...     1: {"birds": 0.8, "cars": 0.2, "digits": 0.8},
        ...     2: {"birds": 0.75, "cars": 0.5, "digits": 0.8},
        ... }
        >>> report = temporal.report_of(history, ["birds", "cars"], ["birds", "cars"], ["digits"], {"deploy": "ema"})
        >>> print(report.rows[2].knowledge_accumulation, report.rows[2].zero_shot_retention)
        0.625 0.8
        >>> sorted(path.name for path in report.save("report").iterdir())
        ['report.json', 'report.md', 'scores.png']

    Args:
        history: scores by step and task; step 0 is the base.
        order: the experts' names, in the order in which they were stored.
        tasks: the adaptation tasks, all of them.
        held_out: the tasks that no step trains.
        about: what else stands at the report's head, by name.
        trained: the tasks that an expert's data belong to; none: the task of its own name.

    Raises:
        CfmergeError: as `table` does.
    """
    rows = table(history, tasks, held_out, order, trained=trained)
    numbers = {step: checked(scores, tasks, held_out) for step, scores in history.items()}
    own = {name: list(trained_by(name, trained)) for name in order}
    return Report(numbers, list(order), list(tasks), list(held_out), dict(about or {}), own, rows)


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    names = 2 if head[0] == "step" else 1
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    """A value as text that stands in one cell of a table."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return ", ".join(map(_plain, value))
