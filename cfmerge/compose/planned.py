"""A composed result resolved from headers, and its directory as the loop fills it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from cfmerge import hub
from cfmerge.compose.artifact import digest_of
from cfmerge.compose.asked import check_asked, check_jobs
from cfmerge.compose.emr import PLACES, scales
from cfmerge.compose.entries import About, Entry, headers_of
from cfmerge.compose.kept import entry_of
from cfmerge.compose.sink import PartsSink
from cfmerge.compose.smile_composer import energy_rank
from cfmerge.compose.systems import changed, choice, share_of, without_lone_biases
from cfmerge.compose.table import table_of
from cfmerge.core.part import Report
from cfmerge.engine import run
from cfmerge.engine.account import Account
from cfmerge.engine.placement import Placement
from cfmerge.formats import Folder, Totals
from cfmerge.formats.base import Header
from cfmerge.formats.composed import TABLE
from cfmerge.methods import Method
from cfmerge.models import Kind, is_buffer, is_float
from cfmerge.models.patterns import tell
from cfmerge.planning.resolved import Resolved
from cfmerge.planning.work import Job
from cfmerge.products.carry_out import Writes, exported_heads
from cfmerge.products.plan import Experts, Plan, as_recipe
from cfmerge.recipe import Recipe

HEAD_KEYS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")  # of config.json, that heads need


class Artifacts:
    """What becomes of a plan whose result is not one checkpoint."""

    def sink(self, plan: Resolved, output: Path, **how: Any) -> PartsSink:
        assert isinstance(plan, ComposedPlan)
        return PartsSink(output, plan.entries, shard_bytes=plan.shard_bytes, **how)

    def totals(
        self, plan: Resolved, account: Account, digests: Mapping[Path, str], notes: Sequence[str], warned: Sequence[str]
    ) -> Totals:
        assert isinstance(plan, ComposedPlan)
        about = plan.about({name: digest_of(plan.base.read(name)) for name in plan.base.tensors})
        table = table_of(about, scales_of(account, plan.method, plan.entries, len(about.tasks)), plan.exported)
        return Totals(_card(plan, notes), exported_heads(plan), {TABLE: table})


class ComposedPlan(Plan):
    """A result that is not one checkpoint, resolved from headers; `run` makes it, see `Plan`."""

    writes: ClassVar[Writes] = Artifacts()

    @classmethod
    def made(cls, asked: Mapping[str, Recipe], statistics: Any = None, **how: Any) -> "ComposedPlan":
        plan = _without_lone_biases(super().made(asked, statistics, composing=choice, **how))
        check_jobs(plan.jobs)
        left = [job.name for job in plan.jobs if job.assignment.action == "keep-base" and _is_left(job)]
        if not left:
            return plan
        others = [job.name for job in plan.work.merged]
        note = f"{tell(left, others)}: stay as in the base in every task: {plan.method.name} keeps linear layers alone"
        return dataclasses.replace(plan, notes=(*plan.notes, f"{note} (others=mean: with the experts' mean)"))

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """`{tensor: what is kept of it}`."""
        return {job.name: entry_of(job) for job in self.work.merged}

    @property
    def output(self) -> dict[str, Header]:
        return headers_of(self.entries)

    @property
    def folders(self) -> tuple[Folder, ...]:
        return (Folder(),)

    def ready(self, memory: int | None = None, placement: Placement = run.ANYWHERE) -> "ComposedPlan":
        """The plan with the ranks that are shares settled: each is the largest that an expert of the tensor needs."""
        jobs = {job.name: job for job in self.work.jobs}
        asked = {job.name: rank for job in self.work.merged if (rank := share_of(job.method)) is not None}
        for share in set(asked.values()):
            own = tuple(dataclasses.replace(jobs[name], ranks=()) for name, rank in asked.items() if rank == share)
            work = dataclasses.replace(self.work, jobs=own)
            ranks: dict[str, int] = {}
            found = run.measure(work, energy_rank(share), memory=memory, placement=placement)
            for (name, _), each in found.items():
                ranks[name] = max(ranks.get(name, 0), *map(int, each))
            for name, rank in ranks.items():
                assignment = dataclasses.replace(jobs[name].assignment, method=changed(jobs[name].method, rank=rank))
                jobs[name] = dataclasses.replace(jobs[name], assignment=assignment)
        work = dataclasses.replace(self.work, jobs=tuple(jobs.values()))
        return dataclasses.replace(self, work=work) if asked else self

    def about(self, digests: Mapping[str, str]) -> About:
        """All of the result but its arrays, given the base's digests."""
        configs = {
            spec.name: {key: expert.config[key] for key in HEAD_KEYS if key in expert.config}
            for spec, expert in zip(self.expert_specs, self.experts, strict=True)
            if spec.name in self.exported and expert.config
        }
        recipe, size = self.explicit_recipe, sum(info.nbytes for info in self.base.tensors.values())
        return About(
            self.method.name, tuple(spec.name for spec in self.expert_specs), recipe.parameters, self.entries, digests,
            _whereabouts(recipe.base), size, configs, recipe.to_yaml(),
        )  # fmt: skip


