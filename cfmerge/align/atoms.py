"""Axes as products and sums of atoms, which are split and joined while a model is traced.

An atom is a set of elements. It permutes as a whole, or is fixed, or has been split: into factors, whose last runs
fastest (a reshape of 768 to 12 x 64), or into parts that lie end to end (queries, keys and values of one projection).
Atoms that are joined permute together. All that happens to an atom holds everywhere: the more a model does with an
axis, the fewer permutations are left. Whatever cannot be followed is fixed, which is always right.
"""

import itertools
import math
from collections.abc import Iterator, Sequence


class Atom:
    """Some of the elements of an axis.

    Attributes:
        size: the number of elements, two at least.
        fixed: why it keeps its order; empty if it may permute.
        factors, parts: what it has been split into, if at all.
    """

    __slots__ = ("factors", "fixed", "joined", "parts", "size")

    def __init__(self, size: int, fixed: str = "", factors: Sequence["Atom"] = (), parts: Sequence["Atom"] = ()):
        self.size, self.fixed, self.factors, self.parts = size, fixed, tuple(factors), tuple(parts)
        self.joined: Atom | None = None

    @property
    def whole(self) -> bool:
        return not (self.factors or self.parts)


def found(atom: Atom) -> Atom:
    """The atom that stands for all that it has been joined to."""
    while atom.joined is not None:
        if atom.joined.joined is not None:
            atom.joined = atom.joined.joined
        atom = atom.joined
    return atom


def product(factors: Sequence[Atom]) -> Atom:
    return factors[0] if len(factors) == 1 else Atom(math.prod(f.size for f in factors), factors=factors)


def joined_parts(parts: Sequence[Atom]) -> Atom:
    return parts[0] if len(parts) == 1 else Atom(sum(p.size for p in parts), parts=parts)


def factors(atom: Atom) -> list[Atom]:
    """Its factors, none of which has factors itself."""
    atom = found(atom)
    return [f for factor in atom.factors for f in factors(factor)] if atom.factors else [atom]


def parts(atom: Atom) -> list[Atom]:
    """Its parts, none of which has parts itself."""
    atom = found(atom)
    return [p for part in atom.parts for p in parts(part)] if atom.parts else [atom]


def products(atom: Atom) -> list[list[Atom]]:
    """Its parts, each as factors that are whole; a sum within a product is multiplied out."""
    atom = found(atom)
    if atom.parts:
        return [term for part in atom.parts for term in products(part)]
    if atom.factors:
        terms = itertools.product(*(products(factor) for factor in atom.factors))
        return [[leaf for factor in term for leaf in factor] for term in terms]
    return [[atom]]


def leaves(atom: Atom) -> Iterator[Atom]:
    """The whole atoms in it."""
    atom = found(atom)
    if atom.whole:
        yield atom
    for inner in (*atom.factors, *atom.parts):
        yield from leaves(inner)


def is_fixed(atom: Atom) -> bool:
    return all(leaf.fixed for leaf in leaves(atom))


def fix(atom: Atom, why: str) -> None:
    """From now on it keeps its order."""
    for leaf in leaves(atom):
        leaf.fixed = leaf.fixed or why


