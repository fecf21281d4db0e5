"""The method, or another action, for every parameter."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from cfmerge import methods
from cfmerge.core.chain import is_chain
from cfmerge.errors import CfmergeError, nearest
from cfmerge.methods import Method
from cfmerge.models import Kind, Parameter, check_layout, is_buffer, is_counter, is_float
from cfmerge.recipe import Rule

Action = Literal["merge", "keep-base", "skip"]
# The method of one of the parameters, given the one that is asked for; None: it is kept from the base.
Choose = Callable[[Parameter, Mapping[str, Parameter], Method], Method | None]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A parameter and the action on it. `method` is used when the action is `merge`.

    `settled`: the recipe names the model whose integers the output has, so that the experts may have others.
    """

    parameter: Parameter
    action: Action
    method: Method
    rule: Rule | None = None
    settled: bool = False

    @property
    def label(self) -> str:
        return self.method.name if self.action == "merge" else self.action

    @property
    def agree(self) -> bool:
        """Integers and booleans are not merged: the experts must agree with the base, unless a rule says so."""
        free = self.settled or self.rule is not None or is_counter(self.parameter.name)
        return not is_float(self.parameter.dtype) and not free


def assign(
    parameters: Mapping[str, Parameter],
    method: Method,
    rules: Sequence[Rule] = (),
    others: Iterable[str] = (),
    instead: Mapping[str, Method | None] | None = None,
    choose: Choose | None = None,
) -> dict[str, Assignment]:
    """The action on every parameter.

    By default matrices and convolutions go through the method, everything else that is floating-point gets the
    mean of the deltas, and integers stay as they are in the base; an entrywise method takes all floating-point
    parameters but running statistics. The first rule whose pattern matches a name overrides this.

    Args:
        others: names that the base lacks, which a rule may skip.
        instead: by name a method in place of `method`; None: the tensor is kept from the base.
        choose: the method for every floating-point parameter, in place of the defaults.

    Raises:
        CfmergeError: a rule matches nothing, names an unknown method, or a layout that does not fit.
    """
    average = methods.make("average")

    def usual(parameter: Parameter, own: Method | None) -> Assignment:
        if choose is None:
            return _default(parameter, own, average) if own else Assignment(parameter, "keep-base", average)
        floats = is_float(parameter.dtype) and not is_buffer(parameter.name, parameter.shape)
        chosen = choose(parameter, parameters, own) if own and floats else None
        return Assignment(parameter, "merge", chosen) if chosen else Assignment(parameter, "keep-base", average)

    made = [_rule_method(rule, method) for rule in rules]
    used = [False] * len(rules)
    result = {}
    for name, parameter in parameters.items():
        number = next((i for i, rule in enumerate(rules) if _matches(rule, parameter)), None)
        own = (instead or {}).get(name, method)
        if number is None:
            result[name] = usual(parameter, own)
            continue
        rule, used[number] = rules[number], True
        changed = dataclasses.replace(
            parameter, kind=rule.kind or parameter.kind, layout=rule.layout or parameter.layout
        )
        if rule.layout:
            changed = dataclasses.replace(changed, note="")
            check_layout(name, parameter.shape, rule.layout)
        if rule.method in {"keep-base", "skip"}:
            result[name] = Assignment(changed, rule.method, average, rule)  # type: ignore[arg-type]
        elif rule.method or rule.parameters:
            asked = _explicit(changed, made[number] or method, rule)
            result[name] = dataclasses.replace(usual(changed, asked.method), rule=rule) if choose else asked
        else:
            result[name] = dataclasses.replace(usual(changed, own or method), rule=rule)
    _check_used(rules, used, parameters, others)
    return result


def _matches(rule: Rule, parameter: Parameter) -> bool:
    return _fits(parameter.name, rule) and (not rule.kinds or parameter.kind in rule.kinds)


def _fits(name: str, rule: Rule) -> bool:
    return not rule.match or fnmatch.fnmatchcase(name, rule.match)


def treated_apart(rules: Sequence[Rule], one: str, other: str) -> bool:
    """Whether a rule takes one of two names by its pattern, and not the other."""
    return any(rule.match and _fits(one, rule) != _fits(other, rule) for rule in rules)


def _rule_method(rule: Rule, method: Method) -> Method | None:
    if rule.method in {"", "keep-base", "skip"}:
        if rule.parameters and not rule.method:
            if is_chain(method):
                raise CfmergeError(
                    f"rule {rule.match!r}: give the method with its parameters: {method.name!r} is a chain"
                )
            return methods.make(method.name, {**method.parameters, **rule.parameters})
        if rule.parameters:
            raise CfmergeError(f"rule {rule.match!r}: {rule.method} takes no parameters")
        return None
    try:
        return methods.make(rule.method, rule.parameters)
    except CfmergeError as error:
        hint = nearest(rule.method, ["keep-base", "skip"]) if "unknown method" in str(error) else ""
        raise CfmergeError(f"rule {rule.match!r}: {error}{hint}") from None


def _default(parameter: Parameter, method: Method, average: Method) -> Assignment:
    if not is_float(parameter.dtype) or is_buffer(parameter.name, parameter.shape):
        return Assignment(parameter, "keep-base", average)
    if parameter.kind is Kind.OTHER:
        return Assignment(parameter, "merge", average)
    if method.needs.scope != "matrix":
        return Assignment(parameter, "merge", method)
    if parameter.kind in {Kind.MATRIX, Kind.CONVOLUTION} and parameter.layout:
        return Assignment(parameter, "merge", method)
    return Assignment(parameter, "merge", average)


def _explicit(parameter: Parameter, method: Method, rule: Rule) -> Assignment:
    if not is_float(parameter.dtype):
        raise CfmergeError(
            f"rule {rule.match!r}: tensor {parameter.name!r} is {parameter.dtype}, which is not merged; "
            "use method keep-base"
        )
    if method.needs.scope == "matrix" and not parameter.layout:
        raise CfmergeError(
            f"rule {rule.match!r}: {method.name} needs the layout of {parameter.name!r}, shape {parameter.shape}; "
            "give it in the rule, such as 'layout: oi' for (out, in)"
        )
    return Assignment(parameter, "merge", method, rule)


def _check_used(rules: Sequence[Rule], used: Iterable[bool], names: Iterable[str], others: Iterable[str]) -> None:
    names, others = list(names), list(others)
    for number, (rule, was_used) in enumerate(zip(rules, used, strict=True)):
        if was_used or rule in rules[:number] or (rule.method == "skip" and any(_fits(name, rule) for name in others)):
            continue
        shadowed = any(_fits(name, rule) for name in names) and not rule.kinds
        raise CfmergeError(
            f"rule {rule.match!r} is never used: "
            + (
                "an earlier rule takes every tensor that it matches; move it up"
                if shadowed
                else "no tensor of these kinds matches it, or an earlier rule takes it"
                if rule.kinds
                else f"no tensor of the base matches it; names look like {names[0]!r}"
            )
        )
