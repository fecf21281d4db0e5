"""Rules: how one model is made of a base and the experts that have come so far, oldest first.

With the base `theta_0`, experts `theta_1 .. theta_t` in order, and `merge` by a technique over `theta_0`

    base    theta_0
    last    theta_t
    paint   merge(theta_0, theta_t)                    no history
    ema     r_s = merge(r_{s-1}, theta_s)              r_0 = theta_0, or r_1 = theta_1
    all     merge(theta_1 .. theta_t)                  one merge of all, uniform or weighted by time

A rule serves on both axes of TIME: for the model from which the next task starts (`base`: zero-shot, `last`:
fine-tuned, `all`: merged), and for the one that is deployed (`all`: offline merging). Without an expert every rule
gives the base.

S. Dziadzio et al., How to Merge Your Multimodal Models Over Time?, CVPR 2025, arXiv 2412.06712.
"""

import ast
import math
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import msgspec

from cfmerge.core.part import Method
from cfmerge.errors import CfmergeError, nearest
from cfmerge.planning.jobs import as_method

R = TypeVar("R", bound="_Rule")
ByTime = Literal["uniform", "linear", "sqrt", "squared", "cubed", "fifth", "tenth", "exponential", "log"]
# weights of element i = 1 .. n, oldest first, before they are normalised
BY_TIME: dict[str, Callable[[int], float]] = {
    "uniform": lambda i: 1.0,
    "linear": float,
    "sqrt": math.sqrt,
    "squared": lambda i: i**2.0,
    "cubed": lambda i: i**3.0,
    "fifth": lambda i: i**5.0,
    "tenth": lambda i: i**10.0,
    "exponential": lambda i: 2.0 ** (i - 1),
    "log": lambda i: math.log(i + 1),
}


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="rule"):
    """A rule; its text is read by `rule`."""

    @property
    def name(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def text(self) -> str:
        """The rule as `rule` reads it, without what has its default."""
        given = {key: value for key, value in msgspec.to_builtins(self).items() if key != "rule"}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" if given else self.name

    def completed(self: R, technique: str | None, weight: float | None) -> R:
        """The rule with a technique and a weight where it has none of its own."""
        usual = {"technique": technique, "weight": weight}
        fields = [key for key in usual if key in self.__struct_fields__ and getattr(self, key) is None]
        return msgspec.structs.replace(self, **{key: usual[key] for key in fields if usual[key] is not None})

    def check(self) -> None:
        """Raises `CfmergeError` where the rule's parts disagree."""


class Base(_Rule, tag="base", frozen=True):
    """The base, every time: zero-shot initialisation."""


class Last(_Rule, tag="last", frozen=True):
    """The newest expert: sequential fine-tuning."""


class _Pairwise(_Rule, frozen=True):
    technique: str | None = None  # a method's text; none: average, which interpolates
    weight: float | None = None  # of the newest; 1 less it is of the other. Interpolation needs it.

    @property
    def method(self) -> Method:
        return as_method(self.technique or "average")

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of the running model and of the newest expert."""
        return (1.0, 1.0) if self.weight is None else (1 - self.weight, self.weight)

    def check(self) -> None:
        method = _check_technique(self.text, self.method)
        if self.weight is None and interpolates(method):
            raise CfmergeError(
                f"{self.text}: {method.name} interpolates: name the weight of the newest expert, between 0 and 1, such "
                "as weight=0.5 (the article does not tell the one that it tuned)"
            )
        if self.weight is not None and method.needs.weights == "none":
            raise CfmergeError(f"{self.text}: {method.name} knows no weights; leave weight={self.weight} out")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise CfmergeError(f"{self.text}: the weight of the newest expert lies in [0, 1], found {self.weight}")
        _check_count(self.text, method, 2)
        if method.name == "model_stock" and getattr(self, "seed", "base") == "base":
            raise CfmergeError(
                f"{self.text}: model_stock goes by the angle between two deltas, and the base, which is merged first, "
                "has none; use ema(seed=first), or another technique"
            )


class Paint(_Pairwise, tag="paint", frozen=True):
    """The base and the newest expert, merged; the experts before are forgotten."""


class Ema(_Pairwise, tag="ema", frozen=True):
    """A running model, merged with each expert in turn.

    By interpolation with weight w on the new: `r_t = (1-w)^t theta_0 + sum_s w (1-w)^(t-s) theta_s`; seeded by the
    first, `theta_1` has `(1-w)^(t-1)` and the base nothing. By task arithmetic with scale s:
    `theta_0 + sum_s s^(t-s+1) D_s`.
    """

    seed: Literal["base", "first"] = "base"  # what the running model begins with


class All(_Rule, tag="all", frozen=True):
    """One merge of all experts: merged initialisation, offline merging.

    Element i of n has the weight i, sqrt(i), i^2, i^3, i^5, i^10, 2^(i-1) or ln(i+1) by `by_time`, normalised;
    `backwards` gives the oldest the weight of the newest.
    """

    technique: str | None = None
    by_time: ByTime = "uniform"
    backwards: bool = False
    with_base: bool = False  # the base is an expert too, the oldest

    @property
    def method(self) -> Method:
        return as_method(self.technique or "average")

    @property
    def adds_up(self) -> bool:
        """Whether an expert's weight, before it is normalised, is the same however many come after it."""
        return not self.backwards

    def weights(self, count: int) -> list[float]:
        """Weights of the elements, oldest first, not normalised."""
        forwards = [BY_TIME[self.by_time](i) for i in range(1, count + 1)]
        return forwards[::-1] if self.backwards else forwards

    def check(self) -> None:
        method = _check_technique(self.text, self.method)
        timed = self.by_time != "uniform"
        if timed and not interpolates(method):
            raise CfmergeError(
                f"{self.text}: weights by time are for interpolation (technique 'average'), not for {method.name}; "
                "leave by_time out, or choose average"
            )
        if self.backwards and not timed:
            raise CfmergeError(f"{self.text}: backwards turns weights by time round; name them with by_time=")
        most = method.needs.experts[1]
        if most is not None:
            raise CfmergeError(
                f"{self.text}: {method.name} takes {most} expert{'s' if most > 1 else ''} at most, and `all` merges "
                "every expert that has come; use `ema`, which merges two at a time, or another technique"
            )


Rule = Base | Last | Paint | Ema | All
NAMES = {kind.__struct_config__.tag: kind for kind in get_args(Rule)}
# the article's words, and its code's, for the same
ALIASES = {
    "zero_shot": "base", "zs": "base", "fine_tuned": "last", "ft": "last", "unrolled": "ema", "merged": "all",
    "offline": "all",
}  # fmt: skip
# (init, deploy) by the names of the article and of its code
PROTOCOLS = {
    "best-in-time": ("ema", "ema"), "sequential": ("last", "last"), "offline": ("base", "all"),
    "isolated": ("base", "last"), "zs-paint": ("base", "ema"), "ft-paint": ("paint", "paint"),
}  # fmt: skip


def rule(text: "str | Rule") -> Rule:
    """The rule that a text names: `ema(weight=0.3)`, `all(by_time=squared)`, `ema(technique=ties(density=0.3))`.

        >>> temporal.rule("ema(weight=0.3, technique=ties(density=0.2))").technique
        'ties(density=0.2)'
        >>> temporal.rule("zero-shot").name, temporal.rule("offline(by_time=sqrt)").text
        ('base', "all(by_time='sqrt')")

    Names of the article are understood: zero-shot (base), fine-tuned (last), merged and offline (all).

    Raises:
        CfmergeError: an unknown name or key (with the nearest), or a value of another type.
    """
    if not isinstance(text, str):
        return text
    name, opening, rest = text.strip().partition("(")
    key = name.strip().replace("-", "_").lower()
    key = ALIASES.get(key, key)
    if key not in NAMES:
        known = [*NAMES, *(alias.replace("_", "-") for alias in ALIASES)]
        raise CfmergeError(f"unknown rule {name.strip()!r}{nearest(name.strip(), known)}")
    given = _arguments(f"{key}{opening}{rest}", text)
    kind = NAMES[key]
    unknown = [one for one in given if one not in kind.__struct_fields__]
    if unknown:
        raise CfmergeError(f"rule {text!r}: {key} has no {unknown[0]!r}{nearest(unknown[0], kind.__struct_fields__)}")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"rule {text!r}: {error}") from None


