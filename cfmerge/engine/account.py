"""The account of a run: notes of the methods with the tensors that they are about, and reports by tensor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cfmerge.engine.precision import Outcome
from cfmerge.engine.units import Unit
from cfmerge.errors import and_more
from cfmerge.planning.jobs import methods_of

Report = Mapping[str, float]
GROWTH = "growth"  # a report: the merged delta's length over that of the sum of as many unrelated deltas
SAFER = "dc_merge"  # the method that is best over all of docs/results, and holds where growth is found


@dataclasses.dataclass
class Account:
    """The notes and reports of a run, filled while it goes on.

    Attributes:
        reports: `{result: {tensor: {name: value}}}`.
        notes: `{(result, method, message): {tensor: value}}`; a message may hold `{value}`.
        float64: how many tensors needed float64.
    """

    reports: dict[int, dict[str, Report]] = dataclasses.field(default_factory=dict)
    notes: dict[tuple[int, str, str], dict[str, float]] = dataclasses.field(default_factory=dict)
    float64: int = 0
    _past: set[tuple[int, str]] = dataclasses.field(default_factory=set)  # (result, tensor) past the bound of growth

    def add(self, unit: Unit, outcome: Outcome) -> None:
        self.float64 += outcome.float64
        by_result = outcome.reports if isinstance(outcome.reports, tuple) else (outcome.reports,)
        if not any(by_result):
            return
        for result, reports in enumerate(by_result):
            own = self.reports.setdefault(result, {})
            for job, span in zip(unit.jobs, unit.spans, strict=True):
                told = {key: float(np.max(value[span])) for key, value in reports.items()}
                for key, value in own.get(job.name, {}).items():  # of the tensor's other segments
                    told[key] = max(value, told[key])
                own[job.name] = told
                method = methods_of(job)[result]
                for key, (condition, message) in method.notes.items():
                    if key in told and condition(told[key]):
                        self._past |= {(result, job.name)} if key == GROWTH else set()
                        self.notes.setdefault((result, method.name, message), {})[job.name] = told[key]

    def told(self) -> list[str]:
        """The notes of the methods, one for each kind; of a sweep with the method's name."""
        several = len({result for result, _, _ in self.notes} | set(self.reports)) > 1
        return [
            f"{and_more(list(values))}: {f'{method}: ' if several else ''}{message.format(value=max(values.values()))}"
            for (_, method, message), values in self.notes.items()
        ]

    def lines(self) -> list[str]:
        """All notes of the run."""
        double = [f"float64 was used for {self.float64} ill-conditioned tensors"] if self.float64 else []
        return [*self.told(), *double]

    def warning(self, result: int) -> str:
        """One sentence about the whole model where most solved layers have outgrown their experts; else nothing."""
        grown = {name: report[GROWTH] for name, report in self.reports_of(result).items() if GROWTH in report}
        past = [name for name in grown if (result, name) in self._past]
        if 2 * len(past) <= len(grown):
            return ""
        return (
            f"{len(past)} of {len(grown)} solved layers came out much longer than their experts' sum (up to "
            f"{max(grown.values()):.1f} times): this model may be worse than the base, as when all experts "
            f"are LoRA adapters that share a start. {SAFER} divides by no covariance and holds there"
        )

    def reports_of(self, result: int) -> dict[str, Any]:
        return self.reports.get(result, {})
