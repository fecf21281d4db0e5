"""Methods as text, `trim(density=0.2) >> disjoint_mean`, and back."""

import ast
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from cfmerge.core.chain import chain, is_chain, links
from cfmerge.core.numbers import TRACED, marked, plain_number
from cfmerge.core.part import Method, Part
from cfmerge.core.registry import Entry, entry
from cfmerge.errors import CfmergeError, nearest

NONE = {"none", "null"}  # as texts have it


def expression(part: Part) -> str:
    """The part as text that `make` reads: `trim(density=0.2) >> disjoint_mean()`, with what differs from defaults."""
    if is_chain(part):
        return " >> ".join(expression(link) for link in links(part))
    if part.call is None:
        return part.name
    defaults = {key: p.default for key, p in inspect.signature(part.call.factory).parameters.items()}
    shown = {key: value for key, value in part.parameters.items() if defaults.get(key) is not value}
    changed = {key: _text(value) for key, value in shown.items() if _text(value) != _text(defaults.get(key))}
    return f"{part.name}({', '.join(f'{key}={value}' for key, value in changed.items())})" if changed else part.name


def _text(value: Any) -> str:
    return expression(value) if isinstance(value, Part) else repr(plain_number(value))


def make(name: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """The method of that name, with parameters as a recipe or a command line gives them.

        >>> methods.make("ace", {"eps_rel": "0.1"}).parameters["eps_rel"]
        0.1
        >>> methods.make("trim(density=0.2) >> disjoint_mean").name
        'trim >> disjoint_mean'

    The name may be an expression that chains transforms with a method: `trim(density=0.2) >> disjoint_mean`.
    Strings are read as the type that the parameter is annotated with (`"1e-5"` as a number).

    Raises:
        CfmergeError: unknown name or parameter (with the nearest ones), or a value of another type.
    """
    part = make_part(name, parameters)
    if not isinstance(part, Method):
        raise CfmergeError(
            f"{name} is a transform, not a method: chain it with one, such as '{name} >> average' or "
            f"'task_arithmetic(scale=0.3) >> {name}'"
        )
    return part


def make_part(text: str, parameters: Mapping[str, Any] | None = None) -> Any:
    """`make`, for a method or a transform."""
    if re.fullmatch(r"\s*\w+\s*", text):
        return _named(entry(text.strip()), parameters or {})
    if parameters:
        raise CfmergeError(f"method {text!r}: write the parameters into the expression, found {dict(parameters)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise CfmergeError(f"method {text!r} cannot be read; write NAME(key=value) >> NAME(key=value)") from None
    return _built(tree, text)


def _built(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return chain(_built(node.left, text), _built(node.right, text))
    if isinstance(node, ast.Name):
        return _named(entry(node.id), {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        called = entry(node.func.id)
        keys = list(called.signature)
        if len(node.args) > len(keys):
            raise CfmergeError(f"method {text!r}: {called.name} has {len(keys)} parameters, found {len(node.args)}")
        given = [*zip(keys, node.args, strict=False), *((str(k.arg), k.value) for k in node.keywords)]
        return _named(called, {key: _literal(value, text) for key, value in given})
    raise CfmergeError(f"method {text!r} cannot be read at {ast.unparse(node)!r}; write NAME(key=value) >> NAME")


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in NONE:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _built(node, text)


def _named(called: Entry, parameters: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(called.factory, include_extras=True)
    arguments = {}
    for key, value in parameters.items():
        if key not in called.signature:
            raise CfmergeError(f"method {called.name!r} has no parameter {key!r}{nearest(key, called.signature)}")
        arguments[key] = _converted(called.name, key, value, hints[key])
    missing = [key for key, p in called.signature.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise CfmergeError(f"method {called.name!r} needs a value for {missing[0]!r}: {called.describe(missing[0])}")
    return called.factory(**arguments)


def _converted(method: str, key: str, value: Any, hint: Any) -> Any:
    if marked(hint, TRACED):
        return _numeric(method, key, value)
    if isinstance(value, Part) or value is None:
        return value
    if any(issubclass(h, Part) for h in (hint, *typing.get_args(hint)) if isinstance(h, type)):
        return make_part(value)
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        if str(value).lower() in NONE and type(None) in typing.get_args(hint):
            return None
        raise CfmergeError(f"method {method!r}, parameter {key!r}: {error}, got {value!r}") from None


def _numeric(method: str, key: str, value: Any) -> Any:
    """Texts turned into numbers, at any depth of a value's form."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise CfmergeError(f"method {method!r}, parameter {key!r}: {value!r} cannot be read") from None
    if isinstance(value, str):
        if value.lower() in {*NONE, ""}:
            return None
        try:
            return float(value)
        except ValueError:
            raise CfmergeError(f"method {method!r}, parameter {key!r}: expected a number, got {value!r}") from None
    if isinstance(value, bool):
        raise CfmergeError(f"method {method!r}, parameter {key!r}: expected a number, got {value!r}")
    if isinstance(value, Mapping):
        return {k: v if k == "match" else _numeric(method, key, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_numeric(method, key, item) for item in value]
    return value
