"""mergekit's YAML, read strictly: a key that mergekit does not know is an error here, and so is one that has no effect.

The keys are those of mergekit 0.1.5.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cfmerge.errors import CfmergeError, nearest


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A mapping of which every key is known."""


class ModelPath(Strict):
    path: str
    revision: str | None = None


class Reference(Strict):
    """A model in the form of a mapping: `{model: ..., lora: ...}`."""

    model: str | ModelPath
    lora: str | ModelPath | None = None
    override_architecture: str | None = None


Model = str | dict[str, Any]  # `PATH[@REVISION][+ADAPTER[@REVISION]]`, or the mapping of a `Reference`
Parameters = dict[str, Any]


class InputModel(Strict):
    model: Model
    parameters: Parameters | None = None


class InputSlice(Strict):
    model: Model
    layer_range: tuple[int, int]
    parameters: Parameters | None = None


class OutputSlice(Strict):
    sources: list[InputSlice]
    base_model: Model | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None


class Tokenizer(Strict):
    source: Model = "union"
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class Config(Strict):
    """One document."""

    merge_method: str
    name: str | None = None
    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    modules: dict[str, Any] | None = None
    base_model: Model | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Model | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Parameters | None = None


STRUCTS: tuple[tuple[str, type[Strict]], ...] = (
    ("sources[...]", InputSlice), ("slices[...]", OutputSlice), ("models[...]", InputModel), ("tokenizer", Tokenizer),
)  # fmt: skip
NOT_TAKEN = {
    "modules": "parts of a model that are merged each in its own way: write the merge as a recipe of cfmerge, with a "
    "rule for each part (docs/recipe.md)",
    "override_architecture": "cfmerge needs no architecture; leave it out",
    "residual_weight": "mergekit itself has never read it; leave it out",
}


def is_mergekit(content: Any) -> bool:
    """Whether the content of a YAML document is a configuration of mergekit."""
    return isinstance(content, dict) and "merge_method" in content


def documents(text: str, source: str) -> list[Config]:
    """The documents of a file; `source` is named in errors.

    Raises:
        CfmergeError: it is no YAML, or a key or value in it is wrong.
    """
    try:
        contents = [one for one in yaml.safe_load_all(text) if one is not None]
    except yaml.YAMLError as error:
        raise CfmergeError(f"{source}: is not valid YAML: {error}") from None
    named = [source if len(contents) == 1 else f"{source}, document {number}" for number in range(1, len(contents) + 1)]
    return [_document(content, who) for content, who in zip(contents, named, strict=True)]


def _document(content: Any, who: str) -> Config:
    if not is_mergekit(content):
        raise CfmergeError(f"{who}: has no `merge_method`, and mergekit's other documents do")
    try:
        config = msgspec.convert(content, Config)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"{who}: {explained(str(error), Config, _parameters_in(content))}") from None
    given = [key for key in ("models", "slices", "modules") if getattr(config, key)]
    refused = ["modules"] if config.modules is not None else []
    refused += ["residual_weight"] if any(one.residual_weight is not None for one in config.slices or []) else []
    if refused:
        raise CfmergeError(f"{who}: `{refused[0]}` is not taken: {NOT_TAKEN[refused[0]]}")
    if len(given) != 1:
        raise CfmergeError(f"{who}: expected one of `models` and `slices`, found {' and '.join(given) or 'neither'}")
    if config.tokenizer is not None and config.tokenizer_source is not None:
        raise CfmergeError(f"{who}: `tokenizer` and `tokenizer_source` say the same; give one of them")
    return config


def _parameters_in(content: dict[str, Any]) -> set[str]:
    found = content.get("parameters")
    return set(found) if isinstance(found, dict) else set()


def explained(message: str, outer: type[Strict], parameters: Iterable[str] = ()) -> str:
    """The message of an error in a struct, with the nearest keys where one is unknown."""
    unknown = re.search(r"unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", message)
    if not unknown:
        return message.replace("$.", "")
    key, place = unknown.group(1), unknown.group(2) or ""
    anywhere = re.sub(r"\[\d+\]", "[...]", place)
    found = next((struct for part, struct in STRUCTS if anywhere.endswith(part)), outer)
    where = f" at {place}" if place else ""
    if key in PARAMETERS:
        return f"unknown key {key!r}{where}: it is a parameter; write it below `parameters:`"
    known = [field.name for field in msgspec.structs.fields(found)]
    return f"unknown key {key!r}{where}{nearest(key, known)}"


PARAMETERS = {
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "scale", "eps",
    "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "max_iter", "tol", "filter_wise", "select_topk",
    "r", "alpha",
}  # fmt: skip


class Named(msgspec.Struct, frozen=True):
    """A model that a configuration names: its path with a revision, and an adapter over it."""

    path: str
    adapter: str = ""

    @property
    def text(self) -> str:
        return f"{self.path}+{self.adapter}" if self.adapter else self.path


def reference(model: Model, who: str) -> Named:
    """The model that a text or a mapping names. A path that exists is taken as it is, whatever signs it has.

    Raises:
        CfmergeError: it cannot be read.
    """
    if isinstance(model, str):
        return _of_text(model, who)
    try:
        found = msgspec.convert(model, Reference)
    except msgspec.ValidationError as error:
        raise CfmergeError(f"{who}: {explained(str(error), Reference)}") from None
    if found.override_architecture is not None:
        raise CfmergeError(f"{who}: `override_architecture` is not taken: {NOT_TAKEN['override_architecture']}")
    return Named(_at_revision(found.model), _at_revision(found.lora) if found.lora else "")


def _at_revision(model: str | ModelPath) -> str:
    if isinstance(model, str) or not model.revision:
        return model if isinstance(model, str) else model.path
    return f"{model.path}@{model.revision}"


def _of_text(text: str, who: str) -> Named:
    if _exists(text):
        return Named(text)
    for number in [n for n, sign in enumerate(text) if sign == "+"]:  # an adapter behind a path that has a plus
        if _exists(text[:number]):
            return Named(text[:number], text[number + 1 :])
    path, *adapter = text.split("+")
    if len(adapter) > 1 or any(part.count("@") > 1 or not part for part in (path, *adapter)):
        raise CfmergeError(f"{who}: model {text!r} cannot be read; write PATH[@REVISION][+ADAPTER[@REVISION]]")
    return Named(path, *adapter)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):  # too long for a path
        return False
