"""Recipes: base, experts, method, rules and choices for doubtful cases, as the user asks for them, validated.

A recipe is a YAML file (or the front of a model card that cfmerge wrote, whose recipe it repeats). Paths are
relative to the current directory.
"""

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec
import yaml

from cfmerge import hub
from cfmerge.errors import CfmergeError, nearest
from cfmerge.models import Kind

FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".npz"}  # ends that are not in an expert's name
Heads = Literal["keep-base", "drop", "export"]
Format = Literal["safetensors", "torch", "msgpack", "npz", "orbax", "orbax-v0", "distributed"]
Allowed = Literal["duplicate-experts", "one-expert", "base-as-expert", "other-base"]


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


class Recipe(msgspec.Struct, forbid_unknown_fields=True):
    """All that a user asks for: the content of a recipe file.

    >>> recipe = cfmerge.Recipe("base", ["math", "code"], "ties", {"density": 0.3})
    >>> recipe.to_yaml().splitlines()[:3]
    ['base: base', 'experts:', '- math']
    >>> cfmerge.make_plan(recipe).counts()["matrix", "ties"]
    1
    """

    base: str
    experts: list[str | Expert] = []
    method: str = "ace"
    parameters: dict[str, Any] = {}
    rules: list[Rule] = []
    rename: list[Rename] = []  # for all experts' names
    components: list[str] = []  # folders of a pipeline that are merged; the others are copied; none: all
    heads: Heads | None = None
    on_nonfinite: Literal["error", "skip-expert"] = "error"
    vocabulary: str | None = None  # the output's tokens: base, union, or an expert's name; none: base, if it has all
    unmerged: str | None = None  # whose integers, buffers and objects the output has: an expert, a path; none: the base
    allow: list[Allowed] = []
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # the output's; none: the base's
    format: Format | None = None  # of the output's files; none: the base's, or as the name of a file says
    dequantize: bool = False  # weights of 8 bits (fp8) with scales count as the bfloat16 that they stand for
    precision: Literal["auto", "float32", "float64"] = "auto"  # the computation's
    shard_size: str = "5GB"
    side_files: str | None = None  # where config and tokenizer come from; none: the base
    seed: int = 0  # for random methods
    plugins: list[str] = []  # Python files that register methods
    statistics: str | None = None  # a directory of statistics to begin from
    download: bool = False  # fetch models that are named as on the hub, and are not in its cache
    cache_dir: str | None = None  # of the Hugging Face hub; none: where huggingface_hub has it
    chat_template: str | None = None  # auto (that of most models), chatml, or Jinja; none: the base's
    layers: list[Layers] = []  # the output's layers, where they are not those of the base one by one
    adapter_out: int | Literal["exact"] | None = None  # the rank of an adapter that is written in place of a model

    def resolved_experts(self, least: int = 2) -> list[Expert]:
        """The experts, each with a name: its own, else that of its directory.

        Raises:
            CfmergeError: none, one without leave, two of one name, or weights that sum to nothing.
        """
        experts = [Expert(path=e) if isinstance(e, str) else e for e in self.experts]
        if len(experts) < min(least, 1) and not self.layers:
            raise CfmergeError("no experts: a merge needs a base and at least two experts")
        if 0 < len(experts) < least and "one-expert" not in self.allow and not self.layers:
            raise CfmergeError(
                f"one expert ({experts[0].path}): there is nothing to merge it with. Give another, or allow it: "
                "--allow one-expert (recipe: 'allow: [one-expert]')"
            )
        seen: dict[str, str] = {}
        named = []
        for expert in experts:
            if isinstance(expert.weight, int | float) and not math.isfinite(expert.weight):
                raise CfmergeError(f"expert {expert.path}: its weight must be finite, found {expert.weight}")
            name = expert.name or _default_name(expert.adapter or expert.path, seen)
            if name in seen:
                raise CfmergeError(
                    f"two experts are called {name!r}: {seen[name]} and {expert.path}; give them other names"
                )
            if re.search(r"[/\\\0]", name) or name in {".", ".."}:
                raise CfmergeError(f"expert name {name!r} cannot be used as a file name")
            seen[name] = expert.path
            named.append(msgspec.structs.replace(expert, name=name))
        return named

    def to_yaml(self) -> str:
        return yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False, allow_unicode=True, width=100)

    def brief(self) -> str:
        """The YAML without the keys that have their defaults."""
        plain = msgspec.to_builtins(Recipe(""))
        said = {key: value for key, value in msgspec.to_builtins(self).items() if value != plain[key]}
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100)


