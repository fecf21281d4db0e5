"""Many names told as a few patterns with counts, and as globs that can be pasted into a rule."""

import dataclasses
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
    told, found = set(names), []
    left = list(dict.fromkeys(names))
    others = [name for name in among if name not in told]
    parts = _whole_parts(left, others)
    for part in parts:
        inside = tuple(name for name in left if name.startswith(part))
        found.append(Pattern(part + "*", escape(part) + "*", inside))
        left = [name for name in left if not name.startswith(part)]
    families: dict[tuple[str, ...], list[str]] = {}
    for name in left:
        families.setdefault(tuple(re.split(r"\d+", name)), []).append(name)
    for pieces, members in families.items():
        found += _numbered(pieces, members, others)
    return sorted(found, key=lambda pattern: -len(pattern.names))


def _whole_parts(names: Sequence[str], others: Collection[str]) -> list[str]:
    """The shortest prefixes that hold several of the names, and none of the others."""
    taken = {prefix for other in others for prefix in _prefixes(other)}
    if not taken:
        return []
    counts: dict[str, int] = {}
    for name in names:
        shortest = next((prefix for prefix in _prefixes(name) if prefix not in taken), None)
        if shortest is not None and not re.search(r"(^|[./])\d+[./]$", shortest):
            counts[shortest] = counts.get(shortest, 0) + 1
    return [prefix for prefix, count in counts.items() if count > 1]


def _prefixes(name: str) -> list[str]:
    return [name[: match.end()] for match in re.finditer(r"[./]", name)]


def _numbered(pieces: tuple[str, ...], members: Sequence[str], others: Collection[str]) -> list[Pattern]:
    """One pattern of names that differ in numbers, or one each where its glob would take others too."""
    if len(members) == 1:
        return [Pattern(members[0], escape(members[0]), (members[0],))]
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
    matcher = re.compile("".join(".*" if c == "*" else re.escape(c) for c in glob))
    if any(matcher.fullmatch(other) for other in others):
        return [Pattern(name, escape(name), (name,)) for name in members]
    return [Pattern(text, glob, tuple(members))]


def escape(text: str) -> str:
    """Text with the signs of a glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", text)


def tell(names: Sequence[str], among: Iterable[str] = (), most: int = 4) -> str:
    """The patterns of some names in one line: `a.* (30 tensors), b.weight and 3 more patterns`."""
    found = patterns(names, among)
    more = f" and {len(found) - most} more patterns" if len(found) > most else ""
    return ", ".join(map(str, found[:most])) + more
