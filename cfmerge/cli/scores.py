"""Scores by task, as the command line takes them: texts, a table in JSON or CSV."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError


def by_name(texts: Sequence[str]) -> dict[str, float]:
    """`{task: score}` of texts `TASK=SCORE`."""
    found = {}
    for text in texts:
        name, separator, value = text.rpartition("=")
        if not separator or not name.strip():
            raise CfmergeError(f"--score {text!r}: write TASK=SCORE, such as --score cars=0.81")
        found[name.strip()] = _number(value, f"--score {text!r}")
    return found


def table(path: Path) -> dict[str, float]:
    """`{task: score}` of a file: an object of JSON, or two columns of CSV, with or without a head."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CfmergeError(f"scores {path}: cannot be read: {error}") from None
    if text.lstrip()[:1] in {"{", "["}:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise CfmergeError(f"scores {path}: is not valid JSON: {error}") from None
        if not isinstance(content, Mapping):
            raise CfmergeError(f"scores {path}: expected an object {{task: score}}, found a list")
        return {str(name): _number(value, f"scores {path}: {name!r}") for name, value in content.items()}
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    if any(len(row) != 2 for row in rows):
        raise CfmergeError(
            f"scores {path}: expected two columns, task and score; found {next(r for r in rows if len(r) != 2)}"
        )
    if rows and not _is_number(rows[0][1]):
        rows = rows[1:]
    twice = [row[0] for number, row in enumerate(rows) if row[0] in [other[0] for other in rows[:number]]]
    if twice:
        raise CfmergeError(f"scores {path}: {twice[0]!r} stands there twice")
    return {row[0].strip(): _number(row[1], f"scores {path}: {row[0]!r}") for row in rows}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        raise CfmergeError(f"{where}: expected a number, found {value!r}")
    return float(value)
