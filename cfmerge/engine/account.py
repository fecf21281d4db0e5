"""What a run has to tell: notes of the methods with the tensors that they are about, and reports by tensor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cfmerge.engine.precision import Outcome
from cfmerge.engine.units import Unit
from cfmerge.engine.work import methods_of
from cfmerge.errors import and_more

Report = Mapping[str, float]


@dataclasses.dataclass
class Account:
    """Filled while a run goes on.

    Attributes:
        reports: of each result `{tensor: {name: value}}`.
        notes: `{(result, method, message): {tensor: value}}`; a message may hold `{value}`.
        float64: how many tensors needed float64.
    """

    reports: dict[int, dict[str, Report]] = dataclasses.field(default_factory=dict)
    notes: dict[tuple[int, str, str], dict[str, float]] = dataclasses.field(default_factory=dict)
    float64: int = 0

    def add(self, unit: Unit, outcome: Outcome) -> None:
        self.float64 += outcome.float64
        for result, reports in enumerate(outcome.reports):
            for number, job in enumerate(unit.jobs):
                told = {key: float(np.max(value[number])) for key, value in reports.items()}
                if any(outcome.reports):
                    self.reports.setdefault(result, {})[job.name] = told
                method = methods_of(job)[result]
                for key, (condition, message) in method.notes.items():
                    if key in told and condition(told[key]):
                        self.notes.setdefault((result, method.name, message), {})[job.name] = told[key]

    def told(self) -> list[str]:
        """The notes of the methods, one for each kind; of a sweep with the method's name."""
        several = len({result for result, _, _ in self.notes} | set(self.reports)) > 1
        return [
            f"{and_more(list(values))}: {f'{method}: ' if several else ''}{message.format(value=max(values.values()))}"
            for (_, method, message), values in self.notes.items()
        ]

    def lines(self) -> list[str]:
        """All notes."""
        double = [f"float64 was used for {self.float64} ill-conditioned tensors"] if self.float64 else []
        return [*self.told(), *double]

    def reports_of(self, result: int) -> dict[str, Any]:
        return self.reports.get(result, {})
