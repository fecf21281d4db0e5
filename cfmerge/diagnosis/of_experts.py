"""Findings about experts and pairs of them. Each constant is a threshold, and its reason stands beside it."""

from collections.abc import Callable, Iterator

import numpy as np

from cfmerge.diagnosis.reading import Reading, cosine_to_base, groups
from cfmerge.diagnosis.result import Finding, Severity
from cfmerge.diagnosis.words import experts, listed, times

# At a cosine of 0.5 two tensors of one length are as far from each other as either is from zero. Fine-tuning stays
# above 0.9; models of different seeds are at 0, and their deltas 1.41 times as long as the base.
FOREIGN = 0.5
# Two trainings from different data or seeds stay far below (0 to 0.7); the same deltas in two dtypes stay above.
SAME, ALIKE = 0.99, 0.1  # a cosine, and the relative difference of two norms
# Twice as long is four times the energy, which is 4/5 of that of a mean of two.
DOMINANT = 2.0
# Unrelated deltas have a cosine of 0 within 1/sqrt(entries); at 0.2 the mean of two keeps 60 % of their energy, not 50.
COMMON = 0.2
# Signs of unrelated deltas are opposite in half of the entries, within 1/(2 sqrt(entries)), which is far below this.
CONFLICT = 0.55
# Experts of different tasks have cosines of 0 to 0.4; where all are above 0.5, most of what they learned is one thing.
OFFSET = 0.5


def foreign_base(read: Reading) -> Iterator[Finding]:
    """Experts that do not come from this base."""
    for t, name in enumerate(read.experts):
        cosines = {tensor: float(cosine_to_base(one)[t]) for tensor, one in read.weights.items()}
        far = sorted((tensor for tensor in cosines if cosines[tensor] < FOREIGN), key=cosines.__getitem__)
        if 2 * len(far) <= len(cosines):
            continue
        middle = float(np.median(list(cosines.values())))
        length = float(np.median([one.norms[t] / one.base_norm for one in read.weights.values()]))
        yield Finding(
            "foreign-base",
            "grave",
            f"expert {name!r} does not come from this base: its weights have a cosine of {middle:.2f} with the base's, "
            f"and its deltas are {length:.2f} times as long as these (medians of {len(cosines)} tensors; after "
            "fine-tuning the cosine is above 0.9). Give it its own base, or align models of different seeds (--align)",
            middle,
            (name,),
            tuple(far),
        )


def same_experts(read: Reading) -> Iterator[Finding]:
    """Experts whose deltas are the same, or nearly."""
    norms, cosines = read.norms, read.cosines
    same = [
        (s, t)
        for s, t in read.pairs()
        if cosines[s, t] > SAME and abs(norms[s] - norms[t]) <= ALIKE * max(norms[s], norms[t])
    ]
    for group in groups(len(read.experts), same):
        least = min(float(cosines[s, t]) for s, t in same if s in group)
        names = tuple(read.experts[t] for t in group)
        yield Finding(
            "same-experts",
            "grave",
            f"{experts(names)} are {'the same' if least > 1 - 1e-6 else 'nearly the same'}: their deltas have a cosine "
            f"of {least:.4f} and lengths within {ALIKE:.0%}. One training counts {times(len(group))}; keep one of them",
            least,
            names,
        )


def equals_base(read: Reading) -> Iterator[Finding]:
    """Experts that are the base."""
    for t, name in enumerate(read.experts):
        if read.norms[t] == 0:
            yield Finding(
                "equals-base",
                "grave",
                f"expert {name!r} is the base: 0 of {len(read.tensors)} tensors differ. It adds nothing but its share "
                "of every mean; leave it out",
                0.0,
                (name,),
            )


def imbalance(read: Reading) -> Iterator[Finding]:
    """An expert whose delta is far longer than the others'."""
    largest = int(np.argmax(read.norms))
    others = [norm for t, norm in enumerate(read.norms) if t != largest and norm > 0]
    if not others:
        return
    longer = float(read.norms[largest] / np.median(others))
    if longer <= DOMINANT:
        return
    share = float(read.norms[largest] ** 2 / np.sum(read.norms**2))
    shares = {name: one.norms[largest] ** 2 / np.sum(one.norms**2) for name, one in read.changed(largest)}
    yield Finding(
        "imbalance",
        "warning",
        f"expert {read.experts[largest]!r} dominates: its delta is {longer:.1f} times as long as the others' (median), "
        f"and has {share:.0%} of all energy. Sums and means follow it; a weight of {1 / longer:.2g} makes it like them",
        longer,
        (read.experts[largest],),
        tuple(sorted(shares, key=shares.__getitem__, reverse=True)),
    )


def one_offset(read: Reading) -> Iterator[Finding]:
    """Three experts or more that all moved the same way first."""
    pairs = list(read.pairs())
    least = min((float(read.cosines[pair]) for pair in pairs), default=0.0)
    if len(pairs) < 3 or least <= OFFSET:
        return
    there = [t for t in range(len(read.experts)) if read.norms[t] > 0]
    share = float(read.gram[np.ix_(there, there)].mean() / np.mean(read.norms[there] ** 2))
    names = tuple(read.experts[t] for t in there)
    yield Finding(
        "one-offset",
        "warning",
        f"all experts moved the same way: their mean holds {share:.0%} of their energy (every cosine is above "
        f"{least:.2f}; of unrelated ones it holds {1 / len(there):.0%}). Is their base a later model than this one? "
        "Deltas from that would tell the experts apart",
        share,
        names,
    )


def common(read: Reading) -> Iterator[Finding]:
    """Pairs of experts that changed much alike."""
    return _of_pairs(
        read,
        "common",
        "fact",
        read.cosines,
        lambda cosine: COMMON < cosine <= SAME,
        "have much in common: their deltas have a cosine of {most:.2f}, where unrelated ones have 0.00",
    )


def conflicts(read: Reading) -> Iterator[Finding]:
    """Pairs of experts that changed entries in opposite directions more often than chance would."""
    return _of_pairs(
        read,
        "conflicts",
        "warning",
        read.conflicts,
        lambda share: share > CONFLICT,
        "pull against each other: {most:.1%} of the entries that both changed have opposite signs, by chance 50 %",
    )


def _of_pairs(
    read: Reading, kind: str, severity: Severity, values: np.ndarray, holds: Callable[[float], bool], text: str
) -> Iterator[Finding]:
    """One finding about all pairs of experts for whose value something holds."""
    found = sorted((pair for pair in read.pairs() if holds(values[pair])), key=lambda pair: -values[pair])
    if not found:
        return
    most, every = float(values[found[0]]), len(list(read.pairs()))
    names = dict.fromkeys(read.experts[t] for pair in found for t in pair)
    rest = f" ({len(found)} of {every} pairs)" if every > 1 else ""
    told = f"experts {listed([read.experts[t] for t in found[0]])} {text.format(most=most)}{rest}"
    yield Finding(kind, severity, told, most, tuple(names))
