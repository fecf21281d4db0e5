"""The methods that are compared, at the settings that were fixed before any result was seen.

A method's own defaults are its paper's, wherever the paper names one (`cfmerge methods NAME` says which). Settings that
differ from the defaults stand here by name, so that nothing is chosen on test data: published alternatives, and as
variants, which are run when they are asked for, a grid of ACE's ridge, what the project bets on of `power` and
`anchored`, one constant behind two chains, and `auto`, whose rule was written down before the fresh zoos were trained.
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
        variant: whether it is another setting of a method that has a row, and nobody's published default.
    """

    name: str
    method: str
    group: str
    data: Data = "none"
    variant: bool = False


def _of(group: str, *methods: str) -> list[Entry]:
    return [Entry(method, method, group) for method in methods]


def _variant(name: str, method: str) -> Entry:
    return Entry(name, method, "least squares", variant=True)


ENTRIES = (
    *_of("sums", "average", "task_arithmetic", "metagpt", "model_stock"),
    *_of(
        "least squares",
        "ace", "actmat", "tact", "wudi", "wudi_adam", "swudi", "aswudi", "optmerge", "cauchy_poe", "two_sided",
    ),
    Entry("ace, published eps (CLIP)", "ace(eps=1e-5)", "least squares"),
    *(_variant(f"ace, eps_rel {x:g}", f"ace(eps_rel={x:g})") for x in (0.007, 0.7, 7)),
    Entry("power 1/2, ridge to the mean", "power", "least squares"),
    _variant("power 1, ridge to the mean", "power(exponent=1)"),
    _variant("power 1/2, no ridge", "power(ridge=0)"),
    _variant("power 1/2, half-flattened", "power >> half_flatten"),
    Entry("anchored at the mean", "anchored", "least squares"),
    _variant("anchored at Iso-C", "anchored(ridge=1.5, towards=iso_c)"),
    *_of(
        "spectral",
        "tsv_m", "iso_c", "iso_cts", "dc_merge", "cart", "star >> average", "average >> subspace_boosting",
        "task_arithmetic >> svc", "tsv_m >> svc(alpha=1)", "opcm", "orthomerge",
    ),
    *(Entry(m, m, "spectral", variant=True) for m in (
        "tsv_m >> svc(alpha=1) >> scale(0.71)", "task_arithmetic >> svc >> scale(0.71)",
    )),
    Entry("auto", "auto", "chosen by the experts", variant=True),
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
    "peft_cat, peft_svd, peft_linear, knots, core_space": "for adapters, which the suite merges into the weights",
    "disjoint_mean, breadcrumbs_ties, della_linear, ram_plus, lot": "parts or near relatives of a row that is there",
}
CURVE = ("average", "task_arithmetic", "ties", "tsv_m", "iso_c", "dc_merge", "ace", "aswudi", "power", "regmean(a=1)")
# What the fresh zoos are merged by, at defaults: written down before any of their experts was trained.
FRESH = (
    *("average", "task_arithmetic", "ace", "dc_merge", "tsv_m", "opcm", "average >> subspace_boosting", "auto"),
    *("power 1/2, half-flattened", "tsv_m >> svc(alpha=1)", "tsv_m >> svc(alpha=1) >> scale(0.71)"),
    *("task_arithmetic >> svc >> scale(0.71)", "task_arithmetic >> svc", "ties", "iso_c", "ace, eps_rel 7"),
)
QUICK = ("average", "task_arithmetic", "ace", "tsv_m", "ties", "regmean(a=1)")  # of the quick run


def fresh(quick: bool = False) -> list[Entry]:
    """The methods of the fresh zoos; with `quick` some of them."""
    return [entry for entry in entries(FRESH) if entry.method in QUICK or not quick]


def entries(names: Sequence[str] = (), quick: bool = False, variants: bool = False) -> list[Entry]:
    """Those that are asked for by name, or all, with variants or without; with `quick` some of each family.

    Raises:
        CfmergeError: a name that is not there.
    """
    known = {entry.name: entry for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise CfmergeError(f"no method {name!r} in the suite{nearest(name, known)}")
    if names:
        return [known[name] for name in names]
    return [e for e in ENTRIES if (e.method in QUICK or not quick) and (variants or not e.variant)]
