"""Many names told as a few patterns with counts, and as globs that can be pasted into a rule."""

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Some names of a model: `text` for people, `glob` for a rule."""

    text: str
    glob: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.text if len(self.names) == 1 else f"{self.text} ({len(self.names)} tensors)"


def patterns(names: Sequence[str], among: Iterable[str] = ()) -> list[Pattern]:
    """Patterns that cover `names` once each, the largest first.

    A whole part of the model (`first_stage_model.*`) is one pattern; other names that differ in numbers alone are
    another (`model.layers.{0..31}.mlp.gate_proj.weight`).

    Args:
        names: the names that it stands for.
        among: names that no pattern may cover, unless they are told too.
    """
    told = set(names)
    others = [name for name in among if name not in told]
    found, left = _whole_parts(list(dict.fromkeys(names)), others)
    families: dict[tuple[str, ...], list[str]] = {}
    for name in left:
        families.setdefault(tuple(re.split(r"\d+", name)), []).append(name)
    mixed: list[str] = []
    for pieces, members in families.items():
        one = _numbered(pieces, members, others) if len(members) > 1 else None
        found += [one] if one else []
        mixed += [] if one else members
    layers, single = _whole_parts(mixed, others, numbered=True)
    found += [*layers, *(Pattern(name, escape(name), (name,)) for name in single)]
    return sorted(found, key=lambda pattern: -len(pattern.names))


def _whole_parts(
    names: Sequence[str], others: Collection[str], numbered: bool = False
) -> tuple[list[Pattern], list[str]]:
    """Parts of the model that hold several of the names and none of the others; and the names in no such part.

    Args:
        numbered: a part may be one of several that differ in a number, such as a layer.
    """
    taken = {prefix for other in others for prefix in _prefixes(other)}
    parts: dict[str, list[str]] = {}
    for name in names if taken else ():
        shortest = next((prefix for prefix in _prefixes(name) if prefix not in taken), None)
        if shortest is not None and (numbered or not re.search(r"(^|[./])\d+[./]$", shortest)):
            parts.setdefault(shortest, []).append(name)
    found = [
        Pattern(part + "*", escape(part) + "*", tuple(inside)) for part, inside in parts.items() if len(inside) > 1
    ]
    covered = {name for pattern in found for name in pattern.names}
    return found, [name for name in names if name not in covered]


def _prefixes(name: str) -> list[str]:
    return [name[: match.end()] for match in re.finditer(r"[./]", name)]


def _numbered(pieces: tuple[str, ...], members: Sequence[str], others: Collection[str]) -> Pattern | None:
    """The pattern of names that differ in numbers; None where its glob would take others too."""
    columns = list(zip(*(re.findall(r"\d+", name) for name in members), strict=True))
    text, glob = pieces[0], escape(pieces[0])
    for values, piece in zip(columns, pieces[1:], strict=True):
        distinct = sorted({int(value) for value in values})
        if len(set(values)) == 1:
            shown = hidden = values[0]
        else:
            whole = distinct == list(range(distinct[0], distinct[-1] + 1))
            shown = f"{distinct[0]}..{distinct[-1]}" if whole else ",".join(map(str, distinct[:4]))
            shown, hidden = "{" + shown + (",..." if not whole and len(distinct) > 4 else "") + "}", "*"
        text, glob = text + shown + piece, glob + hidden + escape(piece)
    if any(fnmatch.fnmatchcase(other, glob) for other in others):
        return None
    return Pattern(text, glob, tuple(members))


def escape(text: str) -> str:
    """Text with the signs of a glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", text)


def tell(names: Sequence[str], among: Iterable[str] = (), most: int = 4) -> str:
    """The patterns of some names in one line: `a.* (30 tensors), b.weight and 3 more patterns`."""
    found = patterns(names, among)
    more = f" and {len(found) - most} more patterns" if len(found) > most else ""
    return ", ".join(map(str, found[:most])) + more
