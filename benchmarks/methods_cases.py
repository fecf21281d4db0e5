"""What methods.py compares: our methods, and the functions of other packages that are the same methods."""

from collections.abc import Callable
from typing import NamedTuple

STEPS = 300  # of Adam, as published


class Case(NamedTuple):
    """A method of ours and the function that is the same method.

    Attributes:
        ours, peer: an expression for `methods.make`, with `{steps}` where the peer's are given too; a name of
            methods_peers.py.
        aim: how many times faster we mean to be: 5 where theirs is a Python loop or full SVDs, else 1.
        tolerance: of the largest difference in float32, relative to the largest entry of theirs; None: another
            solution of the same loss, so that the losses are compared.
        double: the same in float64, where theirs can compute in it.
        iterates: theirs takes steps: a few are measured, and scaled up to `STEPS`.
        moments: what is measured of each expert: "gram", "fisher" or nothing.
        same: for which shapes, and of how many experts, theirs is the same method, and `where`, in words.
    """

    ours: str
    peer: str
    aim: int = 1
    tolerance: float | None = 1e-3
    double: float | None = 1e-8
    iterates: bool = False
    moments: str = ""
    same: Callable[[tuple[int, int], int], bool] = lambda shape, experts: True
    where: str = ""


CASES = (
    Case("wudi", "fusion_bench_wudi", aim=50, tolerance=None, iterates=True),
    Case("wudi_adam(steps={steps})", "fusion_bench_wudi", aim=5, double=1e-6, iterates=True),
    Case("swudi", "authors_swudi", double=None),
    Case("aswudi", "authors_aswudi", double=None),
    Case("optmerge", "authors_optmerge", aim=5, tolerance=None),
    Case("actmat", "authors_actmat", aim=5, tolerance=5e-2),
    Case("tact", "authors_tact", aim=5, tolerance=5e-2),
    Case("regmean(a=0.9)", "fusion_bench_regmean", double=1e-6, moments="gram"),  # theirs: 1 - 0.9 in float32
    Case("fisher(floor=1e-6, below='add')", "fusion_bench_fisher", moments="fisher"),
    Case("tsv_m", "fusion_bench_tsv_m", aim=5),
    Case("tsv_m", "authors_tsv_m", aim=5),
    Case("iso_c", "fusion_bench_iso_c", aim=5),
    Case("iso_c", "authors_iso_c", aim=5),
    Case("iso_cts", "fusion_bench_iso_cts", aim=5),
    Case("iso_cts", "authors_iso_cts", aim=5),
    Case(
        "dc_merge",
        "authors_dc_merge",
        aim=5,
        # else they keep 0.1 % of a core that they have padded with zeros
        same=lambda shape, experts: min(shape) % experts == 0,
        where="where min(out, in) is a multiple of the experts",
    ),
    Case("cart", "authors_cart", aim=5),
    Case("opcm", "fusion_bench_opcm", aim=5, tolerance=5e-2),  # sees single vectors: ill-conditioned
    Case("star >> average", "authors_star", aim=5),
    Case("task_arithmetic(scale=0.4) >> svc(alpha=1.0)", "fusion_bench_svc", aim=5),
    Case(
        "orthomerge(residual=task_arithmetic(scale=0.2))",
        "authors_orthomerge",
        aim=5,
        double=None,
        same=lambda shape, experts: shape[0] >= shape[1],  # else the base has no say in some of the inputs' rotation
        where="where out >= in",
    ),
)
WITHOUT = ("ace", "anchored", "power", "cauchy_poe", "two_sided", "subspace_boosting")  # no public code to run beside
