"""Rules between two namings of a model's tensors: a name for a name, and how the tensor's axes are rearranged.

    model.layers.{l}.self_attn.q_proj.weight <-> layers/{l}/attn/q_proj/w : (n h) d -> d n h

A rule is read in both directions. `{l}` is a number, `{x=key|value}` one of some words, `[bert.]` may be there or not;
what they stand for is the same on both sides. Axes are written as einops writes them. An axis on the right that is a
number or word of the left name stacks tensors: `{e}` and `f d -> e d f` make one tensor of all experts, its first axis.
Nothing is computed: a rule renames, transposes, reshapes and stacks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.models.layouts import Shape

Values = Mapping[str, str]
PIECES = re.compile(r"\{(\w+)(?:=([^}]*))?\}|\[([^\]]*)\]")


class Name:
    """A pattern of names, such as `layers/{l}/attn/{x=q|k|v}_proj/w`.

    Args:
        text: the pattern.
        known: words of variables that another pattern lists.
    """

    def __init__(self, text: str, known: Mapping[str, tuple[str, ...]] | None = None):
        self.text = text
        self.choices: dict[str, tuple[str, ...]] = {}  # {variable: its words}; no words: a number
        pattern, end = "", 0
        for piece in PIECES.finditer(text):
            variable, words, optional = piece.groups()
            pattern += re.escape(text[end : piece.start()])
            end = piece.end()
            if variable is None:
                pattern += f"(?P<_optional>{re.escape(optional)})?"
            elif variable in self.choices:
                pattern += f"(?P={variable})"
            else:
                self.choices[variable] = tuple(words.split("|")) if words else (known or {}).get(variable, ())
                options = "|".join(map(re.escape, self.choices[variable])) or r"0|[1-9][0-9]*"
                pattern += f"(?P<{variable}>{options})"
        self._pattern = re.compile(pattern + re.escape(text[end:]))

    def values(self, name: str) -> Values | None:
        """What the variables stand for in a name; None if it is not one of these."""
        found = self._pattern.fullmatch(name)
        return None if found is None else {key: value or "" for key, value in found.groupdict().items()}

    def name(self, values: Values) -> str:
        def filled(piece: re.Match[str]) -> str:
            variable, _, optional = piece.groups()
            return values[variable] if variable else (optional if values.get("_optional") else "")

        return PIECES.sub(filled, self.text)


Groups = tuple[tuple[str, ...], ...]  # the axes of a tensor, each a product of lettered ones


def _groups(text: str) -> Groups:
    return tuple(tuple((inside or letter).split()) for inside, letter in re.findall(r"\(([^)]*)\)|(\w+)", text))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table. `axes` None: the tensor is the same on both sides, whatever its shape."""

    left: Name
    right: Name
    axes: tuple[Groups, Groups] | None = None

    @property
    def stacked(self) -> str | None:
        """The variable of the left name that is an axis on the right."""
        if self.axes is None:
            return None
        left, right = ({letter for group in side for letter in group} for side in self.axes)
        return next(iter(right - left), None)

    def view(self, forward: bool) -> tuple[Groups, Groups] | None:
        """The axes of one tensor of the left, and the same without the stacked one, in the order of reading."""
        if self.axes is None:
            return None
        left, right = self.axes
        right = right[1:] if self.stacked else right
        return (left, right) if forward else (right, left)


class Rearranged(NamedTuple):
    """`tensor.reshape(split).transpose(order)`, and the shape in which it is stored then."""

    split: Shape
    order: tuple[int, ...]
    shape: Shape

    @property
    def in_order(self) -> bool:
        """Whether the entries stay in their order, so that the tensor is copied as it lies."""
        moved = [axis for axis in self.order if self.split[axis] != 1]
        return moved == sorted(moved)

    @property
    def shortest(self) -> tuple[Shape, tuple[int, ...]]:
        """`split` and `order` with as few axes as can be: axes that stay side by side are one."""
        runs: list[list[int]] = []
        for axis in (axis for axis in self.order if self.split[axis] != 1):
            last = runs[-1][-1] if runs else None
            beside = last is not None and axis > last and all(size == 1 for size in self.split[last + 1 : axis])
            runs[-1].append(axis) if beside else runs.append([axis])
        places = sorted(run[0] for run in runs)
        sizes = {run[0]: math.prod(self.split[axis] for axis in run) for run in runs}
        return tuple(sizes[place] for place in places), tuple(places.index(run[0]) for run in runs)


