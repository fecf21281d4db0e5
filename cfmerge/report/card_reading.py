"""A model card that cfmerge wrote, read back: what it tells beside the recipe, which `cfmerge.recipe.load` reads."""

import re
from typing import NamedTuple


class FileRow(NamedTuple):
    """A file of the table of inputs."""

    role: str
    weight: str
    file: str
    digest: str


class Card(NamedTuple):
    """All that a card tells but for the recipe.

    Attributes:
        about: what the method is, and its source.
        counts: `(kind, what, tensors)`.
    """

    about: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    counts: tuple[tuple[str, str, int], ...]
    inputs: tuple[FileRow, ...]
    versions: str


def read_card(text: str) -> Card:
    """The card in the text of a README.md; parts that are not there are empty."""
    body = re.sub(r"^---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    top, *rest = re.split(r"^## ", body, flags=re.MULTILINE)
    sections = {title: content.strip() for title, _, content in (part.partition("\n") for part in rest)}
    about = re.search(r"^Method: \*\*.*?\*\*\.\s*(.*)$", top, re.MULTILINE)
    counts = tuple((kind, what, int(count)) for kind, what, count in _rows(sections.get("What was done", ""), 3))
    inputs = tuple(FileRow(role, weight, file, digest.strip("`")) for role, weight, file, digest in _rows(
        sections.get("Inputs", ""), 4
    ))  # fmt: skip
    notes = sections.get("Notes", "")
    return Card(
        about[1].strip() if about else "",
        tuple(_quoted(top)),
        tuple(note.strip() for note in re.split(r"^- ", notes, flags=re.MULTILINE) if note.strip()),
        counts,
        inputs,
        sections.get("Versions", "").strip(),
    )


def _rows(text: str, columns: int) -> list[list[str]]:
    """The rows of a table in Markdown, without its head."""
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")][2:]
    return [row for row in rows if len(row) == columns]


def cells(line: str) -> list[str]:
    r"""The cells of a table's line, in which a bar within a cell is escaped.

    >>> cells(r"| a | b\|c |")
    ['a', 'b|c']
    """
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _quoted(text: str) -> list[str]:
    """The warnings: quotes that begin with `> **Warning.**`."""
    quotes = re.findall(r"(?:^>.*\n?)+", text, re.MULTILINE)
    plain = [re.sub(r"^> ?", "", quote, flags=re.MULTILINE) for quote in quotes]
    begin = "**Warning.** "
    return [one.removeprefix(begin).replace("\n\n", "\n").strip() for one in plain if one.startswith(begin)]
