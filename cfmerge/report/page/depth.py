"""Numbers of a diagnosis gathered over tensors: of each layer, of the whole model.

With `D_t` the delta of expert t, `M` that of the merged model and `W_0` the base, over the tensors of a layer

    relative norm   sqrt(sum ||D_t||^2 / sum ||W_0||^2)
    cosine          sum <D_s, D_t> / sqrt(sum ||D_s||^2 sum ||D_t||^2)
    kept            sum <M, D_t> / sum ||D_t||^2      (1: all of it, 0: nothing, below 0: its opposite)
    conflicts       mean of the shares of opposite signs, each tensor counted by its size
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from cfmerge.models.layers import named

if TYPE_CHECKING:
    from cfmerge.diagnosis import Measured

    Tensors = Mapping[str, Measured]


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers of one part of the model, in order.

    Attributes:
        title: what their names begin with.
        axis: what is counted: layers, or tensors where the model has no layers by name.
        places: `(number, names of its tensors)` of each.
    """

    title: str
    axis: str
    places: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.places]


def runs(tensors: Tensors, most: int = 4) -> list[Run]:
    """The runs of layers with most tensors; a model without any is one run of its tensors that somebody changed."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, one in tensors.items():
        if one.layer is not None and one.norms.any():
            place = named(name)
            found[place.stem if place else "stacked layers"][one.layer].append(name)
    made = [
        Run(stem.strip("./_") or "layers", "layer", tuple((n, tuple(names)) for n, names in sorted(layers.items())))
        for stem, layers in found.items() if len(layers) > 1
    ]  # fmt: skip
    if not made:
        changed = [name for name, one in tensors.items() if one.norms.any()]
        return [Run("tensors in order", "tensor", tuple((n, (name,)) for n, name in enumerate(changed)))]
    kept = sorted(made, key=lambda run: -sum(len(names) for _, names in run.places))[:most]
    return [run for run in made if run in kept]


def relative_norms(tensors: Iterable[Measured]) -> Float[np.ndarray, " T"]:
    """Each expert's."""
    tensors = list(tensors)
    base = sum(one.base_norm**2 for one in tensors)
    return np.sqrt(sum(one.norms**2 for one in tensors) / (base or math.nan))


def cosines(tensors: Iterable[Measured]) -> Float[np.ndarray, "T T"]:
    """Between all experts; NaN where one changed nothing."""
    gram = sum(one.gram for one in tensors)
    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = math.nan
    return np.clip(gram / np.outer(norms, norms), -1, 1)


def conflicts(tensors: Iterable[Measured]) -> Float[np.ndarray, "T T"]:
    """Between all experts."""
    tensors = [one for one in tensors if one.norms.any()]
    sizes = [math.prod(one.shape) for one in tensors]
    total = sum(size * one.conflicts for size, one in zip(sizes, tensors, strict=True))
    return np.asarray(total / (sum(sizes) or math.nan))


def with_others(values: Float[np.ndarray, "T T"]) -> Float[np.ndarray, " T"]:
    """The mean of each row without its diagonal; NaN where there are no others."""
    count = len(values)
    if count < 2:
        return np.full(count, math.nan)
    return (values.sum(axis=1) - np.diag(values)) / (count - 1)


def overlaps(tensors: Iterable[Measured], side: str) -> Float[np.ndarray, "T T"] | None:
    """The overlap of `rows` or `columns`, mean over the matrices; None: there are none."""
    found = [one for one in (getattr(each, side) for each in tensors) if one is not None]
    return np.mean(np.nan_to_num(found), axis=0) if found else None


def kept(tensors: Iterable[Measured]) -> Float[np.ndarray, " T"]:
    """Each expert's share in the merged model, which is the last; NaN for one that changed nothing."""
    gram = np.asarray(sum(one.gram for one in tensors))
    energy = np.diag(gram)[:-1].copy()
    energy[energy == 0] = math.nan
    return gram[-1, :-1] / energy


def share(tensors: Iterable[Measured], part: str) -> Float[np.ndarray, " T"] | None:
    """Each expert's share of energy in the base's `leading`, `lesser` or `null` directions, over the matrices."""
    found = [one for one in tensors if getattr(one, part) is not None]
    energy = sum((one.norms**2 for one in found), np.zeros(1))
    if not found:
        return None
    energy = np.where(energy == 0, math.nan, energy)
    return np.asarray(sum(np.nan_to_num(getattr(one, part)) * one.norms**2 for one in found) / energy)


def medians(tensors: Iterable[Measured], field: str) -> Float[np.ndarray, " T"] | None:
    """The median over the matrices that the expert changed, of each expert; None: there are none."""
    pairs = [(getattr(one, field), one.norms) for one in tensors if getattr(one, field) is not None]
    if not pairs:
        return None
    values, norms = (np.array(each, np.float64) for each in zip(*pairs, strict=True))
    values[norms == 0] = math.nan
    return np.array([np.median(column[~np.isnan(column)]) if (~np.isnan(column)).any() else math.nan
                     for column in values.T])  # fmt: skip


def typical(tensors: Tensors, run: Run, most: int = 2) -> list[str]:
    """Matrices of the first, the middle and the last layer of a run: of those names that changed most."""
    energy: dict[str, float] = defaultdict(float)
    by_rest: dict[str, dict[int, str]] = defaultdict(dict)
    for number, names in run.places:
        for name in names:
            if tensors[name].spectra is not None:
                place = named(name)
                rest = place.rest if place else name.partition("[")[0]
                rest = rest if run.axis == "layer" else ""
                energy[rest] += float(np.sum(tensors[name].norms ** 2))
                by_rest[rest][number] = name
    chosen = sorted(energy, key=lambda rest: -energy[rest])[:most]
    return [by_rest[rest][number] for number in _ends(run.numbers) for rest in chosen if number in by_rest[rest]]


def _ends(numbers: Sequence[int]) -> list[int]:
    """The first, the middle and the last."""
    return list(dict.fromkeys(numbers[at] for at in (0, len(numbers) // 2, -1)))
