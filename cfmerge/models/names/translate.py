"""A model's headers in another naming: the tensors that it has there, and how each is made of those that it has."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.models.buffers import is_buffer
from cfmerge.models.layouts import Shape
from cfmerge.models.names.rules import Family, Rearranged, Rule, Values, rearranged
from cfmerge.models.patterns import tell

Headers = Mapping[str, tuple[Shape, np.dtype]]


class Move(NamedTuple):
    """A tensor of the source, or so many flat entries of it, that becomes entries of `target` from `at` on."""

    source: str
    target: str
    how: Rearranged
    first: int = 0
    entries: int | None = None  # none: all of them
    at: int = 0


class Translation(NamedTuple):
    """`forward`: from Hugging Face's names to the family's others."""

    headers: dict[str, tuple[Shape, np.dtype]]
    moves: list[Move]
    forward: bool = True
    notes: tuple[str, ...] = ()


class Found(NamedTuple):
    """A tensor of the source and its rule."""

    name: str
    rule: Rule
    values: Values


def unchanged(headers: Headers) -> Translation:
    """The same names: every tensor is copied as it lies."""
    moves = [Move(name, name, rearranged(None, shape, {})) for name, (shape, _) in headers.items()]
    return Translation(dict(headers), moves)


def translate(
    headers: Headers,
    family: Family,
    sizes: Mapping[str, int],
    again: Callable[[str], str | None] = lambda name: None,
    others: Mapping[str, Family] | None = None,
) -> Translation:
    """The model in the other naming of its family; its names tell in which of the two it is.

    Args:
        headers: `{name: (shape, dtype)}`.
        sizes: of the family's axes, see `sizes_of`.
        again: the tensor that holds the same bytes as the one of this name, where a model ties the two; or None.
        others: families by name, which an error suggests.

    Raises:
        CfmergeError: names without a rule, shapes that do not fit, stacks with gaps; all of them in one message.
    """
    family = family.of_sizes(sizes)
    spelt, notes = _spelt(list(headers), family)
    forward = spelt is None
    names = {name: name for name in headers} if spelt is None else spelt
    notes = [] if forward else notes
    found, unknown, left_out = [], [], defaultdict[str, list[str]](list)
    for name, plain in names.items():
        rule = family.rule_for(plain, forward)
        if rule is None and forward:
            rule = family.rule_for(_new_spelling(plain, family), forward)
            if rule:
                left_out["old spelling, written as " + ", ".join(family.spellings.values())].append(name)
        if rule:
            found.append(Found(name, *rule))
        elif forward and is_buffer(name, headers[name][0]):
            left_out["left out: the model computes it itself"].append(name)
        elif same := again(name):
            left_out[f"left out: it is tied to {same} and has the same bytes"].append(name)
        else:
            unknown.append(name)
    if unknown:
        raise CfmergeError(_no_rule(unknown, headers, family, others or {}))
    made, problems = _moved(found, headers, sizes, forward)
    if problems:
        raise CfmergeError("; ".join(problems))
    notes += [f"{tell(names)}: {what}" for what, names in left_out.items()]
    return made._replace(forward=forward, notes=tuple(notes))


def _spelt(names: Sequence[str], family: Family) -> tuple[dict[str, str] | None, list[str]]:
    """`{name: the name in the table}` where the names are those of the right, and notes; None if of the left."""
    plain, notes = list(names), []
    if not any("/" in name for name in names):
        plain = [name.replace(".", "/") for name in plain]
    if all(name.endswith("/value") for name in plain):
        plain = [name.removesuffix("/value") for name in plain]
        notes.append("all names end in 'value', as a saved nnx.State has them; it is left out")
    while len({name.split("/")[0] for name in plain}) == 1 and plain[0].startswith(("params/", "model/")):
        notes.append(f"all names begin with {plain[0].split('/')[0] + '/'!r}; it is left out")
        plain = [name.partition("/")[2] for name in plain]
    left = [_new_spelling(name, family) for name in names]
    if family.fitting(left, True) >= family.fitting(plain, False):
        return None, []
    return dict(zip(names, plain, strict=True)), notes


def _new_spelling(name: str, family: Family) -> str:
    module, dot, leaf = name.rpartition(".")
    return module + dot + family.spellings.get(leaf, leaf)


def _no_rule(unknown: Sequence[str], headers: Headers, family: Family, others: Mapping[str, Family]) -> str:
    text = f"no rule between Hugging Face's names and {family.right}'s for {tell(unknown, among=headers)}"
    fitting = {key: max(other.fitting(list(headers), way) for way in (True, False)) for key, other in others.items()}
    best = max(fitting, key=lambda key: fitting[key], default=None)
    if best and fitting[best] > len(headers) - len(unknown):
        return f"{text}; --names {best} has rules for {fitting[best]} of {len(headers)} tensors"
    return f"{text}; leave --names out to keep all names, or take these tensors out of the model"


def _moved(
    found: Iterable[Found], headers: Headers, sizes: Mapping[str, int], forward: bool
) -> tuple[Translation, list[str]]:
    """What is made of the tensors, and all problems."""
    made = Translation({}, [])
    misfits: dict[str, list[str]] = defaultdict(list)
    stacks: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        if one.rule.stacked and forward:
            stacks[one.rule.right.name(one.values)].append(one)
            continue
        try:
            (_split if one.rule.stacked else _single)(one, headers, sizes, forward, made)
        except CfmergeError as error:
            misfits[str(error)].append(one.name)
    for target, members in stacks.items():
        try:
            _stack(target, members, headers, sizes, made)
        except CfmergeError as error:
            misfits[str(error)].append(target)
    return made, [f"{tell(names, among=headers)}: {what}" for what, names in misfits.items()]


def _add(made: Translation, target: str, shape: Shape, dtype: np.dtype) -> None:
    if target in made.headers:
        raise CfmergeError(f"another tensor becomes {target} too; take one of them out of the model")
    made.headers[target] = (shape, dtype)


def _single(one: Found, headers: Headers, sizes: Mapping[str, int], forward: bool, made: Translation) -> None:
    shape, dtype = headers[one.name]
    how = rearranged(one.rule.view(forward), shape, sizes)
    target = (one.rule.right if forward else one.rule.left).name(one.values)
    _add(made, target, how.shape, dtype)
    made.moves.append(Move(one.name, target, how))


def _stack(
    target: str, members: Sequence[Found], headers: Headers, sizes: Mapping[str, int], made: Translation
) -> None:
    """One tensor of several: each is a run of its entries."""
    rule = members[0].rule
    variable = str(rule.stacked)
    words = rule.left.choices[variable] or tuple(map(str, range(len(members))))
    by_word = {one.values[variable]: one for one in members}
    missing = [rule.left.name({**members[0].values, variable: word}) for word in words if word not in by_word]
    if missing:
        raise CfmergeError(f"is stacked of {len(words)} tensors, and {', '.join(missing[:3])} is missing")
    if len({headers[one.name] for one in members}) > 1:
        raise CfmergeError("is stacked of tensors that differ in shape or dtype")
    shape, dtype = headers[members[0].name]
    how = rearranged(rule.view(True), shape, sizes)
    _add(made, target, (len(words), *how.shape), dtype)
    size = math.prod(shape)
    made.moves.extend(Move(by_word[word].name, target, how, at=n * size) for n, word in enumerate(words))


def _split(one: Found, headers: Headers, sizes: Mapping[str, int], forward: bool, made: Translation) -> None:
    """The tensors that one is stacked of."""
    (count, *rest), dtype = headers[one.name][0] or (0,), headers[one.name][1]
    words = one.rule.left.choices[str(one.rule.stacked)] or tuple(map(str, range(count)))
    if len(words) != count:
        raise CfmergeError(f"expected {len(words)} stacked tensors ({', '.join(words)}), found {headers[one.name][0]}")
    how, size = rearranged(one.rule.view(forward), tuple(rest), sizes), math.prod(rest)
    for number, word in enumerate(words):
        target = one.rule.left.name({**one.values, str(one.rule.stacked): word})
        _add(made, target, how.shape, dtype)
        made.moves.append(Move(one.name, target, how, first=number * size, entries=size))
