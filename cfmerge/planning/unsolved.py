"""Tensors that a matrix method does not solve, and why: notes of files, warnings of trees."""

from collections.abc import Mapping
from typing import NamedTuple

from cfmerge.methods import Method
from cfmerge.models.patterns import patterns, tell
from cfmerge.planning.assign import Assignment
from cfmerge.recipe import rule_option


class Unsolved(NamedTuple):
    """Tensors that are averaged for one reason.

    Attributes:
        glob: a pattern that a rule takes them by, or the first of them.
        layout: one that a rule might give them, as an example; empty where none would help.
    """

    names: list[str]
    why: str
    glob: str
    layout: str


def unsolved(assignments: Mapping[str, Assignment], method: Method) -> list[Unsolved]:
    """The tensors that the method does not solve, by reason: all but embeddings, heads, buffers and rules."""
    if method.needs.scope != "matrix":
        return []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, assignment in assignments.items():
        parameter = assignment.parameter
        if assignment.rule is None and assignment.action == "merge" and parameter.note:
            reasons.setdefault((parameter.note, "boi"[3 - len(parameter.shape) :]), []).append(name)
    others = [name for name, assignment in assignments.items() if not assignment.parameter.note]
    return [
        Unsolved(names, why, patterns(names, others)[0].glob, layout if _helps(why, layout) else "")
        for (why, layout), names in reasons.items()
    ]


def _helps(why: str, layout: str) -> bool:
    return "layout" in why and 2 <= len(layout) <= 3


def unsolved_notes(assignments: Mapping[str, Assignment], method: Method) -> list[str]:
    """The same as notes, with rules that can be pasted."""
    others = [name for name, assignment in assignments.items() if not assignment.parameter.note]
    return [
        f"{tell(one.names, others)}: averaged, not solved by {method.name}: {one.why}"
        + (f", such as {rule_option(one.glob, '', one.layout)}" if one.layout else "")
        for one in unsolved(assignments, method)
    ]
