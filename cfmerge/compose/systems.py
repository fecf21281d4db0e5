"""The systems: which composer does each tensor, and a task's delta out of what it keeps.

system    of a matrix             of anything else          a task's delta
emr       shared, masks           the same                  scale masks[t] shared
tall      shared, masks           the same                  masks[t] shared
both      of running statistics   delta                     delta[t]: a variance stays one
tsv_c     up, down                delta                     up[t] down[t];  delta[t]
smile     up, down, router        bias of a linear layer    up[t] down[t];  bias[t]
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cfmerge.compose.slots import mean, whole, whole_of_all
from cfmerge.compose.smile import check_gate, check_top_k
from cfmerge.compose.smile_composer import is_share
from cfmerge.compose.smile_layers import bias_of
from cfmerge.core.call import Call, Options, call_of
from cfmerge.core.part import Composer, Method
from cfmerge.errors import CfmergeError
from cfmerge.methods import registry
from cfmerge.models import Kind, Parameter
from cfmerge.models.patterns import escape
from cfmerge.planning.assign import Assignment, Choose
from cfmerge.recipe import rule_option


def choice(experts: int, asked: Composer) -> Choose:
    """The choice of every parameter's composer, for that many experts, where that one is asked for."""

    def choose(parameter: Parameter, parameters: Mapping[str, Parameter], method: Method) -> Method | None:
        if not isinstance(method, Composer):
            known = ", ".join(registry("composer"))
            raise CfmergeError(
                f"tensor {parameter.name!r}: {method.name} makes one checkpoint, and the result is not one: a rule may "
                f"say keep-base or one of {known}"
            )
        if method.name != asked.name or (asked.sums and method.parameters != asked.parameters):
            raise CfmergeError(
                f"tensor {parameter.name!r}: the result is of {asked.name}; a rule may say keep-base"
                + ("" if asked.sums else f", or {asked.name} with other parameters")
            )
        if method.name == "smile" and method.parameters["top_k"] != asked.parameters["top_k"]:
            raise CfmergeError(
                f"tensor {parameter.name!r}: a rule says top_k={method.parameters['top_k']}, and top_k is one for the "
                f"whole model, {asked.parameters['top_k']}"
            )
        of_all = for_experts(method, experts)
        of_one = OF_ONE.get(method.name)
        return of_one(parameter, parameters, of_all) if of_one else of_all

    return choose


def for_experts(method: Composer, experts: int) -> Composer:
    """The composer for so many experts."""
    return changed(method, experts=experts) if "experts" in call_of(method).options else method


def experts_of(method: Method) -> int:
    """The number of experts that a composer is for."""
    return int(call_of(method).options["experts"])


def changed(method: Method, **options: Any) -> Composer:
    """The composer, some of its options others."""
    call: Call = call_of(method)
    return dataclasses.replace(call, options=Options(call.options | options)).part()  # type: ignore[no-any-return]


def _of_masks(parameter: Parameter, parameters: Mapping[str, Parameter], method: Composer) -> Composer:
    return whole("delta") if parameter.kind is Kind.OTHER else method


def _of_tsv(parameter: Parameter, parameters: Mapping[str, Parameter], method: Composer) -> Composer:
    return method if parameter.layout or len(parameter.shape) == 2 else whole("delta")


def _of_smile(parameter: Parameter, parameters: Mapping[str, Parameter], method: Composer) -> Composer | None:
    """Linear layers and their biases; all else stays, or is the mean."""
    check_top_k(method.parameters["top_k"], experts_of(method))
    if is_linear(parameter):
        gate, n = method.parameters["gate"], parameter.canonical[2]
        try:
            check_gate(gate, n, parameter.name)
        except CfmergeError as error:
            way_out = f": {rule_option(escape(parameter.name), 'keep-base')}" if gate >= n else ""
            raise CfmergeError(f"{error}{way_out}") from None
        return method
    if any(is_linear(one) and bias_of(one.name) == parameter.name for one in _beside(parameter.name, parameters)):
        return whole_of_all("bias", experts_of(method))
    return mean("mean") if method.parameters["others"] == "mean" else None


def without_lone_biases(assignments: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """The assignments; a bias of a linear layer whose weight stays as it is, by a rule say, stays too."""
    weights = {bias_of(name) for name, one in assignments.items() if one.action == "merge" and is_linear(one.parameter)}

    def kept(name: str, one: Assignment) -> Assignment:
        lone = one.label == "bias" and name not in weights
        return dataclasses.replace(one, action="keep-base") if lone else one

    return {name: kept(name, one) for name, one in assignments.items()}


def share_of(method: Method) -> float | None:
    """The rank that a look at the deltas settles, as a share of their squared singular values; None: it has no such."""
    rank = method.parameters["rank"] if method.name == "smile" else None
    return rank if is_share(rank) else None


def is_linear(parameter: Parameter) -> bool:
    """Whether the tensor is the weight of a linear layer."""
    return parameter.kind is Kind.MATRIX and bool(parameter.layout)


def _beside(name: str, parameters: Mapping[str, Parameter]) -> list[Parameter]:
    stem = name.removesuffix("bias")
    return [parameters[own] for end in ("weight", "kernel") if (own := stem + end) in parameters and own != name]


OF_ONE: Mapping[str, Callable[[Parameter, Mapping[str, Parameter], Composer], Composer | None]] = {
    "emr": _of_masks, "tall": _of_masks, "tsv_c": _of_tsv, "smile": _of_smile,
}  # fmt: skip
