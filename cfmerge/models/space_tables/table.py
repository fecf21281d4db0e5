"""Tables of permutation spaces by the names of tensors: patterns, filled in for the tensors of one model.

    encoder.layer.{l}.attention.self.{x=query|key}.weight: heads{l} heads{l}.qk, in hidden

The first line whose pattern is a tensor's name says what its axes are. What the variables stand for is filled in on the
right; `{l+1}` is the next number, and `{head_dim}` a number that the table's sizes give. `PATTERN if OTHER` holds in
models that have a tensor of the name OTHER, or whose config names it as its model type or architecture.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.models.buffers import is_buffer
from cfmerge.models.layouts import Shape
from cfmerge.models.names.rules import Name, Values
from cfmerge.models.patterns import patterns, tell
from cfmerge.models.space_tables.sizes import evaluate
from cfmerge.models.spaces import FIXED, READS, Spaces, SpacesError, parse_spaces

FILLED = re.compile(r"\{(\w+)([+-]\d+)?\}")
LEFT_OVER = re.compile(r"[{}]")
ENDS = {False: "read by no tensor, so that it is an output", True: "written by no tensor, so that it is an input"}
OWN = (
    "a table of your own, `spaces: FILE` (see docs/align_spaces.md; `cfmerge spaces MODEL --blank` prints one to begin "
    "from)"
)


class Line(NamedTuple):
    """One line of a table.

    Attributes:
        name: the names that it holds for.
        axes: their axes as text; None where they do not permute, whatever their shape.
        where: the line, for messages.
        needs: what the model must have for it to hold.
        own: it stands in a table of the user's, where a line without a tensor is told.
    """

    name: Name
    axes: str | None
    where: str
    needs: Name | None = None
    own: bool = False

    def __str__(self) -> str:
        return f"{self.where}, `{self.name.text}: {self.axes}`"

    def values(self, name: str, present: Collection[str]) -> Values | None:
        """What the variables stand for in a tensor's name; None if the line does not hold for it."""
        values = self.name.values(name)
        if values is None or self.needs is None:
            return values
        if set(self.needs.choices) <= set(values):
            return values if self.needs.name(values) in present else None
        found = (self.needs.values(other) for other in present)
        same = (all(values.get(key, value) == value for key, value in other.items()) for other in found if other)
        return values if any(same) else None


class Described(NamedTuple):
    """The spaces of a model, the table that they are of, and what is to be told about them."""

    spaces: Spaces
    table: str
    notes: tuple[str, ...]


