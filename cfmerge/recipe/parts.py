"""The parts of a recipe: experts, renames, rules, runs of layers."""

import re
from typing import Any, Literal

import msgspec

from cfmerge.models import Kind


class Rename(msgspec.Struct, forbid_unknown_fields=True, rename={"pattern": "from"}):
    r"""A rule that turns an expert's tensor names into the base's: a regular expression, and the text in its place.

        >>> other = cfmerge.Expert("renamed", rename=[cfmerge.Rename(r"^dense\.", "layer.")])
        >>> plan = cfmerge.plan("base", [cfmerge.Expert("math"), other], "average")
        >>> plan.jobs[1].sources
        ('layer.weight', 'layer.weight')

    Raises:
        ValueError: the pattern is no regular expression.
    """

    pattern: str  # `from` in a recipe; `to` refers to its groups by \\1, \\2, ...
    to: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`from: {self.pattern}` is no regular expression: {error}") from None


class Expert(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One expert: its path, its name in messages and outputs, and its weight.

    >>> experts = [cfmerge.Expert("math", weight=3.0), cfmerge.Expert("code", name="python")]
    >>> plan = cfmerge.plan("base", experts, "average")
    >>> [(expert.name, expert.weight) for expert in plan.expert_specs]
    [('math', 3.0), ('python', 1.0)]
    """

    path: str
    name: str = ""
    weight: float | dict[str, Any] | list[Any] = 1.0  # a number, a gradient over depth, or values by name
    moments: str = ""  # a file of measurements: input Grams, diagonal Fishers
    rename: list[Rename] = []  # applied to its names, before the recipe's own
    adapter: str = ""  # an adapter over the model at `path`, which then are the expert together
    partial: bool = False  # it is a part of the base, or holds one: other tensors are merged without it


class Rule(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """An exception for the tensors whose name or kind matches. The first rule that matches a tensor wins.

        >>> rules = [cfmerge.Rule("*.bias", method="keep-base"), cfmerge.Rule(kinds=["matrix"], method="tsv_m")]
        >>> plan = cfmerge.plan("base", ["math", "code"], rules=rules)
        >>> sorted(plan.counts())
        [('matrix', 'tsv_m'), ('vector', 'keep-base')]

    Raises:
        ValueError: neither `match` nor `kinds`.
    """

    match: str = ""  # a glob over the whole name: * any characters, ? one, [..] a set; none: any name
    method: str = ""  # a method's name, or `keep-base` or `skip` (left out of the output)
    parameters: dict[str, Any] = {}
    kind: Kind | None = None
    layout: str = ""  # one letter per axis: o output, i input, b stacked
    kinds: list[Kind] = []  # only tensors of these kinds; none: any kind

    def __post_init__(self) -> None:
        if not self.match and not self.kinds:
            raise ValueError("a rule needs `match` (a pattern of names) or `kinds`")


class LayerExpert(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """An expert in a run of layers: its name in the recipe, and what differs there.

    >>> run = cfmerge.Layers(range=(0, 12), experts=[cfmerge.LayerExpert("code", range=(4, 16), weight=0.5)])
    >>> run.experts[0].range
    (4, 16)
    """

    name: str
    range: tuple[int, int] | None = None  # its own layers that meet the base's, as many; none: the run's
    weight: float | dict[str, Any] | list[Any] | None = None  # none: the expert's own


class Layers(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A run of layers of the output. Several make a stack, in which layers repeat, are left out or come from others.

        >>> recipe = cfmerge.Recipe("base", layers=[cfmerge.Layers((0, 24)), cfmerge.Layers((8, 32), base="math")])
        >>> recipe.layers[1].range
        (8, 32)

    Raises:
        ValueError: a range without layers, or a scale of what is merged.
    """

    range: tuple[int, int] | None = None  # of the base: the first layer, and one past the last; none: all of them
    base: str = ""  # another model in place of the recipe's base
    experts: list[str | LayerExpert] | None = None  # which of the recipe's take part; none: all; []: it is copied
    method: str = ""  # none: the recipe's
    parameters: dict[str, Any] = {}  # gradients run over the run
    scale: float | dict[str, Any] | list[Any] | None = None  # a factor of layers that are copied

    def __post_init__(self) -> None:
        inner = [one.range for one in self.experts or [] if isinstance(one, LayerExpert)]
        for first, end in filter(None, (self.range, *inner)):
            if not 0 <= first < end:
                raise ValueError(f"`range: [{first}, {end}]` has no layers; write the first, and one past the last")


class Align(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Models of different initialisation: each is brought into the order of one of them, as it is read.

    >>> recipe = cfmerge.Recipe("base", ["math", "code"], "average", align=cfmerge.Align(method="many", seed=1))
    >>> recipe.align.to
    'base'
    """

    to: str = "base"  # the model whose order all others take: base, or an expert's name
    method: Literal["weights", "many", "universe", "activations"] = "weights"
    moments: str = ""  # joint feature moments, for `activations`
    spaces: str = ""  # a table of one's own; none: the family's, known by the names of the tensors
    seed: int = 0  # of the order in which spaces are matched
    sweeps: int = 100  # at most