def _default_name(path: str, seen: dict[str, str]) -> str:
    """A name that is not among those `seen`: the directory's, the file's, or the one on the hub."""
    if asked := hub.asked(path):
        org, name, revision = *asked.repository.split("/"), asked.revision.replace("/", "-")
        longer = f"{name}-{revision[:12]}" if revision else f"{org}-{name}"
        return _free(name, [longer, f"{org}-{longer}"], seen)
    pure = Path(path).expanduser()
    real = Path(os.path.realpath(pure))  # of a link in a circle, itself
    cached, single = hub.snapshot(pure), pure.suffix in FILES
    named = cached is not None and (not single or pure.stem in hub.GENERIC)
    name = (cached.name if cached and named else pure.stem if single else real.name) or "expert"
    parent = f"{name}-{cached.commit[:8]}" if cached else f"{real.parent.name}-{name}"
    return _free(name, [parent], seen)


def _free(name: str, longer: list[str], seen: dict[str, str]) -> str:
    """The first name that is not among those `seen`: it, a longer one, or it with a number."""
    candidates = [name, *longer, *(f"{name}-{number}" for number in range(2, len(seen) + 3))]
    return next(candidate for candidate in candidates if candidate not in seen)


def parse(content: Any, source: str) -> Recipe:
    """A recipe from plain values, as YAML gives them; `source` is named in errors.

    Raises:
        CfmergeError: unknown keys (with the nearest known ones), missing keys, values of a wrong type.
    """
    try:
        return msgspec.convert(content, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"{source}: {_explain(str(error))}") from None


def rule_option(match: str, method: str, layout: str = "") -> str:
    """A rule as the command line takes it, such as `--rule "match=*.bias, method=average"`."""
    parts = {key: value for key, value in {"match": match, "method": method, "layout": layout}.items() if value}
    plain = match.isprintable() and match == match.strip() and not re.search(r"[,'\"(){}]", match)
    plain = plain and match.count("[") == match.count("]")
    pairs = ", ".join(f"{key}={value}" for key, value in parts.items())
    text = pairs if plain else json.dumps(parts, ensure_ascii=False)
    return "--rule " + (shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"')


def parse_rule(content: Any) -> Rule:
    """One rule from plain values; raises `CfmergeError` as `parse` does."""
    try:
        return msgspec.convert(content, Rule)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"rule {content!r}: {_explain(str(error), Rule)}") from None


def _explain(message: str, struct: type[msgspec.Struct] | None = None) -> str:
    other = re.fullmatch(r"Invalid enum value '(.*)' - at `\$\.(\w+)`", message, re.DOTALL)
    if other and other[2] in (hints := get_type_hints(Recipe)):
        choices = _choices(hints[other[2]])
        return f"{other[2]}: expected one of {', '.join(choices)}, found {other[1]!r}"
    unknown = re.search(r"unknown field `(.+?)`(?: - at `(.+)`)?", message)
    if not unknown:
        return message
    key, place = unknown.groups()
    inside: dict[str, type[msgspec.Struct]] = {
        "layers[...].experts": LayerExpert, "layers": Layers, "rename": Rename, "experts": Expert, "rules": Rule,
    }  # fmt: skip
    anywhere = re.sub(r"\[\d+\]", "[...]", place or "")
    found = struct or next((kind for part, kind in inside.items() if part in anywhere), Recipe)
    known = [field.encode_name for field in msgspec.structs.fields(found)]
    return f"unknown key {key!r}{f' at {place}' if place else ''}{nearest(key, known)}"


def _choices(hint: Any) -> list[str]:
    """The words that a type allows; `a number` for numbers."""
    if hint is int:
        return ["a number"]
    if isinstance(hint, str):
        return [hint]
    return [choice for inner in get_args(hint) for choice in _choices(inner)]


def load(path: str | Path) -> Recipe:
    """The recipe in a file, or in a model card (`.md`) or a `.safetensors` file that cfmerge wrote."""
    path = Path(path)
    try:
        text = _of_metadata(path) if path.suffix == ".safetensors" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CfmergeError(f"recipe {path}: cannot be read: {error}") from None
    if path.suffix == ".md":
        block = re.search(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if not block:
            raise CfmergeError(f"{path}: holds no recipe (a ```yaml block, as cfmerge writes into model cards)")
        text = block.group(1)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CfmergeError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.__struct_fields__)}")
    return parse(content, str(path))


def _of_metadata(path: Path) -> str:
    """The recipe that a merged model in one file has in its metadata."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        return json.loads(header)["__metadata__"]["cfmerge.recipe"]
    except (ValueError, KeyError, TypeError):
        raise CfmergeError(f"{path}: holds no recipe (cfmerge.recipe in its metadata)") from None


def parse_size(text: str) -> int:
    """`5GB`, `512MiB`, `1000000` in bytes; decimal units unless `i` is given."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    try:
        number = float(match.group(1)) if match else float("nan")
    except ValueError:
        number = float("nan")
    if not match or not number > 0:
        raise CfmergeError(f"{text!r} is not a size; write 5GB, 512MiB or a number of bytes")
    power = " KMGT".index(match.group(2).upper() or " ")
    return int(number * (1024 if match.group(3) else 1000) ** power)
