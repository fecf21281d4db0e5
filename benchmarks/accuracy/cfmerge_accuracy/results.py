"""The numbers of a run, read back from its folder: one `Results` for each zoo, all seeds together."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge_accuracy import statistics
from cfmerge_accuracy.statistics import Interval, Values

Setting = Literal["published", "scaled"]
Row = Mapping[str, Any]  # one file of a run: a zoo and a seed
Entry = Mapping[str, Any]  # one method in it


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table of methods, in per cent.

    Attributes:
        accuracy: the mean over tasks and seeds.
        normalised: the same in per cent of the experts'.
        best, worst: the tasks with the most and the least normalised accuracy, mean over seeds.
        factors: by which the merged delta was scaled, for each of `seeds`; none at published defaults.
        seeds: on which the method did not fail.
    """

    name: str
    method: str
    group: str
    data: str
    accuracy: float
    normalised: Interval
    best: tuple[str, float]
    worst: tuple[str, float]
    factors: list[float]
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Results:
    """All seeds of one zoo.

    Attributes:
        name: of the zoo.
        rows: one for each seed, in order.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def family(self) -> str:
        """The zoo's name without its variant: "text" of "text-lora-8"."""
        return self.name.partition("-")[0]

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    @property
    def tasks(self) -> list[str]:
        """Those of every seed."""
        return [task for task in self.rows[0]["tasks"] if all(task in row["tasks"] for row in self.rows)]

    @functools.cached_property
    def methods(self) -> dict[str, dict[int, Entry]]:
        """What each seed has of each method, by name."""
        found: dict[str, dict[int, Entry]] = defaultdict(dict)
        for row in self.rows:
            for entry in row.get("methods", ()):
                found[entry["name"]][row["seed"]] = entry
        return dict(found)

    def reference(self, name: str) -> Values:
        """Accuracies of the experts, the base, the multi-task model or the ensemble; empty where there is none."""
        return {row["seed"]: row["references"][name] for row in self.rows if row["references"].get(name)}

    def accuracies(self, name: str, setting: Setting) -> Values:
        """A method's, for the seeds on which it did not fail."""
        return {seed: entry[setting] for seed, entry in self.methods[name].items() if entry.get(setting)}

    def normalised(self, values: Values) -> dict[int, dict[str, float]]:
        """In per cent of the experts' of the same seed."""
        experts = self.reference("experts")
        return {seed: statistics.normalised(by_task, experts[seed]) for seed, by_task in values.items()}

    def all_normalised(self, setting: Setting) -> dict[str, dict[int, dict[str, float]]]:
        """Of every method that has any."""
        found = {name: self.normalised(self.accuracies(name, setting)) for name in self.methods}
        return {name: values for name, values in found.items() if any(values.values())}

    def named(self, method: str) -> str | None:
        """The name of the method that is given by this expression, at its defaults if there are several."""
        if method in self.methods:
            return method
        return next(
            (n for n, each in self.methods.items() if any(e.get("method") == method for e in each.values())), None
        )

    def lines(self, setting: Setting) -> list[Line]:
        """The table of methods, the best first."""
        made = [self._line(name, values, setting) for name, values in self.all_normalised(setting).items()]
        return sorted(made, key=lambda line: (-line.normalised.mean, line.name))

    def _line(self, name: str, values: Values, setting: Setting) -> Line:
        entries = self.methods[name]
        by_task = over_seeds(values)
        first = next(iter(entries.values()))
        seeds = sorted(seed for seed, by_task in values.items() if by_task)
        return Line(
            name=name,
            method=first.get("method", name),
            group=first.get("group", ""),
            data=first.get("data", "none"),
            accuracy=100 * mean_of(self.accuracies(name, setting)),
            normalised=statistics.interval(values),
            best=max(by_task.items(), key=lambda item: item[1]),
            worst=min(by_task.items(), key=lambda item: item[1]),
            factors=[entries[seed]["factor"] for seed in seeds] if setting == "scaled" else [],
            seeds=seeds,
        )

    def over_rows(self, key: str, of: Iterable[str], value: str) -> dict[tuple[Any, ...], float]:
        """The mean over seeds of `value` in the rows' lists called `key`, by the entries named `of`."""
        found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        of = tuple(of)
        for row in self.rows:
            for item in row.get(key) or ():
                if item.get(value) is not None:
                    found[tuple(item[name] for name in of)].append(item[value])
        return {names: float(np.mean(values)) for names, values in found.items()}

    def excess(self, name: str) -> float | None:
        """A method's excess layer output error at its published defaults, mean over seeds."""
        values = [
            e["excess"] for e in self.methods[name].values() if e.get("excess") is not None and e.get("published")
        ]
        return float(np.mean(values)) if values else None


def over_seeds(values: Values) -> dict[str, float]:
    """The mean of every task over the seeds that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for by_task in values.values():
        for task, value in by_task.items():
            found[task].append(value)
    return {task: float(np.mean(each)) for task, each in found.items()}


def mean_of(values: Values) -> float:
    """Over all that there is; NaN where there is nothing."""
    numbers = [value for by_task in values.values() for value in by_task.values()]
    return float(np.mean(numbers)) if numbers else float("nan")


def read(folder: Path) -> tuple[list[Results], Row | None]:
    """The zoos of `folder/rows/`, by name, and the linear testbed if it is there.

    Raises:
        CfmergeError: nothing is there, a file is not complete, or quick and full runs of a zoo are mixed.
    """
    by_zoo: dict[str, dict[int, Row]] = defaultdict(dict)
    linear = None
    for path in sorted((folder / "rows").glob("*.json")):
        try:
            row = json.loads(path.read_text())
        except ValueError as error:
            raise CfmergeError(f"{path} is not complete JSON ({error}); delete it and run its zoo again") from error
        if path.stem == "linear":
            linear = row
            continue
        try:
            by_zoo[row["zoo"]][row["seed"]] = row
            row["tasks"], row["references"]["experts"]
        except (KeyError, TypeError) as error:
            raise CfmergeError(f"{path} lacks {error}: it is not a zoo's numbers; delete it and run again") from error
    if not by_zoo and linear is None:
        raise CfmergeError(f"no results in {folder / 'rows'}; run the suite first, or give the folder it wrote to")
    zoos = [Results(name, tuple(rows[seed] for seed in sorted(rows))) for name, rows in sorted(by_zoo.items())]
    for zoo in zoos:
        _check(zoo, folder)
    return zoos, linear


def _check(zoo: Results, folder: Path) -> None:
    if len({bool(row.get("quick")) for row in zoo.rows}) > 1:
        raise CfmergeError(
            f"{zoo.name} has quick and full runs in {folder / 'rows'}, which must not be averaged; "
            "delete the files of one kind, or write them to another folder"
        )
    if not zoo.tasks:
        raise CfmergeError(f"{zoo.name}: no task is in all of its seeds in {folder / 'rows'}; run it again")
