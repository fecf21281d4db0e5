"""mergekit's merge methods in words of cfmerge: their parameters, and the method that each is here.

The formulas are the same, but for what docs/mergekit.md lists. Arithmetic is in float32 at least.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from cfmerge.mergekit.parameters import Parameter, by_expert, mapped

Base = Literal["required", "optional", "member"]
Made = tuple[str, dict[str, Any]]


class Given(NamedTuple):
    """The values of a merge: those shared by all models, each expert's own, and whether a base model takes part."""

    shared: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]  # {parameter: {expert: value}}
    base: bool

    def each(self, name: str) -> Any:
        return by_expert(self.own[name])


class Translation(NamedTuple):
    """A method of mergekit.

    Attributes:
        parameters: by name.
        base: whether the base model must be named, may be, or is one more model that is merged.
        experts: how many models beside the base, at least and at most.
        made: the method here, and its parameters.
        idle: parameters that mergekit takes and that change nothing.
    """

    parameters: Mapping[str, Parameter]
    base: Base
    experts: tuple[int, int | None]
    made: Callable[[Given], Made]
    idle: tuple[str, ...] = ()


def flag(default: bool) -> Parameter:
    return Parameter(bool, default)


def own(default: float | None = None) -> Parameter:
    return Parameter(float, default, own=True, required=default is None)


def shared(default: float | None = None) -> Parameter:
    return Parameter(float, default, required=default is None)


Sparse = Literal["none", "magnitude", "random", "outliers", "rank"]
NAMES: Mapping[str, tuple[Sparse, bool]] = {  # how deltas are thinned out, and whether signs are elected
    "task_arithmetic": ("none", False), "ties": ("magnitude", True), "dare_linear": ("random", False),
    "dare_ties": ("random", True), "breadcrumbs": ("outliers", False), "breadcrumbs_ties": ("outliers", True),
    "della": ("rank", True), "della_linear": ("rank", False),
}  # fmt: skip


def _of_deltas(name: str) -> Translation:
    """The translation of one of the methods that sum deltas, thinned out or not."""
    sparse, elected = NAMES[name]
    parameters = {
        "weight": own(), "density": own(1.0), "lambda": shared(1.0), "int8_mask": flag(False),
        "normalize": flag(name in {"ties", "della"}), "rescale": flag(sparse in {"random", "rank"}),
        **({"gamma": own(0.01)} if sparse == "outliers" else {}),
        **({"epsilon": own(0.15)} if sparse == "rank" else {}),
    }  # fmt: skip

    def made(given: Given) -> Made:
        values: dict[str, Any] = {"scale": given.shared["lambda"]}
        normalise = given.shared["normalize"]
        values |= {"combine": "mean" if normalise else "sum"} if elected else {"normalise": normalise}
        if sparse == "none":
            return name, values
        values["rescale"] = "l1" if given.shared["rescale"] else "none"
        if sparse == "random":
            values["p"] = by_expert({expert: mapped(d, _dropped) for expert, d in given.own["density"].items()})
        else:
            values["density"] = given.each("density")
        if sparse == "outliers":
            values["gamma"] = given.each("gamma")
        if sparse == "rank":  # with density 1 nothing is dropped, whatever epsilon is
            density = given.own["density"]
            values["epsilon"] = by_expert({e: 0.0 if density[e] == 1 else v for e, v in given.own["epsilon"].items()})
        if sparse == "magnitude":
            return name, {**values, "variant": "mergekit", "count": "some"}
        return name, {**values, "zero": "positive"} if elected else values

    idle = ("int8_mask", "density", "rescale") if sparse == "none" else ("int8_mask",)
    return Translation(parameters, "required", (1, None), made, idle)


def _dropped(density: float) -> float:
    return round(1 - density, 15)


def _on(given: Given) -> str:
    return "deltas" if given.base else "weights"


METHODS: Mapping[str, Translation] = {
    "linear": Translation(
        {"weight": own(), "normalize": flag(True)}, "member", (1, None),
        lambda given: ("linear", {"normalise": given.shared["normalize"]}),
    ),
    "slerp": Translation({"t": shared()}, "required", (1, 1), lambda given: ("slerp", dict(given.shared))),
    "nuslerp": Translation(
        {"weight": own(), "nuslerp_flatten": flag(True), "nuslerp_row_wise": flag(False)}, "optional", (2, 2),
        lambda given: ("nuslerp", {
            "flatten": given.shared["nuslerp_flatten"], "row_wise": given.shared["nuslerp_row_wise"], "on": _on(given),
        }),
    ),
    "multislerp": Translation(
        {"weight": own(), "normalize_weights": flag(True), "eps": shared(1e-8)}, "optional", (2, None),
        lambda given: ("multislerp", {
            "normalise_weights": given.shared["normalize_weights"], "eps": given.shared["eps"], "on": _on(given),
        }),
    ),
    "karcher": Translation(
        {"max_iter": Parameter(int, 10), "tol": shared(1e-5)}, "optional", (1, None),
        lambda given: ("karcher", {**given.shared, "with_base": given.base}),
    ),
    **{name: _of_deltas(name) for name in NAMES},
    "model_stock": Translation(
        {"filter_wise": flag(False)}, "required", (2, None),
        lambda given: ("model_stock", {**given.shared, "clamp": False}),
    ),
    "sce": Translation(
        {"select_topk": shared(1.0), "int8_mask": flag(False)}, "required", (1, None),
        lambda given: ("sce", {"density": given.shared["select_topk"], "uniform_below": 1e-6}), ("int8_mask",),
    ),
    "ram": Translation(
        {"epsilon": shared(1e-5)}, "required", (1, None), lambda given: ("ram", {"threshold": given.shared["epsilon"]}),
    ),
    "ramplus_tl": Translation(
        {"epsilon": shared(1e-5), "r": shared(0.1), "alpha": shared(0.2)}, "required", (1, None),
        lambda given: ("ram_plus", {
            "threshold": given.shared["epsilon"], "r": given.shared["r"], "alpha": given.shared["alpha"],
        }),
    ),
    "nearswap": Translation({"t": shared()}, "required", (1, 1), lambda given: ("nearswap", dict(given.shared))),
    "arcee_fusion": Translation({}, "required", (1, 1), lambda given: ("arcee_fusion", {})),
    "passthrough": Translation({"scale": own(1.0)}, "optional", (0, 0), lambda given: ("average", {})),
}  # fmt: skip
