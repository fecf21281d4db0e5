"""Findings about tensors: growth, directions, tensors that nobody changed. Thresholds with their reasons."""

import math
from collections.abc import Iterator

import numpy as np

from cfmerge.diagnosis.reading import Reading
from cfmerge.diagnosis.result import Finding, Measured
from cfmerge.diagnosis.words import experts, span, tensors
from cfmerge.least_squares import GROWN

MOST = 0.5  # of the solved matrices: the merged model as a whole is told of, as a merge does
# A random delta has the share k/n of its energy in k of n directions, within a few per cent of that in layers of 64 and
# more: so a factor of two is no chance, and less is no news.
AWAY, ALONG = 0.5, 2.0
EXPECTED = 0.02  # of the energy by chance: below it a ratio is of noise
# All deltas together over the base, of the fresh zoos of docs/results: from 0.1 to 0.3 ACE was ahead of the average on
# transformers, by up to 5 points, at 0.5 behind it by 4, at 0.8 and 1.6 by 30 and 58.
LONG = 0.4
UNEVEN = 10.0  # a factor on all deltas is right for one end of so wide a range, and off by three for the middle


def growth(read: Reading) -> Iterator[Finding]:
    """Matrices that least squares would blow up."""
    known = {name: one.growth for name, one in read.matrices.items() if one.growth is not None}
    past = sorted((name for name, value in known.items() if value > GROWN), key=lambda name: -known[name])
    if not past:
        return
    most = float(known[past[0]])
    yield Finding(
        "growth",
        "grave" if len(past) >= MOST * len(known) else "warning",
        f"least squares (ace) would make {len(past)} of {len(known)} matrices longer than twice the sum of as many "
        f"unrelated deltas, up to {most:.1f} times: its covariances are small where the experts differ. Take a larger "
        "ridge, ace(eps_rel=7), or a method that divides by none, such as dc_merge",
        most,
        tuple(read.experts),
        tuple(past),
    )


def long(read: Reading) -> Iterator[Finding]:
    """Deltas that together, `sqrt(sum_t ||D_t||^2)`, are so long that a merge which adds them up goes too far."""
    changed = {name: one for name, one in read.weights.items() if np.any(one.norms > 0)}
    base = math.sqrt(sum(one.base_norm**2 for one in changed.values()))
    if not base:
        return
    length = math.sqrt(sum(float(np.sum(one.norms**2)) for one in changed.values())) / base
    if length > LONG:
        yield Finding(
            "long-deltas",
            "warning",
            f"all deltas together are {length:.2f} times as long as the weights that they change: ace goes too far "
            "there, nearer to 1 tsv_m and dc_merge do too; compare with average and opcm",
            length,
            tuple(read.experts),
            tuple(changed),
        )


def directions(read: Reading) -> Iterator[Finding]:
    """Experts whose deltas avoid, or follow, the directions that the base uses most."""
    shares = {t: _shares(read, t) for t in range(len(read.experts)) if any(read.changed(t))}
    away, along, null = dict[int, float](), dict[int, float](), dict[int, float]()
    for t, (leading, by_chance, nothing, nothing_by_chance) in shares.items():
        if by_chance > EXPECTED and leading < AWAY * by_chance:
            away[t] = leading / by_chance
        if by_chance > EXPECTED and leading > ALONG * by_chance:
            along[t] = leading / by_chance
        if nothing > EXPECTED and nothing > ALONG * nothing_by_chance:
            null[t] = nothing
    in_leading = ": {0} of the energy lies in the base's leading input directions, by chance {1:.1%}"
    for kind, found, most, place, text in (
        ("new-directions", away, min, 0, "moved away from what the base uses most" + in_leading),
        ("null-directions", null, max, 2, "moved into input directions in which the base is zero: {0} of the energy, "
         "by chance {1:.1%}"),
        ("base-directions", along, max, 0, "moved along what the base uses most" + in_leading),
    ):  # fmt: skip
        if found:
            t = most(found, key=found.__getitem__)
            names = tuple(read.experts[number] for number in found)
            told = text.format(span([shares[number][place] for number in found], ".1%"), shares[t][place + 1])
            yield Finding(kind, "fact", f"{experts(names)} {told}", found[t], names)


def _shares(read: Reading, t: int) -> tuple[float, float, float, float]:
    """The shares of an expert's energy in the base's leading and null directions, each with that of chance."""
    total, found = 0.0, np.zeros(4)
    for _, one in read.changed(t):
        assert one.leading is not None
        assert one.null is not None
        assert one.directions is not None
        leading, _, null = (count / sum(one.directions) for count in one.directions)
        found += one.norms[t] ** 2 * np.array([one.leading[t], leading, one.null[t], null])
        total += one.norms[t] ** 2
    return tuple(float(value) for value in found / total)  # type: ignore[return-value]


def unchanged(read: Reading) -> Iterator[Finding]:
    """Tensors that no expert changed."""
    same = [name for name, one in read.tensors.items() if not np.any(one.norms > 0)]
    if same:
        others = [name for name in read.tensors if name not in set(same)]
        yield Finding(
            "unchanged",
            "fact",
            f"{len(same)} of {len(read.tensors)} tensors are the base's in every expert: {tensors(same, others)}",
            float(len(same)),
            (),
            tuple(same),
        )


def partly_changed(read: Reading) -> Iterator[Finding]:
    """Tensors that some experts changed, and others did not."""
    there = {name: np.count_nonzero(one.norms > 0) for name, one in read.tensors.items()}
    some = sorted((name for name, count in there.items() if 0 < count < len(read.experts)), key=there.__getitem__)
    if some:
        counts = {
            expert: sum(bool(read.tensors[name].norms[t] > 0) for name in some) for t, expert in enumerate(read.experts)
        }
        fewest = min(counts, key=counts.__getitem__)
        most = max(counts, key=counts.__getitem__)
        yield Finding(
            "partly-changed",
            "fact",
            f"{len(some)} of {len(read.tensors)} tensors are changed by some experts only ({most!r} changed "
            f"{counts[most]} of these, {fewest!r} {counts[fewest]}); a mean over all experts shrinks them",
            float(len(some)),
            tuple(expert for expert, count in counts.items() if count),
            tuple(some),
        )


def uneven(read: Reading) -> Iterator[Finding]:
    """Kinds or layers that moved far more than others, measured by the base's length."""
    lengths = {name: _length(one) for name, one in read.tensors.items() if one.base_norm > 0 and np.any(one.norms > 0)}
    kinds = {name: read.tensors[name].kind for name in lengths}
    layers = {name: f"layer {read.tensors[name].layer}" for name in lengths if name in read.matrices}
    layers = {name: layer for name, layer in layers.items() if read.tensors[name].layer is not None}
    for what, group_of in (("kinds", kinds), ("layers", layers)):
        medians = {
            group: float(np.median([lengths[name] for name in group_of if group_of[name] == group]))
            for group in dict.fromkeys(group_of.values())
        }
        if not medians:
            continue
        most, least = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
        times = medians[most] / medians[least]
        if times > UNEVEN:
            yield Finding(
                f"uneven-{what}",
                "fact",
                f"{what} moved by very different lengths: {most} by {medians[most]:.2g} of the base's (median), "
                f"{least} by {medians[least]:.2g}, {times:.0f} times less",
                times,
                tuple(read.experts),
                tuple(sorted((name for name in group_of if group_of[name] == most), key=lambda name: -lengths[name])),
            )


def _length(one: Measured) -> float:
    """The root mean square of the deltas' lengths, over the base's."""
    return float(np.sqrt(np.mean(one.norms[one.norms > 0] ** 2)) / one.base_norm)
