"""Findings about deltas of low rank, and where their directions began. Thresholds with their reasons."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cfmerge.diagnosis.choice import LOW
from cfmerge.diagnosis.reading import Reading, common_dimension, groups
from cfmerge.diagnosis.result import Finding, Measured
from cfmerge.diagnosis.words import experts

MOST = 0.75  # of the matrices that an expert changed have a low rank: adapters may leave some of another shape out
# Spaces of one start look drawn from about as many directions as they have, those of own starts from all.
SHARED, OWN = 2.0, 0.25  # times the rank; of the inputs


def low_rank_experts(read: Reading) -> list[int]:
    """The numbers of the experts most of whose matrices have a low rank."""

    def is_low(t: int) -> bool:
        low = [_is_low(one, t) for _, one in read.changed(t)]
        return bool(low) and float(np.mean(low)) >= MOST

    return [t for t in range(len(read.experts)) if is_low(t)]


def _is_low(one: Measured, t: int) -> bool:
    assert one.ranks is not None
    assert one.sides is not None
    return bool(one.norms[t] > 0 and one.ranks[t] <= LOW * min(one.sides))


def low_rank(read: Reading) -> Iterator[Finding]:
    """Experts whose deltas have a low rank, as adapters have."""
    found = low_rank_experts(read)
    own = {name: one for name, one in read.matrices.items() if any(_is_low(one, t) for t in found)}
    if not own:
        return
    rank = float(np.median([one.ranks[t] for t in found for one in own.values() if one.ranks is not None]))
    side = np.median([min(one.sides) for one in own.values() if one.sides is not None])
    names = tuple(read.experts[t] for t in found)
    yield Finding(
        "low-rank",
        "fact",
        f"{experts(names)}: deltas of rank {rank:.0f} of {side:.0f} (medians) in {len(own)} of {len(read.matrices)} "
        "matrices, as LoRA leaves them",
        rank,
        names,
        tuple(own),
    )


class Start(NamedTuple):
    """Two experts of low rank: where their directions began, and the median overlaps of their spaces."""

    pair: tuple[int, int]
    where: str  # "inputs" or "outputs": one space for both; "own"; "": it is not clear
    inputs: float
    outputs: float


def starts_of(read: Reading) -> list[Start]:
    """The starts of all pairs of experts of low rank."""
    pairs = read.pairs(low_rank_experts(read))
    return [_start(pair, [one for _, one in read.changed(*pair)]) for pair in pairs if any(read.changed(*pair))]


def _start(pair: tuple[int, int], both: Sequence[Measured]) -> Start:
    each = np.array([_numbers(one, *pair) for one in both])
    rows, columns, of_inputs, inputs, outputs = (float(value) for value in np.median(each, axis=0))
    where = "own" if of_inputs >= OWN and columns > SHARED else ""
    where = "inputs" if rows <= SHARED else "outputs" if columns <= SHARED else where
    return Start(pair, where, inputs, outputs)


def _numbers(one: Measured, s: int, t: int) -> tuple[float, ...]:
    """How many directions both spaces seem drawn from: in ranks (inputs, outputs), of all inputs; and the overlaps."""
    assert one.rows is not None
    assert one.columns is not None
    assert one.ranks is not None
    assert one.sides is not None
    rank = max(float(one.ranks[s]), float(one.ranks[t]), 1.0)
    rows, columns = (common_dimension(one, float(overlaps[s, t]), s, t) for overlaps in (one.rows, one.columns))
    return rows / rank, columns / rank, rows / one.sides[1], float(one.rows[s, t]), float(one.columns[s, t])


def starts(read: Reading) -> Iterator[Finding]:
    """Whether experts of low rank began in one space, or each in one of its own."""
    found = starts_of(read)
    for side in ("inputs", "outputs"):
        shared = [one for one in found if one.where == side]
        for group in groups(len(read.experts), [one.pair for one in shared]):
            yield _shared(read, side, group, [one for one in shared if one.pair[0] in group])
    own = [one for one in found if one.where == "own"]
    if own:
        most = max(one.inputs for one in own)
        names = tuple(read.experts[t] for t in sorted({t for one in own for t in one.pair}))
        yield Finding(
            "own-start",
            "fact",
            f"{experts(names)} began in spaces of their own: their input spaces overlap by {most:.2f} at most, as "
            "random ones do",
            most,
            names,
        )


def _shared(read: Reading, side: str, group: Sequence[int], own: Sequence[Start]) -> Finding:
    overlaps = [float(np.median([one.inputs for one in own])), float(np.median([one.outputs for one in own]))]
    here, there = overlaps if side == "inputs" else overlaps[::-1]
    other = "outputs" if side == "inputs" else "inputs"
    names = tuple(read.experts[t] for t in group)
    harm = ". Least squares (ace and its kin) divides by what they do not share" if side == "inputs" else ""
    return Finding(
        "shared-start",
        "warning",
        f"{experts(names)} began from one start: their spaces of {side} coincide (overlap {here:.2f}, of {other} "
        f"{there:.2f}), as those of adapters whose random factor is the same{harm}",
        here,
        names,
    )