def plan(
    base: str | Path | Recipe,
    experts: Experts = (),
    system: str | Method = "emr",
    *,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> ComposedPlan:
    """The plan of a result that is not one checkpoint, made from headers; its `run(output)` makes it.

        >>> planned = compose.plan("base", ["math", "code"], "emr")
        >>> planned.counts()["matrix", "emr"], planned.bytes_to_write
        (1, 70)

    Heads that the models do not share are kept by task, unless `heads` says otherwise.

    Args:
        base: as in `build`; or a `Recipe` whose method is a system, which says everything.
        experts, system, parameters: as in `build`.
        **options: the other fields of `Recipe`.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    recipe = base if isinstance(base, Recipe) else as_recipe(base, experts, system, parameters, options)
    check_asked(recipe)
    if recipe.heads is None:
        recipe = msgspec.structs.replace(recipe, heads="export")
    return ComposedPlan.made({"": recipe})


def _whereabouts(base: str) -> str:
    """The base so that it is found from any directory: a path in full, a name on the hub as it is."""
    return base if hub.asked(base) else str(Path(base).expanduser().absolute())


def _without_lone_biases(plan: ComposedPlan) -> ComposedPlan:
    """The plan without the biases of linear layers whose weights stay as they are, by a rule say."""
    kept = without_lone_biases({job.name: job.assignment for job in plan.work.jobs})
    jobs = tuple(dataclasses.replace(job, assignment=kept[job.name]) for job in plan.work.jobs)
    return dataclasses.replace(plan, work=dataclasses.replace(plan.work, jobs=jobs))


def _is_left(job: Job) -> bool:
    """Whether a tensor that experts may have changed is not kept, though no rule says so."""
    parameter = job.parameter
    buffer = not is_float(parameter.dtype) or is_buffer(parameter.name, parameter.shape)
    return not buffer and job.assignment.rule is None and parameter.kind is not Kind.HEAD and bool(job.experts)


def scales_of(account: Account, method: Method, entries: Mapping[str, Entry], tasks: int) -> Any:
    """Each task's number, out of what was reported of the tensors; None: the system has none."""
    if method.name != "emr":
        return None
    told = method.parameters
    reports = _by_task(account.reports_of(0), entries)
    sizes = {name: entry.size for name, entry in entries.items()}
    return scales(reports, sizes, tasks, told["scope"])


def _by_task(reports: Mapping[str, Report], entries: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """The reports, whose values are numbered by the tasks that have the tensor, by the numbers of the tasks."""
    return {
        name: {
            f"{key}[{task}]": report[f"{key}[{number}]"]
            for number, task in enumerate(entries[name].tasks) for key in PLACES if f"{key}[{number}]" in report
        }
        for name, report in reports.items()
    }  # fmt: skip


def _card(plan: ComposedPlan, notes: Sequence[str]) -> str:
    """The README.md of a composed result."""
    tasks = "\n".join(f"- {spec.name}" for spec in plan.expert_specs)
    told = "\n".join(f"- {note}" for note in (*plan.notes, *notes))
    head = f"# {plan.method.name} of {len(plan.expert_specs)} tasks"
    made = "Made by [cfmerge](https://github.com/cfmerge/cfmerge) without data and without training."
    paragraphs = [
        head,
        f"{made} It is no checkpoint: `{TABLE}` tells what the tensors are, and `cfmerge materialise . --task TASK -o "
        "MODEL` makes the model of a task.",
        f"## Tasks\n\n{tasks}",
        *([f"## Notes\n\n{told}"] if told else []),
        f"## Recipe\n\n```yaml\n{plan.explicit_recipe.to_yaml().strip()}\n```",
    ]
    return "\n\n".join(paragraphs) + "\n"
