"""The recommendation that findings lead to."""

from collections.abc import Mapping, Sequence

from cfmerge.diagnosis.result import Finding, Measured, Recommendation


def recommended(experts: Sequence[str], tensors: Mapping[str, Measured], findings: Sequence[Finding]) -> Recommendation:
    """The method for these experts, its reason, and what was measured for it."""
    return Recommendation("ace", "", "")