def _arguments(call: str, text: str) -> dict[str, Any]:
    """The keywords of a call as values; a name or a call among them is its text."""
    try:
        tree = ast.parse(call, mode="eval").body
    except SyntaxError:
        tree = None
    if isinstance(tree, ast.Name):
        return {}
    if not isinstance(tree, ast.Call) or tree.args or not all(one.arg for one in tree.keywords):
        raise CfmergeError(f"rule {text!r} cannot be read; write NAME(key=value), such as ema(weight=0.5)")
    return {str(one.arg): _value(one.value) for one in tree.keywords}


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def protocol(name: str) -> tuple[Rule, Rule]:
    """The rules (init, deploy) of a protocol of the article, by its name.

    >>> [one.name for one in temporal.protocol("best-in-time")]
    ['ema', 'ema']
    """
    key = name.strip().lower().replace("_", "-")
    if key not in PROTOCOLS:
        raise CfmergeError(f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}")
    init, deploy = PROTOCOLS[key]
    return rule(init), rule(deploy)


def name_of(number: int, task: str) -> str:
    """An expert's name in merges, of which random techniques make their keys."""
    safe = re.sub(r"[^\w=-]+", "_", task)
    return f"{number:04d}-{safe.encode()[:80].decode(errors='ignore')}"


def name_through(number: int) -> str:
    """The name of a running model in merges; 0 is the base that it begins with."""
    return f"through-{number:04d}"


def interpolates(method: Method) -> bool:
    """Whether the method is a mean by the experts' weights, which sum to 1."""
    return method.name in {"average", "linear"} and method.needs.normalises


def _check_technique(text: str, method: Method) -> Method:
    if method.needs.moments:
        raise CfmergeError(f"{text}: {method.name} needs measurements of every expert, which a running model has not")
    if method.needs.factors == "required":
        raise CfmergeError(f"{text}: {method.name} takes the factors of adapters, and experts are merged as models")
    return method


def _check_count(text: str, method: Method, count: int) -> None:
    least, most = method.needs.experts
    if count < least or (most is not None and count > most):
        raise CfmergeError(f"{text}: {method.name} does not take {count} experts, a running model and the newest")