def rearranged(view: tuple[Groups, Groups] | None, shape: Shape, sizes: Mapping[str, int]) -> Rearranged:
    """How a tensor of a shape is rearranged.

    Args:
        view: its axes, and those that it gets.
        sizes: the sizes of axes that the config tells.

    Raises:
        CfmergeError: the shape does not fit; the message is what was expected.
    """
    if view is None:
        return Rearranged(shape, tuple(range(len(shape))), shape)
    before, after = view
    found: dict[str, int] = {}
    fits = len(before) == len(shape)
    for group, size in zip(before, shape, strict=False):
        unknown = [letter for letter in group if letter not in sizes]
        known = math.prod(sizes[letter] for letter in group if letter in sizes)
        fits &= len(unknown) <= 1 and size % max(known, 1) == 0 and (bool(unknown) or size == known)
        found |= {letter: sizes[letter] for letter in group if letter in sizes}
        found |= {letter: size // max(known, 1) for letter in unknown}
    if not fits:
        told = ", ".join(f"{letter} = {sizes[letter]}" for group in before for letter in group if letter in sizes)
        raise CfmergeError(f"expected {written(before)}{f' with {told}' if told else ''}, found {shape}")
    letters = [letter for group in before for letter in group]
    order = tuple(letters.index(letter) for group in after for letter in group)
    split = tuple(found[letter] for letter in letters)
    return Rearranged(split, order, tuple(math.prod(found[letter] for letter in group) for group in after))


def written(groups: Groups) -> str:
    """Axes as text: `(n h) d`."""
    return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in groups) or "a number"


def table(text: str) -> tuple[Rule, ...]:
    """The rules in a text, one a line: `LEFT <-> RIGHT`, and `: AXES -> AXES` where they change."""
    rules = []
    for line in filter(None, map(str.strip, text.splitlines())):
        names, _, axes = line.partition(" : ")
        left, right = map(str.strip, names.split("<->"))
        before, _, after = axes.partition("->")
        sides = (_groups(before), _groups(after)) if axes else None
        rules.append(Rule(Name(left), Name(right, Name(left).choices), sides))
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class Family:
    """The two namings of a family of models, Hugging Face's on the left.

    Attributes:
        right: whose names those on the right are.
        rules: of all tensors.
        sizes: `{axis: key of the config}` of the axes that are products in one of the shapes; `head_dim` and the number
            of key-value heads may be missing in a config.
        spellings: `{old: new}` last parts of names on the left, which are read and not written.
        alike: the rules of models whose queries have as many heads as their keys (`n` = `k`), where these are others.
    """

    right: str
    rules: tuple[Rule, ...]
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    alike: tuple[Rule, ...] = ()

    def of_sizes(self, sizes: Mapping[str, int]) -> "Family":
        """The family with the rules that hold for a model of these sizes."""
        alike = self.alike and sizes["n"] == sizes["k"]
        return dataclasses.replace(self, rules=self.alike) if alike else self

    def rule_for(self, name: str, forward: bool) -> tuple[Rule, Values] | None:
        """The rule of a name on the left (`forward`) or on the right, and what its variables stand for."""
        return _rule_for(self.rules, name, forward)

    def fitting(self, names: Sequence[str], forward: bool) -> int:
        return sum(self.rule_for(name, forward) is not None for name in names)


@functools.lru_cache(1 << 16)
def _rule_for(rules: tuple[Rule, ...], name: str, forward: bool) -> tuple[Rule, Values] | None:
    for rule in rules:
        values = (rule.left if forward else rule.right).values(name)
        if values is not None:
            return rule, values
    return None
