"""The parts of a page, as data: sections of notices, facts, tables, figures and texts.

Texts are plain; between backticks stands code. Nothing in them is HTML but a panel's drawing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

Grade = Literal["grave", "warning", "note", "fact", "good"]


@dataclasses.dataclass(frozen=True)
class Notice:
    """A sentence that readers must not miss, and how grave it is; `label` stands in front of it."""

    grade: Grade
    text: str
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Heat:
    """A number in a cell that is coloured by its share of the range, from 0 to 1; of a negative one in another hue."""

    text: str
    share: float


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number drawn as a dot with its interval: places from 0 to 1 along the cell, the ends None where unknown."""

    text: str
    at: float
    low: float | None = None
    high: float | None = None


Cell = str | Heat | Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first `left` columns are texts, the others numbers. A folded one opens on a click."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    folded: bool = False
    strong: frozenset[int] = frozenset()  # the numbers of rows that stand out


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks that open on a click."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values, as a list."""

    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Code:
    """A text to copy."""

    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A drawing (an SVG element), its title, and its width in pixels."""

    title: str
    svg: str
    width: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """Drawings of one kind, with a legend by series number, a caption, and the numbers as a table."""

    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, int]] = ()
    table: Table | None = None


Block = Notice | Table | Fold | Facts | Code | Prose | Items | Figure


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page under its own heading."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        kind: what it is, in two or three words, above the title.
        lead: a sentence below the title.
        foot: the last line.
    """

    kind: str
    title: str
    lead: str
    sections: Sequence[Section]
    foot: str = ""
