"""A table of spaces out of the atoms of a trace: what keeps its order, what permutes within what, and names."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cfmerge.align.atoms import Atom, factors, fix, is_fixed, leaves, parts, products
from cfmerge.align.values import Facts, Origin
from cfmerge.models.layouts import Shape
from cfmerge.models.spaces import FIXED, READS, Spaces, parse_spaces

Axes = Mapping[str, tuple[Atom, ...]]


class Place(NamedTuple):
    """A product of factors on an axis of a tensor."""

    tensor: str
    axis: int
    factors: list[Atom]


def spaces_of(axes: Axes, facts: Facts) -> Spaces:
    """The spaces of tensors whose axes are these atoms."""
    for own in axes.values():
        for atom in own:
            _fix_sums_within_products(atom)
    _fix_alone(axes)
    parents = _parents(axes, facts)
    reads = facts.read - facts.looked_up
    names = _names(axes, reads, facts.looked_up, parents)
    table = {
        name: ", ".join(_text(atom, (name, i) in reads, names) for i, atom in enumerate(own))
        for name, own in axes.items()
    }
    shapes: dict[str, Shape] = {name: tuple(atom.size for atom in own) for name, own in axes.items()}
    return parse_spaces(table, shapes, {name: atom.size for atom, name in names.items()})


def _fix_sums_within_products(atom: Atom) -> None:
    """A table has products within sums, but no sums within products."""
    for part in parts(atom):
        own = factors(part)
        for factor in own if len(own) > 1 else ():
            if factor.parts:
                fix(factor, "its parts lie within an axis of more factors")


def _fix_alone(axes: Axes) -> None:
    """What lies on a single axis keeps its order: a permutation would change the model, or nothing."""
    places: dict[Atom, set[Origin]] = {}
    for name, own in axes.items():
        for i, atom in enumerate(own):
            for leaf in leaves(atom):
                places.setdefault(leaf, set()).add((name, i))
    for leaf, where in places.items():
        if len(where) == 1:
            fix(leaf, "no other axis of a tensor has it")


def _places(axes: Axes) -> list[Place]:
    return [
        Place(name, i, factors(part))
        for name, own in axes.items()
        for i, atom in enumerate(own)
        for part in parts(atom)
    ]


# --- what permutes within each element of another space -------------------------------------------------------------


def _parents(axes: Axes, facts: Facts) -> dict[Atom, Atom]:
    """The space within whose elements an atom permutes, each element by itself.

    An atom v may do so within h if every array that has v has h too, once, and every product that contracts v
    contracts h or runs along it. A table says it of one axis, where h stands in front of v; an atom that lies within
    another on axes of its own (the values of heads, in a kernel `(embed, heads, head_dim)`) is fixed, since one
    permutation for all heads would match little.
    """
    places, within = _places(axes), _always_with(facts)
    ranks = {atom: rank for rank, atom in enumerate(_free(place.factors for place in places))}
    result: dict[Atom, Atom] = {}
    for atom in ranks:
        candidates = [
            other
            for other in ranks
            if other in within.get(atom, ())
            and not other.fixed
            and (atom not in within.get(other, ()) or ranks[other] < ranks[atom])
        ]
        own = [place.factors for place in places if atom in place.factors]
        fit = [c for c in candidates if all(c in f[: f.index(atom)] for f in own) and c not in result]
        if fit:
            result[atom] = fit[0]
        elif candidates:
            fix(atom, "it lies within each element of a space on another axis")
    return result


def _free(terms: Iterable[list[Atom]]) -> list[Atom]:
    """The atoms that permute, each once."""
    return list(dict.fromkeys(atom for term in terms for atom in term if atom.parts == () and not atom.fixed))


def _always_with(facts: Facts) -> dict[Atom, set[Atom]]:
    """The atoms that each atom is always accompanied by."""
    result: dict[Atom, set[Atom]] = {}

    def meet(atoms: Iterable[Atom], term: list[Atom]) -> None:
        counts = Counter(term)
        once = {atom for atom, count in counts.items() if count == 1}
        for atom in atoms:
            others = once - {atom} if atom in once else set()
            result[atom] = result.get(atom, others) & others

    for arrays in facts.arrays.values():
        for term in _terms(arrays):
            meet(term, term)
    for inner, along in facts.contractions:
        for one in _terms(inner):
            for other in _terms(along):
                meet(one, one + other)
    return result


def _terms(atoms: Iterable[Atom]) -> list[list[Atom]]:
    """Axes multiplied out: the atoms that permute, of each term."""
    terms = itertools.product(*(products(atom) for atom in atoms))
    return [[leaf for factor in term for leaf in factor if not leaf.fixed] for term in terms]


# --- names and text -------------------------------------------------------------------------------------------------


def _names(axes: Axes, reads: set[Origin], looked_up: set[Origin], parents: Mapping[Atom, Atom]) -> dict[Atom, str]:
    """A name for each atom that permutes: that of the first layer that writes it, of an embedding if there is one."""

    def order(place: Place) -> tuple[bool, bool, bool]:
        own = (place.tensor, place.axis)
        return own in reads, own not in looked_up, len(axes[place.tensor]) < 2

    layers: dict[Atom, str] = {}
    places = _places(axes)
    for place in sorted(places, key=order):
        for atom in _free([place.factors]):
            layers.setdefault(atom, _layer(place.tensor))
    names: dict[Atom, str] = {}
    for atom in sorted(_free(place.factors for place in places), key=lambda atom: atom in parents):
        layer = layers[atom]
        plain = f"{names[parents[atom]]}.{layer.rpartition('/')[2]}" if atom in parents else layer
        taken = set(names.values())
        name = next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        names[atom] = name
    return names


def _layer(tensor: str) -> str:
    """The name of a tensor's layer, in the letters that a table has."""
    *layer, last = re.split(r"[/.]", tensor)
    name = re.sub(r"[^\w/:-]", "_", "/".join(layer) or last)
    name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
    return f"{name}_" if name == READS else name


def _text(atom: Atom, reads: bool, names: Mapping[Atom, str]) -> str:
    """An axis as a table writes it."""
    texts: list[str] = []
    for part in parts(atom):
        words: list[str] = []
        for free, run in itertools.groupby(factors(part), key=lambda factor: factor in names):
            own = list(run)
            words += [names[f] for f in own] if free else [str(math.prod(f.size for f in own))]
        if texts and texts[-1].isdigit() and words[-1].isdigit() and len(words) == 1:
            texts[-1] = str(int(texts[-1]) + int(words[0]))
        else:
            texts.append(" ".join(words))
    text = FIXED if is_fixed(atom) else " + ".join(texts)
    return f"{READS} {text}" if reads else text
