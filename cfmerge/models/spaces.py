"""Permutation spaces: which axes of a model's tensors hold the same neurons, and so permute together.

A space is a set of neurons. A matrix that writes it has them as outputs, one that reads it has them as inputs; biases
and norms that act on it have them too. A residual stream is one space. A table says of each tensor what its axes are:

    fc1.weight     hidden, in -                 (hidden, inputs): a Linear of torch, which reads the model's inputs
    fc1.bias       hidden
    fc2.weight     -, in hidden

Axes are separated by commas. An axis is a product of factors, the last runs fastest: a space, a number, or `-` for what
does not permute, of whatever size. `in` says that the tensor reads this axis. So a convolution of torch is
`c2, in c1, -, -`, the dense layer behind its flattened outputs `fc, in c2 49`, and a fused projection of queries, keys
and values `3 heads 64, in hidden`. Axes that are joined end to end have a `+`: `heads 64 + kv 64 + kv 64`.

Attention permutes heads as blocks. A space may have children, which permute within each of its elements: `heads.v`
are the values within a head, and a value projection `heads heads.v, in hidden`. Keys and queries of rotary attention
keep their order: `heads 64`. Where several query heads share a key-value head, `kv kv.q 64` permutes the queries' heads
within their group, and the groups as blocks.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cfmerge.errors import CfmergeError, and_more
from cfmerge.models.layouts import Shape

WORD = re.compile(r"[A-Za-z_][\w/:-]*(\.[\w/:-]+)?")
FIXED = "-"
READS = "in"


class SpacesError(CfmergeError):
    """A line of a table that does not fit its tensor, called `tensor`."""

    def __init__(self, tensor: str, message: str):
        super().__init__(f"spaces: {message}")
        self.tensor = tensor


class Factor(NamedTuple):
    """One factor of an axis: `size` elements of a space, or of a space's child, or that do not permute (`space` "").

    `name` is the space's, and `parent` that of the space within whose elements a child permutes.
    """

    size: int
    name: str = ""

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return self.name or str(self.size)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a tensor: parts that lie end to end, each a product of factors whose last one runs fastest."""

    parts: tuple[tuple[Factor, ...], ...]
    reads: bool = False

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces on it, children among them, each once."""
        return tuple(dict.fromkeys(factor.name for part in self.parts for factor in part if factor.name))

    @property
    def size(self) -> int:
        return sum(math.prod(factor.size for factor in part) for part in self.parts)

    def __str__(self) -> str:
        parts = " + ".join(" ".join(map(str, part)) for part in self.parts)
        return f"{READS} {parts}" if self.reads else parts if self.spaces else FIXED


class Use(NamedTuple):
    """A place where a space occurs: an axis of a tensor."""

    tensor: str
    axis: int


@dataclasses.dataclass(frozen=True, repr=False)
class Spaces:
    """The permutation spaces of a model.

        >>> shapes = {"fc1.weight": (8, 3), "fc1.bias": (8,), "fc2.weight": (2, 8)}
        >>> table = {"fc1.weight": "hidden, in -", "fc1.bias": "hidden", "fc2.weight": "-, in hidden"}
        >>> spaces = cfmerge.align.parse_spaces(table, shapes)
        >>> spaces.sizes, spaces.uses("hidden")[0]
        ({'hidden': 8}, Use(tensor='fc1.weight', axis=0))

    Attributes:
        axes: `{tensor: its axes}`, of all tensors of the model.
        sizes: `{space: number of elements}`; of a child, in each element of its space.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    sizes: Mapping[str, int]

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return f"<Spaces of {len(self.axes)} tensors: {told or 'nothing permutes'}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The spaces without their children, in the order of the table."""
        return tuple(name for name in self.sizes if "." not in name)

    def children(self, space: str) -> tuple[str, ...]:
        """The names of a space's children."""
        return tuple(name for name in self.sizes if name.rpartition(".")[0] == space)

    def uses(self, space: str) -> tuple[Use, ...]:
        """Where a space or one of its children occurs."""
        names = {space, *self.children(space)}
        return tuple(
            Use(tensor, number)
            for tensor, axes in self.axes.items()
            for number, axis in enumerate(axes)
            if names.intersection(axis.spaces)
        )

    def table(self) -> dict[str, str]:
        """The table as text: `parse_spaces` reads it."""
        return {tensor: ", ".join(map(str, axes)) for tensor, axes in self.axes.items()}


