"""`build`: a composed result out of a base and its experts, on disk or in memory, by the loop that merges."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import msgspec

from cfmerge.compose.artifact import About, Artifact, digest_of, headers_of, load, table_of
from cfmerge.compose.entries import PACKED, Entry
from cfmerge.compose.sink import PartsSink
from cfmerge.compose.systems import choice
from cfmerge.core.call import Call, call_of, of_expert
from cfmerge.core.part import Composer, Context
from cfmerge.engine.account import Account
from cfmerge.engine.placement import Devices
from cfmerge.errors import CfmergeError
from cfmerge.formats import Folder, Totals
from cfmerge.formats.base import Header
from cfmerge.formats.composed import TABLE
from cfmerge.methods import Method
from cfmerge.models import Kind, is_buffer, is_float
from cfmerge.models.patterns import tell
from cfmerge.planning.resolved import Resolved
from cfmerge.planning.work import Job, Progress
from cfmerge.products.carry_out import Writes, exported_heads
from cfmerge.products.plan import Plan, as_recipe
from cfmerge.products.processes import together
from cfmerge.recipe import Recipe
from cfmerge.report.result import MergeResult

HEAD_KEYS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")  # of config.json, that heads need


class Artifacts:
    """What becomes of a plan whose result is not one checkpoint."""

    def sink(
        self,
        plan: Resolved,
        output: Path,
        overwrite: bool,
        inputs: Sequence[Path],
        digest: str,
        fresh: bool,
        join: bool,
    ) -> PartsSink:
        assert isinstance(plan, ComposedPlan)
        return PartsSink(
            output, plan.entries, shard_bytes=plan.shard_bytes, overwrite=overwrite, inputs=inputs, digest=digest,
            resume=not fresh, join=join,
        )  # fmt: skip

    def totals(
        self, plan: Resolved, account: Account, digests: Mapping[Path, str], notes: Sequence[str], warned: Sequence[str]
    ) -> Totals:
        assert isinstance(plan, ComposedPlan)
        about = plan.about({name: digest_of(plan.base.read(name)) for name in plan.base.tensors})
        table = table_of(about, scales_of(account), plan.exported)
        return Totals(_card(plan, notes), exported_heads(plan), {TABLE: table})


class ComposedPlan(Plan):
    """A result that is not one checkpoint, resolved from headers; `run` makes it, see `Plan`."""

    writes: ClassVar[Writes] = Artifacts()

    @classmethod
    def made(cls, asked: Mapping[str, Recipe], statistics: Any = None, **how: Any) -> "ComposedPlan":
        plan = super().made(asked, statistics, composing=choice, **how)
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

    def about(self, digests: Mapping[str, str]) -> About:
        """All of the result but its arrays, given the base's digests."""
        configs = {
            spec.name: {key: expert.config[key] for key in HEAD_KEYS if key in expert.config}
            for spec, expert in zip(self.expert_specs, self.experts, strict=True)
            if spec.name in self.exported and expert.config
        }
        recipe = self.explicit_recipe
        return About(
            self.method.name, tuple(spec.name for spec in self.expert_specs), recipe.parameters, self.entries, digests,
            recipe.base, sum(info.nbytes for info in self.base.tensors.values()), configs, recipe.to_yaml(),
        )  # fmt: skip


def build(
    base: Any,
    experts: Any,
    system: str | Method,
    *,
    output: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    rules: Sequence[Any] = (),
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
    **options: Any,
) -> Artifact:
    """A result that is not one checkpoint: `emr`, `tall`, `tsv_c` or `smile`.

        >>> made = compose.build("base", ["math", "code"], "tsv_c", output="composed")
        >>> made.system, made.tasks, made.parts["layer.weight"]["up"].shape
        ('tsv_c', ('math', 'code'), (2, 4, 1))

    Args:
        base, experts: checkpoints on disk, as for `cfmerge.merge`, which are streamed; or pytrees, as for
            `cfmerge.merge_params`.
        system: its name, or text such as `"smile(rank=32, gate=16)"`.
        output: for checkpoints, the directory to make. It appears when it is complete.
        parameters: of a system that is given by its name.
        rules: as in a recipe; a rule may say `keep-base`, a layout, or a system with other parameters.
        overwrite, memory, devices, progress, fresh: as for `cfmerge.merge`; for checkpoints.
        **options: the other fields of `Recipe`; for checkpoints.

    Raises:
        CfmergeError: bad input; nothing is written then.
    """
    if not isinstance(base, str | Path):
        if output is not None:
            raise CfmergeError("build of pytrees: the result is returned; its `save(directory)` writes it")
        from cfmerge.compose.trees import build_trees

        return build_trees(base, experts, system, parameters, rules)
    if output is None:
        raise CfmergeError("build of checkpoints: name a directory for the result with output=")
    recipe = as_recipe(base, experts, system, parameters, {"rules": rules, **options})
    how: Any = {"overwrite": overwrite, "memory": memory, "devices": devices, "progress": progress, "fresh": fresh}
    build_recipe(recipe, output, **how)
    return load(output)


