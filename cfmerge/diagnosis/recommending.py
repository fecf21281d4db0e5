"""The recommendation that numbers and findings lead to, by the rule of `method: auto` (choice.py)."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cfmerge.diagnosis import choice
from cfmerge.diagnosis.result import Finding, Measured, Recommendation
from cfmerge.diagnosis.words import experts as told
from cfmerge.models import Kind

AUTO = "auto"
WHERE = "docs/results, accuracy at defaults with each expert at 100"
EVIDENCE = {  # what docs/results has for the branches of the rule
    choice.CONVOLUTION: "a ConvNet twice and EfficientNet: 85.8, 83.4 and 85.7 (the average 79.0, 78.5 and 83.9)",
    choice.LOW_RANK: "six LoRA zoos: 92, 93, 91, 92, 73 and, with long deltas, 52 (the average 82, 82, 82, 88, 67, 70)",
    choice.LOW_RANK_WEIGHTED: "six LoRA zoos: 90, 88, 89, 91, 51 and, with long deltas, 24 (the average 82, 82, 82, "
    "88, 67, 70)",
    choice.GROWING: "LoRA from one start, where ace has 33.3: 89.2 (the average 82.0)",
    choice.FULL: "seven zoos of fully fine-tuned transformers: 85.3 in the mean (average >> subspace_boosting 85.2, "
    "ace 83.8, the average 79.7)",
}


def recommended(
    experts: Sequence[str],
    tensors: Mapping[str, Measured],
    findings: Sequence[Finding],
    weights: Sequence[float] = (),
) -> Recommendation:
    """The method for these experts, its reason, and what was measured for it; without weights they are alike."""
    foreign = [name for one in findings if one.kind == "foreign-base" for name in one.experts]
    if foreign:
        why = f"{told(foreign)} {'do' if len(foreign) > 1 else 'does'} not come from this base: deltas from it mean "
        return Recommendation("", f"no merge: {why}nothing", "", tuple(foreign))
    without = _superfluous(findings)
    kept = [t for t, name in enumerate(experts) if name not in without]
    if len(kept) < 2:
        left = "that changes the base and is no copy of another" if without else "is given"
        return Recommendation("", f"no merge: {len(kept)} expert {left}, and a merge takes two", "", without)
    branches = _branches(tensors, kept, [weights[t] for t in kept] if weights else ())
    if not branches:
        return _without_numbers(tensors, without)
    (first, _), total = branches.most_common(1)[0], branches.total()
    evidence = "; ".join(f"{one.method} on {EVIDENCE[one]}" for one, _ in branches.most_common() if one in EVIDENCE)
    if len(branches) == 1:
        return Recommendation(first.method, f"all {total} matrices have {first.why}", f"{WHERE}: {evidence}", without)
    each = "; ".join(f"{number} have {one.why} ({one.method})" for one, number in branches.most_common())
    return Recommendation(AUTO, f"of {total} matrices {each}", f"{WHERE}: {evidence}", without)


def _superfluous(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The experts to leave out: all but one of those that are the same, and those that are the base."""
    same = [name for one in findings if one.kind == "same-experts" for name in one.experts[1:]]
    return tuple(same + [name for one in findings if one.kind == "equals-base" for name in one.experts])


def _branches(tensors: Mapping[str, Measured], kept: Sequence[int], weights: Sequence[float]) -> Counter[choice.Branch]:
    """How many matrices take which branch of the rule; those that nobody changed are left out."""
    found: Counter[choice.Branch] = Counter()
    for one in tensors.values():
        if one.ranks is not None and one.sides is not None and one.growth is not None:
            ranks = [int(one.ranks[t]) for t in kept]
            found[choice.chosen(Kind(one.kind), one.sides, ranks, one.growth, weights)] += 1
    del found[choice.UNCHANGED]
    return found


def _without_numbers(tensors: Mapping[str, Measured], without: tuple[str, ...]) -> Recommendation:
    """The recommendation where no matrix was decomposed, or there is none."""
    if any(one.kind in {Kind.MATRIX, Kind.CONVOLUTION} for one in tensors.values()):
        return Recommendation(AUTO, "no matrix was decomposed here; auto looks at each when it merges", "", without)
    return Recommendation("average", "no matrix is changed, and methods differ in matrices alone", "", without)
