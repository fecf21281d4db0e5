"""Which kernels read which spaces, and the features of a space out of a kernel's inputs."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from cfmerge.errors import CfmergeError, and_more
from cfmerge.models.spaces import Axis, Factor, Spaces

Part = tuple[Factor, ...]


class Block(NamedTuple):
    """Inputs of a kernel from `first` on, an array of `sizes`; and spaces, with the axes of each and its children."""

    first: int
    sizes: tuple[int, ...]
    spaces: tuple[tuple[str, tuple[int, ...]], ...]


Lines = dict[str, tuple[Block, ...]]  # {kernel: what its inputs are}


def lines_of(params: Mapping[str, Any], spaces: Spaces, match: str | Sequence[str]) -> Lines:
    """`{kernel: its line}` of the kernels that read a space which is wanted."""
    wanted, prefix = _wanted(spaces, match), prefix_of(params, spaces)
    lines: Lines = {}
    for name, leaf in params.items():
        tensor = prefix + name
        _check_shape(name, tuple(leaf.shape), tensor, spaces)
        parts = _parts(tensor, [axis for axis in spaces.axes[tensor] if axis.reads])
        if blocks := _blocks(parts, wanted):
            lines[name] = blocks
    read = spaces_in(lines.values())
    if match == "*":  # heads whose elements within are read by no tensor together have no features
        wanted = {name: children for name, children in wanted.items() if name in read or not children}
    if unread := [_whole(name, wanted) for name in wanted if name not in read]:
        rest = [name for name in wanted if name in read]
        raise CfmergeError(f"joint moments: no tensor reads space {and_more(unread)}; leave it out: match={rest}")
    return lines


def _wanted(spaces: Spaces, match: str | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`{space: its children}`."""
    patterns = [match] if isinstance(match, str) else match
    found = [name for name in spaces.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise CfmergeError(f"joint moments: no space matches {match!r}; there is: {', '.join(spaces.names)}")
    return {name: spaces.children(name) for name in found}


def _whole(space: str, wanted: Mapping[str, tuple[str, ...]]) -> str:
    children = wanted[space]
    return f"{space!r}" + (f" together with its children {', '.join(children)}" if children else "")


def prefix_of(params: Mapping[str, Any], spaces: Spaces) -> str:
    """What stands before the names of parameters in the table of the spaces.

    Raises:
        CfmergeError: the table has no line for a parameter.
    """
    first = next(iter(params))
    found = [tensor.removesuffix(first) for tensor in spaces.axes if tensor.endswith(first)]
    missing = {prefix: [name for name in params if prefix + name not in spaces.axes] for prefix in found or [""]}
    best = min(missing, key=lambda prefix: len(missing[prefix]))
    if missing[best]:
        raise CfmergeError(
            f"the spaces have no line for parameter {and_more([repr(n) for n in missing[best]])}; their "
            f"tensors are {and_more([repr(name) for name in spaces.axes])}: are they those of this model?"
        )
    return best


def _check_shape(name: str, shape: tuple[int, ...], tensor: str, spaces: Spaces) -> None:
    expected = tuple(axis.size for axis in spaces.axes[tensor])
    if shape != expected:
        raise CfmergeError(
            f"joint moments: parameter {name!r} has shape {shape}, and {expected} in the spaces, where it is "
            f"{spaces.table()[tensor]!r}; models of other widths have spaces of their own: spaces=[of_a, of_b]"
        )


def _parts(tensor: str, reads: Sequence[Axis]) -> tuple[Part, ...]:
    """The inputs of a kernel, whose axes that read are one behind the other."""
    if not reads:
        return ()
    first, *others = reads
    if any(len(axis.parts) > 1 for axis in others):
        raise CfmergeError(f"joint moments: tensor {tensor!r}: only the first axis that it reads may have parts (`+`)")
    inner = tuple(factor for axis in others for factor in axis.parts[0])
    return tuple(part + inner for part in first.parts)


def _blocks(parts: Sequence[Part], wanted: Mapping[str, tuple[str, ...]]) -> tuple[Block, ...]:
    """The parts that hold a space with all of its children."""
    blocks, first = [], 0
    for part in parts:
        names = [factor.name for factor in part]
        found = {space: (space, *children) for space, children in wanted.items() if {space, *children} <= set(names)}
        own = tuple((space, tuple(map(names.index, whole))) for space, whole in found.items())
        blocks += [Block(first, tuple(factor.size for factor in part), own)] if own else []
        first += math.prod(factor.size for factor in part)
    return tuple(blocks)


def spaces_in(lines: Iterable[Sequence[Block]]) -> set[str]:
    """The spaces that are read."""
    return {space for blocks in lines for block in blocks for space, _ in block.spaces}


def features_of(rows: Any, blocks: Sequence[Block]) -> dict[str, list[Any]]:
    """`{space: arrays (tokens, elements)}` out of a kernel's inputs `(tokens, width)`; other axes count as tokens."""
    found: dict[str, list[Any]] = {}
    for block in blocks:
        end = block.first + math.prod(block.sizes)
        values = rows[:, block.first : end].reshape(-1, *block.sizes)
        for space, places in block.spaces:
            last = jnp.moveaxis(values, [place + 1 for place in places], range(-len(places), 0))
            found.setdefault(space, []).append(last.reshape(-1, math.prod(block.sizes[place] for place in places)))
    return found
