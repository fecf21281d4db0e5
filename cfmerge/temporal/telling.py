"""What the next models of a store will be made of, from headers alone: `Time.plan`."""

import dataclasses
from typing import Any, Literal

from cfmerge.core.expressions import expression
from cfmerge.errors import CfmergeError
from cfmerge.formats.base import bytes_of
from cfmerge.products.plan import make_plan
from cfmerge.temporal.coefficients import coefficients, step
from cfmerge.temporal.merging import Part, recipe_of
from cfmerge.temporal.rules import All, Base, Ema, Last, Paint, Rule
from cfmerge.temporal.states import SUM, kind_of, reads, state_of
from cfmerge.temporal.store import Store

COUNTED = range(2, 9)  # numbers of experts at which it is tried whether a running model follows
KINDS = {
    "sum": "a running model, a weighted sum",
    "pairs": "a running model, merged with each expert in turn",
    "running": "a running model",
    "statistics": "statistics that experts are added to",
    "experts": "a merge of all experts at once",
    "none": "no merge of several experts",
}


@dataclasses.dataclass(frozen=True)
class Told:
    """How the next model of an axis is made.

    Attributes:
        axis, rule: "init" or "deploy", and the rule's text.
        kind: what is kept between steps, see `states.py`.
        reads: the tasks whose experts are read, beside the base and the running model.
        experts: how many the rule sees.
        steady: time and memory of a step do not grow with the number of tasks.
        bytes_read: of the tensors of the next step.
        memory: bytes that the next step will need; None where there is nothing to merge.
        note: a sentence for the user.
    """

    axis: Literal["init", "deploy"]
    rule: str
    kind: str
    reads: tuple[str, ...]
    experts: int
    steady: bool
    bytes_read: int
    memory: int | None
    note: str

    def summary(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self) | {"reads": list(self.reads)}


def told(store: Store, axis: Literal["init", "deploy"], rule: Rule) -> Told:
    """How the next model of an axis is made, from headers alone."""
    kind, read = kind_of(store, rule), reads(store, rule)
    steady = is_steady(store, rule)
    paths = [Part(one.key, store.readable(one)) for one in read]
    state = state_of(store, rule)
    if state is not None and state.path and kind != "statistics":
        paths.append(Part("running", str(store.where(state.path))))
    model = sum(bytes_of((info.shape, info.dtype)) for info in store.base.tensors.values())
    memory = None
    if paths and not isinstance(rule, Base | Last):
        method = SUM if kind == "sum" else expression(rule.method)
        plan = make_plan(recipe_of(store, paths, method, running=True), sums=kind == "statistics")
        memory = round(plan.prediction(calibrate=False).memory)
    return Told(
        axis, rule.text, kind, tuple(one.task for one in read), len(store.experts), steady,
        model * (1 + len(paths)), memory, _note(store, rule, kind, len(read), steady),
    )  # fmt: skip


def _note(store: Store, rule: Rule, kind: str, count: int, steady: bool) -> str:
    if isinstance(rule, Base):
        return "the base, every time"
    if isinstance(rule, Last | Paint):
        return "the newest expert alone is read"
    if steady:
        window = f", and the one that leaves the window of {store.book.window}" if store.book.window else ""
        return f"{KINDS[kind]}: each new expert is read once{window}; a step costs the same however many tasks come"
    seen = f"the {store.book.window} experts in the window" if store.book.window else "all experts"
    again = "they are merged at once" if kind == "experts" else "the running model does not follow, and is made anew"
    return f"every step reads {seen}, {count} now: {again}; its time, and its memory, grow with their number"


def is_steady(store: Store, rule: Rule) -> bool:
    """Whether a step of the rule reads a number of experts that does not depend on how many have come."""
    kind, window = kind_of(store, rule), store.book.window
    if kind in {"none", "statistics"}:
        return True
    if kind in {"pairs", "running"}:
        return window is None
    return kind == "sum" and all(_follows(rule, count, window) for count in COUNTED if count > (window or 0))


def _follows(rule: Rule, count: int, window: int | None) -> bool:
    """Whether a weighted sum follows one more expert without those that stay."""
    assert isinstance(rule, Ema | All)
    numbers = list(range(1, count + 2))
    before, after = numbers[:-1][-(window or count) :], numbers[-(window or count + 1) :]
    kept, wanted = coefficients(rule, before), coefficients(rule, after)
    assert kept is not None
    assert wanted is not None
    changed = {count + 1, *before} - {*after} | {count + 1} | ({after[0]} if window else set())
    taken = step(kept, wanted, changed)
    return set(taken.experts) <= changed


def check_keep(store: Store, rule: Rule) -> None:
    """Raises `CfmergeError` where a rule needs experts that would not be kept."""
    keep, window = store.book.keep, store.book.window
    if keep is None or isinstance(rule, Base | Last | Paint):
        return
    if window is not None and keep >= window:
        return
    if window is not None or not is_steady(store, rule):
        what = f"the {window} experts in the window" if window is not None else "experts that came long before"
        raise CfmergeError(
            f"time: keep={keep} lets go of older experts, and {rule.text} reads {what}; leave keep out, or choose a "
            "rule with a running model, such as ema(weight=0.5)"
        )