def parse_spaces(table: Mapping[str, str], shapes: Mapping[str, Shape], sizes: Mapping[str, int] = {}) -> Spaces:
    """The spaces that a table describes, checked against the tensors' shapes.

    Args:
        table: `{tensor: its axes as text}`, a line for every tensor.
        shapes: of the model's tensors.
        sizes: of spaces whose size does not follow from the shapes: `{"heads": 12}`.

    Raises:
        CfmergeError: a tensor without a line, or a line without its tensor; an axis whose size is not the product of
            its factors; a size that does not follow; a space that occurs once, which would change what the model does.
    """
    missing, unknown = [n for n in shapes if n not in table], [n for n in table if n not in shapes]
    if missing or unknown:
        raise CfmergeError(
            f"spaces: no line for tensor {and_more(missing)}; one that does not permute has `-` for each axis"
            if missing
            else f"spaces: the model has no tensor {and_more(unknown)}, for which the table has a line"
        )
    drafts = {name: _axes_of(name, text, shapes[name]) for name, text in table.items()}
    known = _solved(drafts, shapes, dict(sizes))
    order = dict.fromkeys(word for axes in drafts.values() for axis in axes for word in axis.words)
    axes = {
        name: tuple(draft.axis(name, number, length, known)
                    for number, (draft, length) in enumerate(zip(own, shapes[name], strict=True)))
        for name, own in drafts.items()
    }  # fmt: skip
    spaces = Spaces(axes, {name: known[name] for name in sorted(order, key=lambda name: "." in name)})
    _check_used(spaces)
    return spaces


class _Draft(NamedTuple):
    """An axis as text: parts of words."""

    text: str
    parts: tuple[tuple[str, ...], ...]
    reads: bool

    @property
    def words(self) -> list[str]:
        return [word for part in self.parts for word in part if word != FIXED and not word.isdigit()]

    def unknown(self, known: Mapping[str, int]) -> list[str]:
        return [word for part in self.parts for word in part if not word.isdigit() and word not in known]

    def rest(self, length: int, known: Mapping[str, int]) -> int | None:
        """The size of the only unknown factor; None if the axis leaves no whole number for it."""
        for part in self.parts:
            if open_ := [word for word in part if not word.isdigit() and word not in known]:
                own = math.prod(_size(word, known) for word in part if word not in open_)
                length -= sum(math.prod(_size(w, known) for w in other) for other in self.parts if other is not part)
                return length // own if own and length > 0 and length % own == 0 else None
        return None

    def axis(self, tensor: str, number: int, length: int, known: Mapping[str, int]) -> Axis:
        if len(self.unknown(known)) == 1 and (rest := self.rest(length, known)):
            known = {**known, FIXED: rest}
        parts = tuple(
            tuple(Factor(_size(w, known), "" if w == FIXED or w.isdigit() else w) for w in part)
            for part in self.parts
        ) if not self.unknown(known) else ()  # fmt: skip
        axis = Axis(parts, self.reads)
        if axis.size != length:
            factors = " ".join(f"{word}={known[word]}" for word in dict.fromkeys(self.words) if word in known)
            raise SpacesError(
                tensor,
                f"tensor {tensor!r}: axis {number} has {length} elements, and the table {self.text!r}"
                + (f" where {factors}" if factors else ""),
            )
        for part in axis.parts:
            for place, factor in enumerate(part):
                if factor.parent and factor.parent not in [other.name for other in part[:place]]:
                    raise SpacesError(
                        tensor,
                        f"tensor {tensor!r}: axis {number}, {self.text!r}: {factor.name!r} permutes within the "
                        f"elements of {factor.parent!r}, which must stand in front of it",
                    )
        return axis


