"""The methods that are compared, at the settings that were fixed before any result was seen.

A method's own defaults are its paper's, wherever the paper names one (`cfmerge methods NAME` says which). Settings that
differ from the defaults stand here by name, so that nothing is chosen on test data: published alternatives, an epsilon
grid for ACE, and the variants of `power` and `anchored` that the project bets on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from cfmerge.errors import CfmergeError, nearest

Data = Literal["none", "grams", "fishers", "inputs"]


class Entry(NamedTuple):
    """One row of the tables.

    Attributes:
        name: the label.
        method: an expression, as for `cfmerge merge -m`; "regmean_pp" is done with the model itself.
        group: the family's page of the methods' documentation.
        data: what of the tasks' data it is given: none; input Grams; Fishers; inputs.
    """

    name: str
    method: str
    group: str
    data: Data = "none"


def _of(group: str, *methods: str) -> list[Entry]:
    return [Entry(method, method, group) for method in methods]


ENTRIES = (
    *_of("sums", "average", "task_arithmetic", "metagpt", "model_stock"),
    *_of(
        "least squares",
        "ace", "actmat", "tact", "wudi", "wudi_adam", "swudi", "aswudi", "optmerge", "cauchy_poe", "two_sided",
    ),
    Entry("ace, published eps (CLIP)", "ace(eps=1e-5)", "least squares"),
    *(Entry(f"ace, eps_rel {x:g}", f"ace(eps_rel={x:g})", "least squares") for x in (0.007, 0.7, 7)),
    Entry("power 1/2, ridge to the mean", "power", "least squares"),
    Entry("power 1, ridge to the mean", "power(exponent=1)", "least squares"),
    Entry("power 1/2, no ridge", "power(ridge=0)", "least squares"),
    Entry("power 1/2, half-flattened", "power >> half_flatten", "least squares"),
    Entry("anchored at the mean", "anchored", "least squares"),
    Entry("anchored at Iso-C", "anchored(ridge=1.5, towards=iso_c)", "least squares"),
    *_of(
        "spectral",
        "tsv_m", "iso_c", "iso_cts", "dc_merge", "cart", "star >> average", "average >> subspace_boosting",
        "task_arithmetic >> svc", "tsv_m >> svc(alpha=1)", "opcm", "orthomerge",
    ),
    *_of(
        "element-wise",
        "ties", "dare_linear(p=0.5)", "dare_ties(p=0.5)", "della", "breadcrumbs", "sce", "pcb", "consensus", "magmax",
        "ram", "task_arithmetic >> lines", "iso_c >> larv", "random_expert",
    ),
    *_of("interpolation", "multislerp", "karcher"),
    Entry("fisher", "fisher", "measured", "fishers"),
    Entry("regmean, paper (a = 0.9)", "regmean", "measured", "grams"),
    Entry("regmean, true Grams", "regmean(a=1)", "measured", "grams"),
    Entry("regmean++", "regmean_pp", "measured", "inputs"),
)  # fmt: skip

WITHOUT = {
    "linear": "is `average` where weights sum to one",
    "expo, nearswap, arcee_fusion, slerp, nuslerp": "take one or two experts",
    "disjoint_mean, breadcrumbs_ties, della_linear, ram_plus, lot": "parts or near relatives of a row that is there",
}
CURVE = ("average", "task_arithmetic", "ties", "tsv_m", "iso_c", "dc_merge", "ace", "aswudi", "power", "regmean(a=1)")
QUICK = ("average", "task_arithmetic", "ace", "tsv_m", "ties", "regmean(a=1)")  # of the quick run


def entries(names: Sequence[str] = (), quick: bool = False) -> list[Entry]:
    """Those that are asked for by name, or all; with `quick` some of each family.

    Raises:
        CfmergeError: a name that is not there.
    """
    known = {entry.name: entry for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise CfmergeError(f"no method {name!r} in the suite{nearest(name, known)}")
    if names:
        return [known[name] for name in names]
    return [entry for entry in ENTRIES if not quick or entry.method in QUICK]
