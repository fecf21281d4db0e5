"""The account of a run: notes of the methods with the tensors that they are about, and reports by tensor."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.part import Composer
from cfmerge.engine.precision import Outcome
from cfmerge.engine.sampling import Sample, foreign, twins
from cfmerge.engine.units import Unit
from cfmerge.errors import and_more
from cfmerge.planning.jobs import methods_of
from cfmerge.planning.work import Job

Report = Mapping[str, float]
GROWTH = "growth"  # a report: the merged delta's length over that of the sum of as many unrelated deltas
SAFER = "average >> subspace_boosting"  # best in the mean over the zoos of docs/results; 88 at growth, ACE 33


class Told(NamedTuple):
    """All that is told of a unit, in plain values, as a journal keeps it.

    Attributes:
        reports: of each result `{tensor: {name: value}}`; none of methods that report nothing.
        float64: tensors that float64 was needed for.
        sample: of the matrices that were read, see `sampling.Sample`.
    """

    reports: Sequence[Mapping[str, Report]] = ()
    float64: Sequence[str] = ()
    sample: Sequence[Any] | None = None


def told_of(unit: Unit, outcome: Outcome) -> Told:
    """All that is told of a unit with that outcome."""
    by_result = outcome.reports if isinstance(outcome.reports, tuple) else (outcome.reports,)
    reports: list[dict[str, Report]] = [{} for _ in by_result] if any(by_result) else []
    of_span = _sum if adds(unit.job) else lambda values: float(np.max(values))
    for own, values in zip(reports, by_result, strict=False):
        for name, span in zip(unit.names, unit.spans, strict=True):
            report = {key: of_span(value[span]) for key, value in values.items()}
            own[name] = _joined(unit.job, report, own.get(name, {}))
    return Told(reports, [unit.names[number] for number in outcome.float64], outcome.sample and list(outcome.sample))


def adds(job: Job) -> bool:
    """Whether the report's values are sums; of all other methods the largest is told."""
    return isinstance(job.method, Composer) and job.method.sums


def _sum(values: Any) -> Any:
    return jnp.sum(values) if isinstance(values, jax.core.Tracer) else float(np.sum(values, dtype=np.float64))


def _joined(job: Job, report: Report, before: Report) -> dict[str, float]:
    """A tensor's report and that on its other segments as one: the larger values, or the sums."""
    join = operator.add if adds(job) else max
    return dict(report) | {key: join(value, report[key]) for key, value in before.items()}


@dataclasses.dataclass
class Account:
    """The notes and reports of a run, filled while it goes on.

    Attributes:
        reports: `{result: {tensor: {name: value}}}`.
        notes: `{(result, method, message): {tensor: value}}`; a message may hold `{value}`.
        sample: of all matrices.
    """

    reports: dict[int, dict[str, Report]] = dataclasses.field(default_factory=dict)
    notes: dict[tuple[int, str, str], dict[str, float]] = dataclasses.field(default_factory=dict)
    sample: Sample | None = None
    _double: set[str] = dataclasses.field(default_factory=set)
    _past: set[tuple[int, str]] = dataclasses.field(default_factory=set)  # (result, tensor) past the bound of growth

    def add(self, told: Told, jobs: Mapping[str, Job]) -> None:
        """Adds all that is told of a unit; `jobs` by the names of its tensors, and of others."""
        self._double.update(told.float64)
        if told.sample is not None:
            sample = Sample(*told.sample)
            self.sample = sample if self.sample is None else self.sample.plus(sample)
        for result, reports in enumerate(told.reports):
            own = self.reports.setdefault(result, {})
            for name, report in reports.items():
                own[name] = merged = _joined(jobs[name], report, own.get(name, {}))
                method = methods_of(jobs[name])[result]
                for key, (condition, message) in method.notes.items():
                    if key in merged and condition(merged[key]):
                        self._past |= {(result, name)} if key == GROWTH else set()
                        self.notes.setdefault((result, method.name, message), {})[name] = merged[key]

    def told(self) -> list[str]:
        """The notes of the methods, one for each kind; of a sweep with the method's name."""
        several = len({result for result, _, _ in self.notes} | set(self.reports)) > 1
        return [
            f"{and_more(list(values))}: {f'{method}: ' if several else ''}{message.format(value=max(values.values()))}"
            for (_, method, message), values in self.notes.items()
        ]

    def lines(self) -> list[str]:
        """All notes of the run."""
        double = [f"float64 was used for {len(self._double)} ill-conditioned tensors"] if self._double else []
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
            f"are LoRA adapters that share a start. {SAFER} divides by no covariance and does better there"
        )

    def foreign(self, experts: Sequence[str]) -> list[str]:
        """A sentence for each expert that does not seem to come from the base."""
        if self.sample is None:
            return []
        return [
            f"expert {name!r} does not seem to come from this base: {count} of {self.sample.seen} matrices have "
            "nothing in common with the base's. Merge it over its own base, or leave it out; models of different "
            "initialisation are aligned first (--align weights)"
            for name, count in foreign(self.sample, experts)
        ]

    def twins(self, experts: Sequence[str]) -> list[str]:
        """A sentence for each pair of experts whose deltas are nearly the same."""
        if self.sample is None:
            return []
        return [
            f"experts {one!r} and {other!r} are nearly the same (cosine of their deltas {cosine:.3f}): together they "
            "count twice. Leave one out, or give each half the weight"
            for one, other, cosine in twins(self.sample, experts)
        ]

    def reports_of(self, result: int) -> dict[str, Any]:
        return self.reports.get(result, {})