class Covered(NamedTuple):
    """Which line each tensor has.

    Attributes:
        lines: `{tensor: (its line, what the variables stand for)}`.
        buffers: tensors without a line, which the model computes.
        open: tensors without a line.
    """

    lines: Mapping[str, tuple[Line, Values]]
    buffers: tuple[str, ...]
    open: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """The lines of a family of models, or of one.

    Attributes:
        name: the project's, `bert`, or the file of a user's.
        lines: the first that holds for a tensor is taken.
        sizes: `{pattern of spaces: size}` of those that do not follow from shapes, as expressions of the config's keys:
            `num_key_value_heads or num_attention_heads`.
        model_types: of the configs that it is for.
        like: the name of the project's table that it is, or that the user's goes on from.
    """

    name: str
    lines: tuple[Line, ...]
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    like: str = ""

    def cover(self, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Covered:
        """The line of each tensor. A name may have a prefix that the line's has not: `bert.`, `model.`; and `/value`
        behind it, as Orbax's files of an `nnx.State` have.
        """
        prefix = self._prefix(shapes)
        short = {name: name.removeprefix(longest_start(name, prefix)) for name in shapes}
        twice = [name for name, count in Counter(short.values()).items() if count > 1]
        if twice:
            both = " and ".join(repr(name) for name, own in short.items() if own == twice[0])
            raise CfmergeError(f"spaces: {self.name}: {both} would be one tensor {twice[0]!r}; the way out: {OWN}")
        present = {*shapes, *short.values(), *(config.get("architectures") or ()), str(config.get("model_type"))}
        lines: dict[str, tuple[Line, Values]] = {}
        buffers: list[str] = []
        open_: list[str] = []
        for name, own in short.items():
            names = dict.fromkeys((name, own, own.removesuffix("/value")))
            found = ((line, line.values(other, present)) for line in self.lines for other in names)
            first = next(((line, values) for line, values in found if values is not None), None)
            if first:
                lines[name] = first
            else:
                (buffers if is_buffer(name, shapes[name]) else open_).append(name)
        return Covered(lines, tuple(buffers), tuple(open_))

    def spaces(self, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Described:
        """The spaces of a model.

        Raises:
            CfmergeError: a tensor has no line; a size is not known; a line does not fit its tensor's shape.
        """
        covered = self.cover(shapes, config)
        if covered.open:
            raise CfmergeError(
                f"spaces: {self.name} has no line for {tell(covered.open, shapes)}; a line for the first one is\n"
                f"    {covered.open[0]}: {_fixed(shapes[covered.open[0]])}\n"
                "with names of spaces in place of `-`, or `fixed: [...]` with its name if it has no neurons' axes"
                + "".join(f"\n{note.removeprefix('spaces: ')}" for note in self._unused(covered))
            )
        texts = {name: _fixed(shape) for name, shape in shapes.items()}
        for name, (line, values) in covered.lines.items():
            texts[name] = texts[name] if line.axes is None else self._filled(name, line, values, config)
        ends = _ends(texts)
        texts = {name: _without(text, ends) for name, text in texts.items()}
        words = dict.fromkeys(word for text in texts.values() for word in _words(text))
        told = {word: size for word in words if (size := self._size_of(word, config)) is not None}
        try:
            spaces = parse_spaces(texts, shapes, told)
        except SpacesError as error:
            line = covered.lines[error.tensor][0]
            raise CfmergeError(f"spaces: {line}: {str(error).removeprefix('spaces: ')}") from None
        return Described(spaces, self.name, (*_told(ends), *self._unused(covered)))

    def _prefix(self, names: Iterable[str]) -> str:
        """What stands in front of most names, in addition to the table's."""
        found: Counter[str] = Counter()
        for name in {re.sub(r"\d+", "0", name): name for name in names}.values():
            starts = ["", *(name[: dot.end()] for dot in re.finditer(r"[./]", name))]
            tails = (start for start in starts if self._any(name.removeprefix(start)))
            found[next(tails, "")] += 1
        del found[""]
        return found.most_common(1)[0][0] if found else ""

    def _any(self, name: str) -> bool:
        return any(line.name.values(name) is not None for line in self.lines)

    def _filled(self, tensor: str, line: Line, values: Values, config: Mapping[str, Any]) -> str:
        def fill(found: re.Match[str]) -> str:
            name, step = found.groups()
            if name in values and not step:
                return values[name]
            if name in values and values[name].isdigit():
                return str(int(values[name]) + int(step))
            if name in self.sizes and not step:
                return str(self._size(name, self.sizes[name], config))
            raise CfmergeError(
                f"spaces: {line}: tensor {tensor!r}: {found[0]} is neither a variable of the pattern nor a size of the "
                "table, nor such a number and a step"
            )

        filled = FILLED.sub(fill, line.axes or "")
        if LEFT_OVER.search(filled):
            raise CfmergeError(f"spaces: {line}: tensor {tensor!r}: {filled!r} has a loose brace")
        return filled

    def _size_of(self, word: str, config: Mapping[str, Any]) -> int | None:
        """The size of a space; None where the table has none for it."""
        found = (size for pattern, size in self.sizes.items() if Name(pattern).values(word) is not None)
        size = next(found, None)
        return None if size is None else self._size(word, size, config)

    def _size(self, name: str, size: str, config: Mapping[str, Any]) -> int:
        found = evaluate(size, config, f"{self.name}: the size of {name!r}")
        if found is not None:
            return found
        missing = [key for key, size in self.sizes.items() if evaluate(size, config, self.name) is None]
        raise CfmergeError(
            f"spaces: {self.name} takes the size of {name!r} from the config, as {size}, "
            + ("which does not tell it" if config else "and the model has no config.json")
            + f"; put its config.json beside the weights, or say the numbers in {OWN}, with\n"
            + (f"    like: {self.like}\n" if self.like else "")
            + "    sizes:\n"
            + "\n".join(f"      {key}: NUMBER" for key in missing)
        )

    def _unused(self, covered: Covered) -> list[str]:
        used = {(line.where, line.name.text) for line, _ in covered.lines.values()}
        lines = [line for line in self.lines if line.own and (line.where, line.name.text) not in used]
        return [f"spaces: {line.where}: {line.name.text!r} holds for no tensor" for line in lines]


def longest_start(name: str, prefix: str) -> str:
    """The longest part of a prefix, cut behind a part, that a name begins with: of `module.bert.`, also `module.`."""
    starts = [prefix[: dot.end()] for dot in re.finditer(r"[./]", prefix)]
    return max((start for start in starts if name.startswith(start)), key=len, default="")


def _fixed(shape: Shape) -> str:
    return ", ".join(FIXED for _ in shape)


def _spaced(text: str) -> str:
    return text.replace(",", " , ").replace("+", " + ")


def _without(text: str, spaces: Collection[str]) -> str:
    """The text with `-` in place of some spaces and their children."""
    return " ".join(FIXED if word.split(".")[0] in spaces else word for word in _spaced(text).split())


def _words(text: str) -> list[str]:
    """The spaces in a line's text."""
    return [word for word in _spaced(text).split() if word not in {",", "+", READS, FIXED} and not word.isdigit()]


def _ends(texts: Mapping[str, str]) -> dict[str, tuple[bool, str]]:
    """`{space: (it is read, one of its tensors)}` of spaces that no tensor writes, or that none reads."""
    places: dict[str, dict[bool, str]] = {}
    for tensor, text in texts.items():
        for axis in text.split(","):
            for word in _words(axis):
                places.setdefault(word.split(".")[0], {}).setdefault(axis.split()[0] == READS, tensor)
    return {space: next(iter(where.items())) for space, where in places.items() if len(where) == 1}


def _told(ends: Mapping[str, tuple[bool, str]]) -> list[str]:
    """A note for each pattern of spaces that end."""
    notes = []
    for reads, why in ENDS.items():
        for pattern in patterns([space for space, (read, _) in ends.items() if read == reads]):
            first, count = ends[pattern.names[0]][1], len(pattern.names)
            where = f" of {first!r}" if count == 1 else f" ({count} spaces, such as that of {first!r})"
            notes.append(f"spaces: {pattern.text!r}{where} is {why} and keeps its order")
    return notes
