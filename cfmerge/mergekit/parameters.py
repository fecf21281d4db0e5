"""Values of mergekit's parameters, in the forms of a recipe's numbers.

A value is a scalar, a gradient over the layers (a list), or a list of `{filter, value}`, of which the first whose
filter is a part of the tensor's name holds. It is looked up in the parameters of the model, then of the slice, then of
the document; where no filter of one hits, the next is asked:

    density: [{filter: mlp, value: [0.1, 0.5]}]                                  mergekit's
    density: [{match: "*mlp*", value: {gradient: [0.1, 0.5]}}, {value: 1.0}]     a recipe's
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.patterns import escape


class Parameter(NamedTuple):
    """A parameter of one of mergekit's methods.

    Attributes:
        kind: float, int or bool.
        default: its value where none is given; None: it must be given (`required`) or nothing happens.
        own: each model has its own; otherwise one is shared by all.
    """

    kind: type
    default: Any = None
    own: bool = False
    required: bool = False


Scopes = Sequence[Mapping[str, Any] | None]  # from the nearest to the document's


def check_names(
    scope: Mapping[str, Any] | None, known: Mapping[str, Parameter], who: str, method: str, of_model: bool
) -> None:
    """Raises `CfmergeError` if a parameter is unknown, or is one for all models and given for one."""
    for name in scope or {}:
        if name not in known:
            raise CfmergeError(f"{who}: merge_method {method} has no parameter {name!r}{nearest(name, known)}")
        if of_model and not known[name].own:
            raise CfmergeError(
                f"{who}: {name!r} of {method} is one for all models, so that mergekit reads it from no model; write it "
                "below the `parameters:` of the document or of the slice"
            )


def number(name: str, parameter: Parameter, scopes: Scopes, who: str) -> Any:
    """A recipe's number: one, a gradient, or values by name with the default at their end; None: nothing is said.

    Raises:
        CfmergeError: a required one is missing, or a value has another form.
    """
    cases = _cases(name, parameter, scopes, who)
    if parameter.required and not cases:
        raise CfmergeError(f"{who}: parameter {name!r} is missing, which this method needs")
    closed = bool(cases) and cases[-1][0] is None
    if not cases or (not closed and not parameter.required):
        cases = [*cases, (None, parameter.default)]
    if cases[0][0] is None:
        return cases[0][1]
    return [{**({} if part is None else {"match": f"*{escape(part)}*"}), "value": value} for part, value in cases]


def setting(name: str, parameter: Parameter, scopes: Scopes, who: str) -> Any:
    """A switch or a count, which is one for all tensors.

    Raises:
        CfmergeError: it differs from tensor to tensor, or is none.
    """
    found = number(name, parameter, scopes, who)
    if isinstance(found, list | dict):
        raise CfmergeError(
            f"{who}: {name!r} differs from tensor to tensor, and a recipe has one for all; write the merge as a recipe "
            "of cfmerge, with a rule for each (docs/recipe.md)"
        )
    return found


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The form with a function of every number in it."""
    if isinstance(value, dict):
        return {key: [function(one) for one in stops] for key, stops in value.items()}
    if isinstance(value, list):
        return [{**one, "value": mapped(one["value"], function)} for one in value]
    return function(value)


def by_expert(values: Mapping[str, Any]) -> Any:
    """`{expert: form}` as one form: the same for all, or one for each."""
    forms = list(values.values())
    return forms[0] if all(form == forms[0] for form in forms) else {"experts": dict(values)}


def _cases(name: str, parameter: Parameter, scopes: Scopes, who: str) -> list[tuple[str | None, Any]]:
    """`(filter, value)` in the order in which they are asked, up to the first without a filter."""
    cases: list[tuple[str | None, Any]] = []
    for scope in scopes:
        if scope is None or name not in scope:
            continue
        given = scope[name]
        for part, value in _conditions(given, f"{who}: parameter {name!r}"):
            cases.append((part, _value(value, parameter, f"{who}: parameter {name!r}")))
            if part is None:
                return cases
    return cases


def _conditions(given: Any, who: str) -> list[tuple[str | None, Any]]:
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list) or not any(isinstance(one, dict) for one in given):
        return [] if given == [] or given is None else [(None, given)]
    found = []
    for one in given:
        if not isinstance(one, dict) or not {"value"} <= set(one) <= {"value", "filter"}:
            raise CfmergeError(f"{who}: {one!r} is not {{filter: TEXT, value: VALUE}}")
        part = one.get("filter")
        found.append((None if part in (None, "*") else str(part), one["value"]))
    return found


def _value(value: Any, parameter: Parameter, who: str) -> Any:
    if isinstance(value, list):
        stops = [_scalar(one, parameter.kind, who) for one in value]
        if parameter.kind is not float:
            raise CfmergeError(f"{who}: {value!r} is a gradient, which a {parameter.kind.__name__} cannot have")
        if not stops:
            raise CfmergeError(f"{who}: a gradient without values")
        return stops[0] if len(set(stops)) == 1 else {"gradient": stops}
    return _scalar(value, parameter.kind, who)


def _scalar(value: Any, kind: type, who: str) -> Any:
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind is float and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        pass
    raise CfmergeError(f"{who}: expected {wanted}, found {value!r}")
