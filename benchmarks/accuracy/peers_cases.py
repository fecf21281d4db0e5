"""Which method of ours is which function of another package, for peers.py."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from cfmerge_accuracy.methods import ENTRIES, Data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import methods_cases as of_matrices
from methods_sides import PeerError, Theirs

__all__ = ["CASES", "Case", "PeerError", "Theirs"]


class Case(NamedTuple):
    """A method of ours and the peer's function that is the same method.

    Attributes:
        method: an expression of ours.
        peer: a name in peers_worker.py or ../methods_peers.py; it begins with its package.
        tolerance, double: of the difference in float32; in float64, or none where theirs cannot compute in it.
        moments: "grams" or "fishers", as in `cfmerge_accuracy.methods`.
        experts: how many it takes; none: all.
        note: what has to be known about the comparison.
        exact: the method in float64, where theirs has constants that depend on the precision.
    """

    method: str
    peer: str
    tolerance: float = 1e-3
    double: float | None = 1e-8
    moments: Data = "none"
    experts: int | None = None
    note: str = ""
    exact: str = ""

    @property
    def name(self) -> str:
        """The row of the suite's tables that has this method, whatever its options; else the method's own name."""
        known = {entry.method: entry.name for entry in ENTRIES}
        return known.get(self.method) or known.get(without_options(self.method)) or without_options(self.method)

    @property
    def package(self) -> str:
        return next(name for name in ("fusion_bench", "mergekit", "authors") if self.peer.startswith(name))

    def same(self, shape: tuple[int, int], experts: int) -> bool:
        """Whether theirs is the same method on a matrix of this shape, as ../methods.py has it."""
        return all(case.same(shape, experts) for case in of_matrices.CASES if case.peer == self.peer)


def without_options(method: str) -> str:
    """`tsv_m(alpha=2) >> svc` as `tsv_m >> svc`."""
    while (shorter := re.sub(r"\([^()]*\)", "", method)) != method:
        method = shorter
    return method


def _of_matrices() -> list[Case]:
    """The cases of ../methods.py that are the same method and not another solution of the same loss."""
    moments: dict[str, Data] = {"": "none", "gram": "grams", "fisher": "fishers"}
    cut_off = {
        "actmat": "actmat(rtol=5e-14)",
        "tact": "tact(rtol=5e-14)",
    }  # theirs is of the precision; ours of float32
    return [
        Case(
            case.ours.format(steps=of_matrices.STEPS), case.peer, min(case.tolerance, 1e-3), case.double,
            moments[case.moments], exact=cut_off.get(case.ours, ""),
        )
        for case in of_matrices.CASES
        if case.tolerance is not None and case.peer not in ("fusion_bench_fisher", "fusion_bench_opcm")
    ]  # fmt: skip


TRIMMED = "theirs keeps its share of every tensor"
CASES = (
    Case("average", "fusion_bench_average"),
    Case("average", "mergekit_linear"),
    Case("task_arithmetic", "fusion_bench_task_arithmetic"),
    Case("task_arithmetic", "mergekit_task_arithmetic", note="lambda 0.3"),
    Case("metagpt", "authors_metagpt", note="the function in STAR's repository"),
    Case("model_stock(clamp=False)", "mergekit_model_stock", note="ours without the clamp of negative ratios"),
    Case(
        "model_stock(angle='degrees', clamp=False)", "fusion_bench_model_stock", double=1e-6,
        note="theirs takes the mean of angles, and adds 1e-8 to norms",
    ),
    *_of_matrices(),
    Case("opcm", "fusion_bench_opcm", double=1e-6),
    Case("ties(variant='official')", "authors_ties", note="their options: one threshold for the model"),
    Case("ties(variant='fusion_bench')", "fusion_bench_ties", note="theirs sums, times 0.3"),
    Case("ties(variant='mergekit', density=0.2)", "mergekit_ties", note=TRIMMED),
    Case("breadcrumbs", "mergekit_breadcrumbs", note="lambda 0.3"),
    Case("breadcrumbs_ties(combine='sum', zero='positive')", "mergekit_breadcrumbs_ties"),
    Case("sce(density=0.5, uniform_below=1e-6)", "mergekit_sce", note="weights equal where theirs makes them so"),
    Case("pcb", "authors_pcb"),
    Case("consensus", "fusion_bench_consensus"),
    Case("magmax", "fusion_bench_magmax"),
    Case("ram", "mergekit_ram"),
    Case("ram_plus", "mergekit_ramplus_tl"),
    Case("task_arithmetic >> lines", "authors_lines"),
    Case("multislerp(eps=1e-8)", "mergekit_multislerp", note="around the base"),
    Case("karcher", "mergekit_karcher", double=1e-6),
    Case("fisher(floor=1e-6, below='add')", "fusion_bench_fisher", moments="fishers", note="1e-6 added to Fishers"),
    Case("slerp", "mergekit_slerp", experts=1, note="base and first expert"),
    Case("nuslerp", "mergekit_nuslerp", experts=2, note="first two experts"),
    Case("expo", "fusion_bench_expo", experts=1, note="first expert"),
    Case("nearswap", "mergekit_nearswap", experts=1, note="base and first expert"),
    Case("arcee_fusion", "mergekit_arcee_fusion", experts=1, note="base and first expert"),
)  # fmt: skip
