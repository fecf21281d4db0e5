"""Arrays of a trace: the atoms along their axes, and what a trace finds beside these."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cfmerge.align.atoms import Atom, fix, join

Origin = tuple[str, int]  # a tensor of the model, and its axis


class Along(NamedTuple):
    """One axis of an array: its atom, None if the array is constant along it; the tensors' axes that it comes from."""

    atom: Atom | None = None
    origins: frozenset[Origin] = frozenset()


class Value(NamedTuple):
    """An array of a trace. `data` says that it depends on the model's inputs; origins are of other arrays alone."""

    axes: tuple[Along, ...]
    data: bool = False


class Facts:
    """What a trace finds, beside the atoms.

    Attributes:
        read: axes of tensors that are contracted.
        looked_up: axes of tensors that remain where rows of them are looked up.
        arrays: the axes of all arrays.
        contractions: the contracted axes of each product, and those that run along in both its operands.
    """

    def __init__(self) -> None:
        self.read: set[Origin] = set()
        self.looked_up: set[Origin] = set()
        self.arrays: dict[tuple[int, ...], tuple[Atom, ...]] = {}
        self.contractions: list[tuple[list[Atom], list[Atom]]] = []

    def note(self, value: Value) -> None:
        atoms = tuple(axis.atom for axis in value.axes if axis.atom is not None)
        self.arrays[tuple(map(id, atoms))] = atoms

    def reads(self, left: Along, right: Along) -> None:
        self.read |= right.origins or left.origins


Rule = Callable[[Facts, Any, Sequence[Value]], list[Value]]


def fixed(size: int, why: str) -> Along:
    return Along(Atom(size, why) if size > 1 else None)


def fix_axis(axis: Along, why: str) -> None:
    if axis.atom is not None:
        fix(axis.atom, why)


def fix_all(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of a primitive that is not known, or not followed."""
    why = f"`{equation.primitive.name}` is not followed"
    for axis in itertools.chain.from_iterable(value.axes for value in operands):
        fix_axis(axis, why)
    data = any(value.data for value in operands)
    return [Value(tuple(fixed(n, why) for n in shape(out)), data) for out in equation.outvars]


def shape(variable: Any) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))


def meet(axes: Sequence[Along]) -> Along:
    """One axis of several arrays that are combined entry by entry."""
    atoms = [axis.atom for axis in axes if axis.atom is not None]
    for atom in atoms[1:]:
        join(atoms[0], atom)
    return Along(atoms[0] if atoms else None, frozenset().union(*(axis.origins for axis in axes)))


def result(axes: Sequence[Along], operands: Sequence[Value]) -> Value:
    """An array made of the operands; one of data comes from no tensor."""
    data = any(value.data for value in operands)
    return Value(tuple(Along(axis.atom) for axis in axes) if data else tuple(axes), data)
