"""The card of a model that is merged over time: the rule, and the experts that it stands for."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cfmerge.engine.account import Account
from cfmerge.formats import Totals
from cfmerge.planning.resolved import Resolved
from cfmerge.products.carry_out import Models, Writes, exported_heads
from cfmerge.products.plan import Plan
from cfmerge.report.card import card, table


@dataclasses.dataclass(frozen=True)
class OverTime:
    """What a card tells: the rule's text; the experts' steps and tasks, oldest first; their weights, if it has any."""

    rule: str
    experts: Sequence[tuple[int, str]]
    weights: Mapping[int, float] = dataclasses.field(default_factory=dict)


class _Served(Models):
    def totals(
        self, plan: Resolved, account: Account, digests: Mapping[Path, str], notes: Sequence[str], warned: Sequence[str]
    ) -> Totals:
        assert isinstance(plan, ServedPlan)
        return Totals(_card(plan, notes, warned), exported_heads(plan))


@dataclasses.dataclass(frozen=True)
class ServedPlan(Plan):
    """A plan whose model is a step of merging over time."""

    writes: ClassVar[Writes] = _Served()
    told: OverTime = OverTime("", ())


def served(plan: Plan, told: OverTime) -> ServedPlan:
    """The plan, of which the model's card tells the rule and the experts."""
    return ServedPlan(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}, told=told)


def _card(plan: ServedPlan, notes: Sequence[str], warned: Sequence[str]) -> str:
    told = plan.told
    rows = [(number, task, format(told.weights.get(number, 0.0), ".4g")) for number, task in told.experts]
    experts = table("step", "expert", "weight", rows=rows) if told.weights else table(
        "step", "expert", rows=told.experts
    )  # fmt: skip
    return card(
        plan,
        f"A merge over time of {len(told.experts)} expert{'s' if len(told.experts) != 1 else ''}",
        f"The experts came one after another; the rule is **{told.rule}**: see Dziadzio et al., How to Merge Your "
        "Multimodal Models Over Time?, CVPR 2025, arXiv 2412.06712.",
        {
            "Experts": f"{experts}\n\nThe oldest first. `cfmerge time deploy STORE` makes the model again.",
            "Notes": "\n".join(f"- {note}" for note in (*plan.notes, *notes)),
        },
        models=[plan.base],
        tags=["time"],
        warnings=warned,
    )
