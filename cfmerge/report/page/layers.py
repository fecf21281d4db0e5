"""The pictures of a diagnosis: norms, conflicts and shares over depth, cosines, spectra.

Where the merged model was measured it is the last of the models of `tensors`, and has a line of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from cfmerge.report.page import depth
from cfmerge.report.page.blocks import Figure, Panel, Section, Table
from cfmerge.report.page.drawing import MERGED
from cfmerge.report.page.plots import MINUS, Line, heat, lines, number

if TYPE_CHECKING:
    from cfmerge.diagnosis import Measured

    Tensors = Mapping[str, Measured]

OURS = "merged model"
LEADING = 6  # singular values that the table of spectra has
Reading = Callable[[Iterable["Measured"]], Float[np.ndarray, " T"]]


def sections(tensors: Tensors, experts: Sequence[str], merged: bool) -> list[Section]:
    """A section for each picture; those for which there are no numbers are left out.

    Args:
        experts: names of the experts.
        merged: the last model of `tensors` is the merged one.
    """
    if not any(one.norms.any() for one in tensors.values()):
        return []
    alone = without_last(tensors) if merged else tensors
    found = depth.runs(tensors)
    made = [
        _norms(tensors, found, experts, merged),
        _kept(tensors, found, experts) if merged else None,
        _conflicts(alone, found, experts) if len(experts) > 1 else None,
        _cosines(alone, experts) if len(experts) > 1 else None,
        _spectra(tensors, found, experts, merged),
    ]
    return [one for one in made if one is not None]


def without_last(tensors: Tensors) -> dict[str, Measured]:
    """The numbers without those of the last model."""
    return {name: _without_last(one) for name, one in tensors.items()}


def _without_last(one: Measured) -> Measured:
    count = len(one.norms)
    cut: dict[str, Any] = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, np.ndarray) and field.name != "base_spectrum":
            square = value.ndim == 2 and value.shape == (count, count) and field.name != "spectra"
            cut[field.name] = value[:-1, :-1] if square else value[:-1]
    return dataclasses.replace(one, **cut)


def _legend(experts: Sequence[str], merged: bool) -> list[tuple[str, int]]:
    return [*((name, place) for place, name in enumerate(experts)), *([(OURS, MERGED)] if merged else [])]


def _over_depth(
    tensors: Tensors,
    found: Sequence[depth.Run],
    names: Sequence[tuple[str, int]],
    read: Reading,
    key: str,
    at: float | None,
) -> tuple[list[Panel], list[list[str]]]:
    """A panel for each run of layers, and the rows of the table of all of them."""
    panels, rows = [], []
    for place, run in enumerate(found):
        values = np.array([read([tensors[name] for name in members]) for _, members in run.places])
        series: dict[str, Line] = {
            name: (look, run.numbers, values[:, column].tolist()) for column, (name, look) in enumerate(names)
        }
        if not np.isfinite(values).any():
            continue
        panels.append(lines(run.title, series, key=f"{key}-{place}", x=run.axis, at=at))
        for (layer, members), row in zip(run.places, values, strict=True):
            told = members[0] if run.axis == "tensor" else f"{run.title}, {layer}"
            rows.append([told, *(number(value) for value in row)])
    return panels, rows


def _section(
    title: str, caption: str, panels: Sequence[Panel], rows: Sequence[Sequence[str]], names: Sequence[tuple[str, int]]
) -> Section | None:
    if not panels:
        return None
    table = Table(f"{title}, in numbers", ["layer", *(name for name, _ in names)], rows, folded=True)
    return Section(title, [Figure(caption, panels, names, table)])


def _norms(tensors: Tensors, found: Sequence[depth.Run], experts: Sequence[str], merged: bool) -> Section | None:
    names = _legend(experts, merged)
    panels, rows = _over_depth(tensors, found, names, depth.relative_norms, "norms", None)
    caption = "Norm of each delta relative to the base's weights, layer by layer: how far fine-tuning has gone."
    return _section("How much each expert changed", caption, panels, rows, names)


def _kept(tensors: Tensors, found: Sequence[depth.Run], experts: Sequence[str]) -> Section | None:
    names = _legend(experts, False)
    panels, rows = _over_depth(tensors, found, names, depth.kept, "kept", 1.0)
    caption = (
        "The merged delta's part along each expert's delta, as a share of the latter: 1 (dashed) keeps all of it, 0 "
        "nothing. A plain average of T unrelated experts keeps 1/T of each."
    )
    return _section("What each expert kept of itself", caption, panels, rows, names)


def _conflicts(tensors: Tensors, found: Sequence[depth.Run], experts: Sequence[str]) -> Section | None:
    names = _legend(experts, False)

    def read(members: Iterable[Measured]) -> Float[np.ndarray, " T"]:
        return depth.with_others(depth.conflicts(members))

    panels, rows = _over_depth(tensors, found, names, read, "conflicts", 0.5)
    caption = (
        "Share of entries in which an expert's change has the sign opposite to another's, mean over the others, among "
        "the entries that both changed. Unrelated changes disagree in half of them (dashed)."
    )
    return _section("Where signs conflict", caption, panels, rows, names)


def _cosines(tensors: Tensors, experts: Sequence[str]) -> Section:
    members = list(tensors.values())
    found = {
        "Cosine of the deltas": depth.cosines(members),
        "Overlap of input directions": depth.overlaps(members, "rows"),
        "Overlap of output directions": depth.overlaps(members, "columns"),
    }
    known = {title: values for title, values in found.items() if values is not None}
    panels = [heat(title, experts, values, key=f"cosines-{n}") for n, (title, values) in enumerate(known.items())]
    rows = [
        [f"{experts[s]}, {experts[t]}", *(number(values[s, t]) for values in known.values())]
        for t in range(len(experts)) for s in range(t)
    ]  # fmt: skip
    caption = (
        f"Between all pairs of experts, over the whole model: 1 is the same direction, 0 unrelated, {MINUS}1 the "
        "opposite. "
        "Overlaps compare where deltas read from and write to, without regard to signs; they are means over matrices."
    )
    table = Table("Cosines and overlaps, in numbers", ["experts", *known], rows, folded=True)
    return Section("What experts have in common", [Figure(caption, panels, (), table)])


def _spectra(tensors: Tensors, found: Sequence[depth.Run], experts: Sequence[str], merged: bool) -> Section | None:
    chosen = depth.typical(tensors, found[0]) if found else []
    names = _legend(experts, merged)
    panels, rows = [], []
    for place, name in enumerate(chosen):
        spectra = tensors[name].spectra
        assert spectra is not None
        series: dict[str, Line] = {}
        for (label, look), values in zip(names, spectra, strict=True):
            shown = [float(value) if value > 1e-3 * spectra.max() else math.nan for value in values]
            series[label] = (look, list(range(1, len(shown) + 1)), shown)
            leading = [number(float(value)) for value in values[:LEADING]]
            rows.append([f"{name}, {label}", *leading, *[""] * (LEADING - len(leading))])
        panels.append(lines(_short(name), series, key=f"spectra-{place}", x="number of the value", logarithmic=True))
    if not panels:
        return None
    caption = (
        "Leading singular values of the deltas before merging"
        + (" and of the merged delta" if merged else "")
        + ", largest first and on a logarithmic scale, of the matrices that changed most, in the first, the middle and "
        "the last layer."
    )
    head = ["matrix, model", *map(str, range(1, LEADING + 1))]
    table = Table(f"Spectra, the {LEADING} largest values", head, rows, folded=True)
    return Section("Spectra before and after" if merged else "Spectra", [Figure(caption, panels, names, table)])


def _short(name: str, most: int = 44) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