def _size(word: str, known: Mapping[str, int]) -> int:
    return int(word) if word.isdigit() else known[word]


def _axes_of(tensor: str, text: str, shape: Shape) -> tuple[_Draft, ...]:
    """The axes of one line."""
    drafts = []
    for axis in text.split(",") if text.strip() else []:
        words = axis.split()
        reads = words[:1] == [READS]
        parts = tuple(tuple(part.split()) for part in " ".join(words[reads:]).split("+"))
        wrong = [w for part in parts for w in part or ["+"] if w != FIXED and not w.isdigit() and not WORD.fullmatch(w)]
        if wrong or READS in words[1:]:
            raise SpacesError(
                tensor,
                f"tensor {tensor!r}: {axis.strip()!r} is no axis: write spaces, numbers and `-`, with `in` in "
                "front of an axis that the tensor reads, and `+` between what is joined: 'in heads 64 + kv 64'",
            )
        drafts.append(_Draft(" ".join(words), parts, reads))
    if len(drafts) != len(shape):
        raise SpacesError(tensor, f"tensor {tensor!r}: {text!r} has {len(drafts)} axes, the tensor the shape {shape}")
    return tuple(drafts)


def _solved(
    drafts: Mapping[str, Sequence[_Draft]], shapes: Mapping[str, Shape], known: dict[str, int]
) -> Mapping[str, int]:
    """The sizes of all spaces: an axis with one unknown factor gives it, until none is left."""
    pending = [
        (name, number, axis) for name, axes in drafts.items() for number, axis in enumerate(axes) if axis.unknown(known)
    ]
    while pending:
        left = []
        for name, number, axis in pending:
            unknown = axis.unknown(known)
            if len(unknown) == 1 and unknown[0] != FIXED:
                rest = axis.rest(shapes[name][number], known)
                if rest is None:
                    axis.axis(name, number, shapes[name][number], {**known, unknown[0]: 1})
                    raise SpacesError(name, f"tensor {name!r}: axis {number}: no size for {unknown[0]!r}")
                known[unknown[0]] = rest
            elif set(unknown) - {FIXED} or len(unknown) > 1:
                left.append((name, number, axis))
        if len(left) == len(pending):
            name, number, axis = left[0]
            raise SpacesError(
                name,
                f"tensor {name!r}: axis {number}, {axis.text!r} of {shapes[name][number]} elements: the sizes "
                f"of {' and '.join(map(repr, axis.unknown(known)))} do not follow from the shapes; give one of them",
            )
        pending = left
    return known


def _check_used(spaces: Spaces) -> None:
    places: dict[str, list[str]] = {}
    for tensor, axes in spaces.axes.items():
        for name in (name for axis in axes for name in axis.spaces):
            places.setdefault(name, []).append(tensor)
    for name, tensors in places.items():
        if len(tensors) == 1:
            raise SpacesError(
                tensors[0],
                f"{name!r} is on one axis alone, of tensor {tensors[0]!r}; a permutation of it would change "
                "what the model does: name it also where it is written or read, or write `-`",
            )


def same_spaces(shapes: Mapping[str, Shape], others: Mapping[str, Shape], who: str, other: str) -> None:
    """Raises `CfmergeError` unless two models have the same tensors with the same number of axes."""
    missing: Iterable[str] = [name for name in shapes if name not in others]
    added = [name for name in others if name not in shapes]
    if missing or added:
        lacks = and_more(list(missing)) if missing else and_more(added)
        raise CfmergeError(
            f"{other if missing else who}: has no tensor {lacks}, which {who if missing else other} has: "
            "models that are aligned have one architecture"
        )
