"""The experts of a mixture in two forms: packed in one array, or each in tensors of its own.

Transformers 5 packs them in memory, `experts.gate_up_proj (experts, 2 f, d)` and `experts.down_proj (experts, d, f)`,
and files hold one form or the other. A view gives the tensors of one form out of those of the other.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from cfmerge.models.families import PACKED, packed_layout
from cfmerge.models.layouts import Shape
from cfmerge.models.renames import canonical

SPLIT = re.compile(r"^(?P<at>.*[./]experts[./])(?P<expert>\d+)[./](?P<what>gate_proj|up_proj|down_proj)[./]weight$")
PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
Headers = Mapping[str, tuple[Shape, str]]
Config = Mapping[str, Any]
Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that is made of others when it is read.

    Attributes:
        shape: the tensor's.
        sources: the names of those that it is made of.
        make: the tensor, given a function that reads these.
        slice: one of its entries along the first axis; none: it is no packed array, and made at once.
    """

    shape: Shape
    sources: tuple[str, ...]
    make: Callable[[Read], np.ndarray]
    slice: Callable[[Read, int], np.ndarray] | None = None

    def flat(self, read: Read, first: int, count: int) -> np.ndarray:
        """`count` of its entries from `first` on, in order; of a packed array no more than that is made."""
        if self.slice is None:
            return self.make(read).reshape(-1)[first : first + count]
        size = math.prod(self.shape[1:])
        begin, end = first // size, -(-(first + count) // size)
        made = np.concatenate([self.slice(read, number).reshape(-1) for number in range(begin, end)])
        return made[first - begin * size :][:count]


def other_form(base: Headers, expert: Headers, base_config: Config, config: Config) -> dict[str, View]:
    """The expert's tensors in the form that the base has; empty where both have the same.

    The views have names that begin as the expert's own do, so that renames and prefixes are seen through afterwards.
    """
    packed = _packed(base)
    if packed and _split(expert):
        return _pack(packed, base, base_config, expert)
    if _split(base) and _packed(expert):
        return _take_apart(expert, config)
    return {}


def transposed(
    name: str, theirs: str, base: Headers, expert: Headers, base_config: Config, config: Config
) -> View | None:
    """A packed array of which one model has `(in, out)` and the other `(out, in)`; None where they agree."""
    if not PACKED.match(name) or not PACKED.match(theirs):
        return None
    shape = base[name][0]
    ours, other = packed_layout(name, base, base_config), packed_layout(theirs, expert, config)
    if not ours or not other or ours == other or expert[theirs][0] != (shape[0], shape[2], shape[1]):
        return None
    return View(
        shape,
        (theirs,),
        lambda read: read(theirs).transpose(0, 2, 1),
        lambda read, number: read(theirs)[number].T,
    )


def _packed(headers: Headers) -> dict[str, str]:
    """`{canonical name: name}` of packed arrays."""
    found = {}
    for name, (shape, _) in headers.items():
        match = PACKED.match(canonical(name)) if len(shape) == 3 else None
        if match and match["what"] in PARTS and re.search(r"experts[./]$", match["at"]):
            found[canonical(name)] = name
    return found


def _split(headers: Headers) -> dict[str, re.Match[str]]:
    """`{name: match of its canonical name}` of single experts' matrices."""
    matches = {name: SPLIT.match(canonical(name)) for name, (shape, _) in headers.items() if len(shape) == 2}
    return {name: match for name, match in matches.items() if match}


def _take_apart(expert: Headers, config: Config) -> dict[str, View]:
    views = {}
    for key, name in _packed(expert).items():
        match = PACKED.match(key)
        layout = packed_layout(name, expert, config)
        if match is None or not layout:
            continue
        count, out, size = _sizes(expert[name][0], layout)
        parts = PARTS[match["what"]]
        rows = out // len(parts)
        begin = re.sub(r"(?<=experts[./]).*$", "", name)
        for number in range(count):
            for half, what in enumerate(parts):
                place = slice(half * rows, (half + 1) * rows)
                views[f"{begin}{number}.{what}.weight"] = View(
                    (rows, size), (name,), _piece(name, number, place, layout, config)
                )
    return views


def _piece(name: str, number: int, place: slice, layout: str, config: Config) -> Callable[[Read], np.ndarray]:
    def make(read: Read) -> np.ndarray:
        matrix = read(name)[number]
        matrix = matrix if layout == "boi" else matrix.T
        if config.get("model_type") == "gpt_oss" and name.endswith("gate_up_proj"):  # gate and up by turns
            return matrix[0::2] if place.start == 0 else matrix[1::2]
        return matrix[place]

    return make


def _pack(packed: Mapping[str, str], base: Headers, config: Config, expert: Headers) -> dict[str, View]:
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    begins: dict[str, str] = {}
    for name, match in _split(expert).items():
        found[match["at"], match["what"]][int(match["expert"])] = name
        begins[match["at"]] = re.sub(r"(?<=experts[./]).*$", "", name)
    layouts = {PACKED.match(key)["what"]: packed_layout(name, base, config) for key, name in packed.items()}  # type: ignore[index]
    interleaved = config.get("model_type") == "gpt_oss"
    views = {}
    for at, begin in begins.items():
        for what, layout in layouts.items():
            groups = [found.get((at, part), {}) for part in PARTS[what]]
            count = len(groups[0])
            if not layout or not count or any(sorted(group) != list(range(count)) for group in groups):
                continue
            names = [[group[number] for group in groups] for number in range(count)]
            rows, size = expert[names[0][0]][0]
            inner = (rows * len(groups), size)
            shape = (count, *(inner if layout == "boi" else inner[::-1]))
            by_turns = interleaved and len(groups) == 2
            views[begin + what] = _together(shape, names, layout, by_turns)
    return views


def _together(shape: Shape, names: list[list[str]], layout: str, by_turns: bool) -> View:
    """All experts' matrices in one array; `names` are those of each expert's parts."""

    def one(read: Read, number: int) -> np.ndarray:
        pieces = [read(name) for name in names[number]]
        width = pieces[0].shape[1]
        matrix = np.stack(pieces, axis=1).reshape(-1, width) if by_turns else np.concatenate(pieces)
        return matrix if layout == "boi" else matrix.T

    def make(read: Read) -> np.ndarray:
        return np.stack([one(read, number) for number in range(len(names))])

    return View(shape, tuple(name for row in names for name in row), make, one)


def _sizes(shape: Shape, layout: str) -> tuple[int, int, int]:
    return (shape[0], shape[1], shape[2]) if layout == "boi" else (shape[0], shape[2], shape[1])


Single = dict[str, dict[str, dict[int, str]]]  # {where the experts are: {part: {expert: name}}}


def single_experts(names: Iterable[str]) -> Single:
    """The tensors of experts that are stored one by one, by their place, part and number."""
    found: Single = defaultdict(lambda: defaultdict(dict))
    for name in names:
        match = SPLIT.match(canonical(name))
        if match:
            found[match["at"]][match["what"]][int(match["expert"])] = name
    return found


def of_each_expert(packed: str, single: Single) -> list[list[str]]:
    """The tensors that a packed array would be made of: for each part the experts' names, in order.

    Empty where there are none, or not all of them.
    """
    match = PACKED.match(canonical(packed))
    if match is None or match["what"] not in PARTS or match["at"] not in single:
        return []
    parts = [single[match["at"]][what] for what in PARTS[match["what"]]]
    count = len(parts[0])
    whole = count and all(sorted(own) == list(range(count)) for own in parts)
    return [[own[number] for number in range(count)] for own in parts] if whole else []
