"""Findings about deltas of low rank, and where their directions began. Thresholds with their reasons."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cfmerge.diagnosis.choice import LOW
from cfmerge.diagnosis.reading import Reading, common_dimension, groups
from cfmerge.diagnosis.result import Finding, Measured
from cfmerge.diagnosis.words import experts

MOST = 0.75  # of the matrices that an expert changed have a low rank: adapters may leave some of another shape out
# Two spaces look drawn from as many directions as they have where they began in one, and from all where each began in
# its own: from 0 to 1, as a logarithm between the rank and the side. Training moves both towards the middle: simulated
# adapters (48 inputs, rank 4) had 0.3 after 30 steps and 0.45 after 300 from one start, 0.55 to 0.8 from their own.
SHARED, OWN = 0.4, 0.5
APART = 0.15  # the outputs' place is further on: tasks that are alike join both sides, one start only the inputs


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
    """Two experts of low rank: where their input directions began, and the median overlaps of their spaces."""

    pair: tuple[int, int]
    where: str  # "shared", "own"; "": it is not clear
    inputs: float
    outputs: float


def starts_of(read: Reading) -> list[Start]:
    """The starts of all pairs of experts of low rank."""
    pairs = read.pairs(low_rank_experts(read))
    return [_start(pair, [one for _, one in read.changed(*pair)]) for pair in pairs if any(read.changed(*pair))]


def _start(pair: tuple[int, int], both: Sequence[Measured]) -> Start:
    each = np.array([_numbers(one, *pair) for one in both])
    rows, columns, inputs, outputs = (float(value) for value in np.median(each, axis=0))
    shared = rows <= SHARED and columns - rows >= APART
    return Start(pair, "shared" if shared else "own" if rows >= OWN else "", inputs, outputs)


def _numbers(one: Measured, s: int, t: int) -> tuple[float, ...]:
    """Where both spaces seem drawn from, from 0 (one space) to 1 (inputs, outputs), and their overlaps."""
    assert one.rows is not None
    assert one.columns is not None
    assert one.ranks is not None
    assert one.sides is not None
    rank = max(float(one.ranks[s]), float(one.ranks[t]), 1.0)
    rows, columns = float(one.rows[s, t]), float(one.columns[s, t])

    def place(overlap: float, side: int) -> float:
        drawn_from = min(max(common_dimension(one, overlap, s, t), rank), side)
        return float(np.log(drawn_from / rank) / np.log(side / rank)) if side > rank else 0.0

    return place(rows, one.sides[1]), place(columns, one.sides[0]), rows, columns


def starts(read: Reading) -> Iterator[Finding]:
    """Whether experts of low rank began in one space, or each in one of its own."""
    found = starts_of(read)
    shared = [one for one in found if one.where == "shared"]
    for group in groups(len(read.experts), [one.pair for one in shared]):
        yield _shared(read, group, [one for one in shared if one.pair[0] in group])
    own = [one for one in found if one.where == "own"]
    if own:
        most = max(one.inputs for one in own)
        names = tuple(read.experts[t] for t in sorted({t for one in own for t in one.pair}))
        yield Finding(
            "own-start",
            "fact",
            f"{experts(names)} each began from a start of its own: their input directions overlap by {most:.2f} at "
            "most, about as random ones do",
            most,
            names,
        )


def _shared(read: Reading, group: Sequence[int], own: Sequence[Start]) -> Finding:
    inputs, outputs = (float(np.median(each)) for each in ([one.inputs for one in own], [one.outputs for one in own]))
    names = tuple(read.experts[t] for t in group)
    return Finding(
        "shared-start",
        "warning",
        f"{experts(names)} began from one start: their input directions come from one space (overlap {inputs:.2f}, of "
        f"output directions {outputs:.2f}), as those of adapters whose random factor is the same. Least squares (ace "
        "and its kin) divides by the little in which they differ",
        inputs,
        names,
    )
