"""The findings of a diagnosis, gravest first. Each is a function of the numbers; docs/diagnose.md lists them."""

from collections.abc import Iterator, Mapping, Sequence

from cfmerge.diagnosis import of_experts, of_ranks, of_tensors
from cfmerge.diagnosis.reading import Reading
from cfmerge.diagnosis.result import SEVERITIES, Finding, Measured

ALL = (
    of_experts.foreign_base,
    of_experts.same_experts,
    of_experts.equals_base,
    of_tensors.growth,
    of_tensors.long,
    of_experts.one_offset,
    of_ranks.starts,
    of_experts.imbalance,
    of_experts.conflicts,
    of_ranks.low_rank,
    of_experts.common,
    of_tensors.directions,
    of_tensors.uneven,
    of_tensors.partly_changed,
    of_tensors.unchanged,
)


def findings_of(experts: Sequence[str], tensors: Mapping[str, Measured]) -> tuple[Finding, ...]:
    """The findings, gravest first."""
    read = Reading(experts, tensors)

    def each() -> Iterator[Finding]:
        for find in ALL if tensors else ():
            yield from find(read)

    return tuple(sorted(each(), key=lambda one: SEVERITIES.index(one.severity)))
