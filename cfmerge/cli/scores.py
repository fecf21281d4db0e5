"""Scores by task, as the command line takes them: texts, a table in JSON or CSV."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError

MISSING = {"", "-", "na", "n/a", "nan", "none", "null", "missing"}  # scores that are not there
LONG = 80  # characters of a value in a message


def by_name(texts: Sequence[str]) -> dict[str, float]:
    """`{task: score}` of texts `TASK=SCORE`."""
    found: dict[str, float] = {}
    for text in texts:
        name, separator, value = text.rpartition("=")
        if not separator or not name.strip():
            raise CfmergeError(f"--score {text!r}: write TASK=SCORE, such as --score cars=0.81")
        if name.strip() in found:
            raise CfmergeError(f"--score {text!r}: {name.strip()!r} has a score already")
        found[name.strip()] = _number(value, f"--score {text!r}")
    return found


def table(path: Path) -> dict[str, float]:
    """`{task: score}` of a file: an object of JSON, or two columns of CSV, with or without a head."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CfmergeError(f"scores {path}: cannot be read: {error}") from None
    if text.lstrip()[:1] in {"{", "["}:
        return _of_json(text, path)
    return _of_csv(text, path)


def _of_json(text: str, path: Path) -> dict[str, float]:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        _check_once([name for name, _ in pairs], path)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CfmergeError(f"scores {path}: is not valid JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise CfmergeError(f"scores {path}: expected an object {{task: score}}, found a list")
    return {str(name): _number(value, f"scores {path}: {name!r}") for name, value in content.items()}


def _of_csv(text: str, path: Path) -> dict[str, float]:
    head = text.lstrip().partition("\n")[0]
    between = next((one for one in ";\t" if one in head), ",")
    try:
        cells = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=between)]
    except csv.Error as error:
        raise CfmergeError(f"scores {path}: is no CSV: {error}") from None
    rows = [row for row in cells if any(row)]
    other = next((row for row in rows if len(row) != 2), None)
    if other is not None:
        steps = " (scores of one step at a time: --step N)" if "step" in map(str.lower, rows[0]) else ""
        raise CfmergeError(f"scores {path}: expected two columns, task and score{steps}; found {other}")
    if rows and rows[0][1].lower() not in MISSING and rows[0][1][:1].isalpha() and not _is_number(rows[0][1]):
        rows = rows[1:]  # the head
    _check_once([row[0] for row in rows], path)
    return {row[0]: _number(row[1], f"scores {path}: {row[0]!r}") for row in rows}


def _check_once(names: Sequence[str], where: object) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise CfmergeError(f"scores {where}: {twice[0]!r} stands there twice")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        told = repr(value) if len(repr(value)) < LONG else f"{repr(value)[:LONG]}..."
        hint = "; write 0.81 or 81, with a point and without a sign" if re.search(r"\d\s*%|\d,\d", told) else ""
        raise CfmergeError(f"{where}: expected a number, found {told}{hint}")
    return float(value)