def first_factor(atom: Atom, size: int) -> None:
    """Splits an atom without factors into two; the first has `size` elements. A sum cannot be: it is fixed first."""
    if atom.parts:
        fix(atom, "parts that are joined are reshaped")
        atom.fixed, atom.parts = next(leaves(atom)).fixed, ()
    atom.factors = (Atom(size, atom.fixed), Atom(atom.size // size, atom.fixed))


def refactored(atoms: Sequence[Atom], sizes: Sequence[int]) -> list[Atom]:
    """One atom for each size of a reshape, all above 1, of the same product."""
    rest = [f for atom in atoms for f in factors(atom)]
    result: list[Atom] = []
    for number, size in enumerate(sizes):
        own: list[Atom] = []
        while size > 1:
            rest[:1] = factors(rest[0])
            head = rest[0]
            if size % head.size == 0:
                own.append(rest.pop(0))
                size //= head.size
            elif head.size % size == 0:
                first_factor(head, size)
            else:
                for atom in (*own, *rest):
                    fix(atom, f"a reshape to {sizes[number]} does not keep its factors apart")
                return result + [Atom(s, "behind a reshape that mixes axes") for s in sizes[number:]]
        result.append(product(own))
    return result


def join(a: Atom, b: Atom) -> None:
    """Both permute together from now on; they have the same size."""
    a, b = found(a), found(b)
    if a is b:
        return
    if b.whole and not a.whole:
        a, b = b, a
    if a.whole:
        if a.fixed:
            fix(b, a.fixed)
        elif b.whole:
            b.fixed = b.fixed or a.fixed
    elif a.factors and b.factors:
        _join_factors(a, b)
    elif a.parts and b.parts:
        _join_parts(a, b)
    else:
        _join_parts_with_factors(*((a, b) if a.parts else (b, a)))
    a, b = found(a), found(b)
    if a is not b:
        a.joined = b


def _join_factors(a: Atom, b: Atom) -> None:
    left, right = factors(a), factors(b)
    while left:
        left[:1], right[:1] = factors(left[0]), factors(right[0])
        one, other = left[0], right[0]
        if one.size == other.size:
            join(one, other)
            left, right = left[1:], right[1:]
        elif one.size % other.size == 0:
            first_factor(one, other.size)
        elif other.size % one.size == 0:
            first_factor(other, one.size)
        else:
            for atom in (*left, *right):
                fix(atom, f"it meets an axis of other factors ({one.size} and {other.size})")
            return


def _join_parts(a: Atom, b: Atom) -> None:
    left, right = parts(a), parts(b)
    while left:
        left[:1], right[:1] = parts(left[0]), parts(right[0])
        one, other = left[0], right[0]
        if one.size == other.size:
            join(one, other)
            left, right = left[1:], right[1:]
        elif one.size > other.size:
            left[:1] = _cut(one, other.size)
        else:
            right[:1] = _cut(other, one.size)


def _join_parts_with_factors(a: Atom, b: Atom) -> None:
    """Parts of equal size are the elements of a first factor."""
    pieces, (head, *rest) = parts(a), factors(b)
    if len(pieces) == head.size and len({piece.size for piece in pieces}) == 1:
        fix(head, "its elements are parts that are told apart")
        for piece in pieces:
            join(piece, product(rest))
    else:
        for atom in (a, b):
            fix(atom, "it meets an axis whose parts lie end to end")


def _cut(atom: Atom, size: int) -> list[Atom]:
    return [between(atom, 0, size), between(atom, size, atom.size)]


def between(atom: Atom, start: int, stop: int) -> Atom:
    """The elements from `start` up to `stop`, two at least or all of them."""
    atom = found(atom)
    if (start, stop) == (0, atom.size):
        return atom
    if atom.parts:
        inner, offset = [], 0
        for part in parts(atom):
            low, high = max(start - offset, 0), min(stop - offset, part.size)
            if low < high:
                inner.append(between(part, low, high) if high - low > 1 else _one(part))
            offset += part.size
        return joined_parts(inner)
    if atom.fixed:
        return Atom(stop - start, atom.fixed)
    if atom.whole:
        sizes = [size for size in (start, stop - start, atom.size - stop) if size]
        atom.parts = tuple(Atom(size, "" if size > 1 else "a single element") for size in sizes)
        return atom.parts[1 if start else 0]
    head, *rest = factors(atom)
    inside = atom.size // head.size
    if start % inside == 0 and stop % inside == 0:
        fix(head, "some of its elements are taken")
        count = (stop - start) // inside
        return product([Atom(count, "some elements of an axis"), *rest] if count > 1 else rest)
    fix(atom, "some of its elements are taken")
    return Atom(stop - start, "some elements of an axis")


def _one(part: Atom) -> Atom:
    """A single element of a part, which thereby keeps its order."""
    fix(part, "a single element of it is taken")
    return Atom(1, "a single element")
