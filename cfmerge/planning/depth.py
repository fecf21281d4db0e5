"""Numbers that differ by tensor: depth in the network, and a method settled for one tensor."""

import fnmatch
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from cfmerge.core.call import call_of, identity, settle
from cfmerge.core.numbers import Place, settle_number
from cfmerge.errors import and_more
from cfmerge.models.layers import LAYER
from cfmerge.planning.assign import Assignment


def depths_of(assignments: Mapping[str, Assignment]) -> dict[str, float | None]:
    """`{name: depth}`; a tensor that stacks the layers of the model has none: a number in its name is not theirs."""
    known = depths(name for name, assignment in assignments.items() if not assignment.parameter.scanned)
    return {name: known.get(name) for name in assignments}


def depths(names: Iterable[str]) -> dict[str, float | None]:
    """`{name: depth}`: layer l of L has depth l / (L - 1), a tensor outside the layers has none.

    A tensor's layer is the first number among its name's parts; the layers that count are those that share what
    stands before the number (`encoder.layer.`, `decoder.layer.`). With a single layer its depth is 0.
    """
    found = {name: LAYER.search(name) for name in names}
    counts: dict[str, set[int]] = {}
    for name, match in found.items():
        if match:
            counts.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    ranks = {stem: {layer: rank for rank, layer in enumerate(sorted(layers))} for stem, layers in counts.items()}

    def depth(name: str, match: re.Match[str] | None) -> float | None:
        if not match:
            return None
        layers = ranks[name[: match.start(1)]]
        return layers[int(match[1])] / max(len(layers) - 1, 1)

    return {name: depth(name, match) for name, match in found.items()}


def place(name: str, depth: float | None, experts: Sequence[str]) -> Place:
    return Place(name, depth, tuple(experts), fnmatch.fnmatchcase)


def same_for_stacked_layers(
    assignments: Mapping[str, Assignment],
    depth_of: Mapping[str, float | None],
    weights: Sequence[Any],
    experts: Sequence[str],
) -> list[str]:
    """A note on tensors that stack layers which would have other numbers if each were a tensor."""

    def numbers_at(assignment: Assignment, depth: float) -> Hashable:
        where = place(assignment.parameter.name, depth, experts)
        settled = call_of(settle(assignment.method, where))
        return identity((settled, [weight_at(weight, where, "") for weight in weights]))

    def varies(name: str, assignment: Assignment) -> bool:
        layers = assignment.parameter.canonical[0] if assignment.parameter.layout else 1
        if assignment.action != "merge" or layers == 1 or depth_of[name] is not None:
            return False
        return len({numbers_at(assignment, layer / (layers - 1)) for layer in range(layers)}) > 1

    told = [name for name, assignment in assignments.items() if varies(name, assignment)]
    said = "layers stacked in one tensor cannot have different numbers; all get those of the first layer"
    return [f"{and_more(told)}: {said}"] if told else []


def weight_at(value: Any, where: Place, expert: str) -> Any:
    """An expert's weight for one tensor: a number (it may be traced), a gradient over depth, or values by name."""
    return settle_number(value, where, f"expert {expert!r}: its weight")