def build_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    memory: str | int | None = None,
    devices: Devices = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> MergeResult:
    """The result of a recipe whose method is a system, written; see `build`."""
    with together(output, devices) as where:
        made = plan(recipe)
        return made.run(output, overwrite=overwrite, memory=memory, devices=where, progress=progress, fresh=fresh)  # type: ignore[no-any-return]


def plan(recipe: Recipe) -> ComposedPlan:
    """The plan of a recipe whose method is a system, made from headers. Heads that are not shared are kept by task."""
    if recipe.heads is None:
        recipe = msgspec.structs.replace(recipe, heads="export")
    return ComposedPlan.made({"": recipe})


def _is_left(job: Job) -> bool:
    """Whether a tensor that experts may have changed is not kept, though no rule says so."""
    parameter = job.parameter
    buffer = not is_float(parameter.dtype) or is_buffer(parameter.name, parameter.shape)
    return not buffer and job.assignment.rule is None and parameter.kind is not Kind.HEAD and bool(job.experts)


def scales_of(account: Account) -> Any:
    """Each task's number, out of what the surveys found; None: the system has none."""
    found = [one.model for one in account.found.values() if one is not None]
    return found[0] if found else None


# --- what is kept of a tensor ------------------------------------------------------------------------------------
def entry_of(job: Job) -> Entry:
    """What the job's composer keeps of its tensor."""
    by_entry = job.method.needs.scope == "entry"
    parameter = job.parameter
    shape = parameter.shape if by_entry else job.seen_shape
    layout = "" if by_entry else parameter.layout
    values, structure = jax.tree.flatten(call_of(of_expert(job.method, 0)))
    kept = _kept(structure, len(values), shape, len(job.experts))
    stacked = tuple(size for size, at in zip(parameter.shape, layout, strict=False) if at == "b")
    lead = (math.prod(stacked),) if stacked else ()

    def header(leaf: Any) -> Header:
        if leaf.dtype == bool:
            return (leaf.shape[0], -(-parameter.size // 8)), PACKED
        return (*lead, *leaf.shape), job.dtype

    own = {part: header(leaf) for part, leaf in kept.items()}
    return Entry(parameter.shape, parameter.dtype, layout, own, by_entry, job.experts, job.writes[1:])


@functools.lru_cache(maxsize=1024)
def _kept(structure: Any, numbers: int, shape: tuple[int, ...], experts: int) -> Mapping[str, Any]:
    call: Call = jax.tree.unflatten(structure, [0.5] * numbers)
    return _parts(call.part(), shape, experts)


def _parts(composer: Composer, shape: tuple[int, ...], experts: int) -> Mapping[str, Any]:
    """The parts that a composer makes of tensors of a shape, as shapes."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32)

    def made(base: jax.Array, delta: jax.Array) -> Any:
        statistic = composer.init(base)
        for number in range(experts):
            statistic = composer.see(statistic, delta, 1.0, Context(number=number))
        return composer.solve(statistic)[0]

    return jax.eval_shape(made, array, array)  # type: ignore[no-any-return]


def _card(plan: ComposedPlan, notes: Sequence[str]) -> str:
    """The README.md of a composed result."""
    tasks = "\n".join(f"- {spec.name}" for spec in plan.expert_specs)
    told = "\n".join(f"- {note}" for note in (*plan.notes, *notes))
    head = f"# {plan.method.name} of {len(plan.expert_specs)} tasks"
    made = (
        "Made by [cfmerge](https://github.com/cfmerge/cfmerge) without data and without training. It is no checkpoint:"
    )
    paragraphs = [
        head,
        f"{made} It is no checkpoint: `{TABLE}` tells what the tensors are, and `cfmerge materialise . --task TASK -o "
        "MODEL` makes the model of a task.",
        f"## Tasks\n\n{tasks}",
        *([f"## Notes\n\n{told}"] if told else []),
        f"## Recipe\n\n```yaml\n{plan.explicit_recipe.to_yaml().strip()}\n```",
    ]
    return "\n\n".join(paragraphs) + "\n"
