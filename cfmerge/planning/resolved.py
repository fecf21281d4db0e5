"""Recipes that are resolved: what a merge would do, and what it needs."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from cfmerge import hub
from cfmerge.core.chain import is_chain
from cfmerge.core.expressions import expression
from cfmerge.core.numbers import plain_number
from cfmerge.core.part import Part
from cfmerge.formats import Folder, Source
from cfmerge.formats.base import bytes_of
from cfmerge.formats.unmerged import Unmerged
from cfmerge.methods import Method
from cfmerge.planning.digest import digest_of
from cfmerge.planning.jobs import methods_of
from cfmerge.planning.work import Job, Work
from cfmerge.recipe import Expert, Recipe
from cfmerge.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Planned:
    """One result of a plan: the recipe that would make it alone, and its method."""

    recipe: Recipe
    method: Method


P = TypeVar("P", bound="Resolved")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Recipes resolved against headers: the action on every tensor, and the cost of the merge.

    Attributes:
        results: `{label: Planned}`: one, or those of a sweep, which share all that follows.
        base, experts, expert_specs: the checkpoints, opened, and what the recipe says of the experts.
        work: the work for the loop.
        exported: `{expert: its head tensors that are written beside the model}`.
        notes: notes for the user.
        shard_bytes, side_files: the output's.
        sums: methods are in the form whose statistic is a sum of fixed size.
        edits: `{name of a JSON side file: {key: value}}`, set in the output's copy.
        opened: `{path: source}` of base and experts as they lie, without the views that this plan takes of them.
        edits: `{name of a JSON side file: {key: value}}`: keys that are others in the output.
    """

    results: Mapping[str, Planned]
    base: Source
    experts: tuple[Source, ...]
    expert_specs: tuple[Expert, ...]
    work: Work
    exported: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    shard_bytes: int
    side_files: Mapping[str, Path]
    sums: bool = False
    opened: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    edits: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the (first) result."""
        return next(iter(self.results.values())).recipe

    @property
    def method(self) -> Method:
        """The method of the (first) result."""
        return next(iter(self.results.values())).method

    @property
    def jobs(self) -> tuple[Job, ...]:
        return self.work.jobs

    @property
    def chooses(self) -> bool:
        """Whether some tensor's method is yet to be chosen, by a look at the deltas."""
        return any(job.method.chooses for job in self.work.merged)

    @property
    def statistics(self) -> Statistics | None:
        return self.work.statistics

    @property
    def output(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Headers of the output's tensors, in the base's order."""
        headers = {
            name: (job.parameter.shape, job.dtype)
            for job in self.jobs if job.assignment.action != "skip" for name in job.writes
        }  # fmt: skip
        return {name: headers[name] for name in self.base.tensors if name in headers}

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything that decides what is written, but for versions."""
        return digest_of(self)

    @property
    def folders(self) -> tuple[Folder, ...]:
        """The folders of the output: the base's, without those that have no tensor left."""
        names = self.output
        return tuple(f for f in self.base.folders if any(name.startswith(f.prefix) for name in names))

    @property
    def bytes_to_read(self) -> int:
        return sum(job.bytes_read * (1 + len(job.sources)) for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of one result."""
        return sum(map(bytes_of, self.output.values()))

    @property
    def flops(self) -> int:
        return sum(job.flops for job in self.jobs)

    @property
    def largest(self) -> Job | None:
        """The job that needs most memory at once."""
        return max(map(self.work.by_entry, self.jobs), key=lambda job: job.working_bytes, default=None)

    @property
    def explicit_recipe(self) -> Recipe:
        """The recipe with every parameter of the method and every expert's name and weight written out.

        Models named as on the hub are named with their commits.
        """
        method, known = self.method.name, self.method.parameters
        if is_chain(self.method):
            method, known = self.recipe.method, {}
        parameters = {k: expression(v) if isinstance(v, Part) else plain_number(v) for k, v in known.items()}
        experts = [
            msgspec.structs.replace(spec, path=_pinned(spec.path, expert))
            for spec, expert in zip(self.expert_specs, self.experts, strict=True)
        ]
        base, unmerged = _pinned(self.recipe.base, self.base), self.recipe.unmerged
        if unmerged is not None and isinstance(self.base, Unmerged):
            unmerged = _pinned(unmerged, self.base.other)
        return msgspec.structs.replace(
            self.recipe, base=base, method=method, parameters=parameters, experts=experts, unmerged=unmerged
        )

    def of(self: P, label: str) -> P:
        """The plan of one result alone."""
        number = list(self.results).index(label)
        jobs = [
            dataclasses.replace(job, assignment=dataclasses.replace(job.assignment, method=methods_of(job)[number]))
            if job.assignment.action == "merge" else job
            for job in self.jobs
        ]  # fmt: skip
        work = dataclasses.replace(self.work, jobs=tuple(jobs))
        return dataclasses.replace(self, results={label: self.results[label]}, work=work)

    def counts(self) -> Counter[tuple[str, str]]:
        """The number of tensors by (kind, action)."""
        return Counter((str(job.parameter.kind), job.assignment.label) for job in self.jobs)


def _pinned(path: str, source: Source) -> str:
    """The path of a model; of one that is named as on the hub its name and commit."""
    asked, found = hub.asked(path), hub.snapshot(source.path)
    return f"{asked.repository}@{found.commit}" if asked and found and found.commit else path
