"""The flow of data through a model's spaces: what is zipped up to a space, and what stays each model's own.

A tensor that reads a space and writes another is an edge between them. The zipped spaces are all in front of the one
where the zip stops, and itself; a residual stream and the blocks that read and write it are in front of each other.

    trunk   tensors that write a zipped space: all models share them
    heads   the others: each model keeps its own
"""

from collections.abc import Sequence
from typing import NamedTuple

from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.spaces import Spaces


class Flow(NamedTuple):
    """How a model is divided where a zip stops.

    Attributes:
        zipped: the spaces that are zipped, in the order of the table.
        trunk: the tensors that the models share.
        plain: those of the trunk that have no space, and so are averaged as they are.
        heads: the tensors that stay each model's.
    """

    zipped: tuple[str, ...]
    trunk: tuple[str, ...]
    plain: tuple[str, ...]
    heads: tuple[str, ...]


def reads(spaces: Spaces, tensor: str) -> set[str]:
    """The spaces that a tensor reads; of a child, the space within whose elements it is."""
    return {_outer(name) for axis in spaces.axes[tensor] if axis.reads for name in axis.spaces}


def writes(spaces: Spaces, tensor: str) -> set[str]:
    """The spaces that a tensor writes: also by a bias, or the scale of a norm."""
    return {_outer(name) for axis in spaces.axes[tensor] if not axis.reads for name in axis.spaces}


def divided(spaces: Spaces, stop_at: str | Sequence[str] | None) -> Flow:
    """A model's tensors divided into trunk and heads.

    Args:
        spaces: of the model.
        stop_at: the last space that is zipped, or some; None: all are.

    Raises:
        CfmergeError: there is no such space.
    """
    zipped = set(in_front_of(spaces, stop_at))
    role = {}
    for name in spaces.axes:
        if reads(spaces, name) or writes(spaces, name):
            role[name] = "trunk" if writes(spaces, name) & zipped else "heads"
    plain = {name for name in spaces.axes if name not in role and _beside(name, role) == "trunk"}
    trunk = tuple(name for name in spaces.axes if role.get(name) == "trunk" or name in plain)
    heads = tuple(name for name in spaces.axes if name not in set(trunk))
    order = tuple(name for name in spaces.names if name in zipped)
    return Flow(order, trunk, tuple(name for name in trunk if name in plain), heads)


def in_front_of(spaces: Spaces, stop_at: str | Sequence[str] | None) -> tuple[str, ...]:
    """The spaces from which data flow into some, these among them; all where there are none.

    Raises:
        CfmergeError: there is no such space, or none is named.
    """
    if stop_at is None:
        return spaces.names
    found = [stop_at] if isinstance(stop_at, str) else list(stop_at)
    if not found:
        raise CfmergeError(f"stop_at: no space is named{nearest('', spaces.names)}; None zips all of them")
    for name in found:
        if name not in spaces.names:
            raise CfmergeError(f"stop_at: there is no space {name!r}{nearest(name, spaces.names)}")
    edges = [(reads(spaces, tensor), writes(spaces, tensor)) for tensor in spaces.axes]
    known = set(found)
    for space in found:  # which grows
        for sources, targets in edges:
            if space in targets:
                found += sources - known
                known |= sources
    return tuple(name for name in spaces.names if name in known)


def _beside(name: str, role: dict[str, str]) -> str:
    """The part that a tensor without spaces goes to: that of its module's other tensors, or of the module around it.

    The heads, where these are in both parts: nothing that a head may have learned for itself is averaged.
    """
    prefix = name
    while prefix:
        cut = max(prefix.rfind("."), prefix.rfind("/"))
        prefix = prefix[: max(cut, 0)]
        found = {part for other, part in role.items() if other.startswith(name[: len(prefix) + 1] if prefix else "")}
        if found:
            return "trunk" if found == {"trunk"} else "heads"
    return "heads"


def _outer(name: str) -> str:
    return name.partition(".")[0]
