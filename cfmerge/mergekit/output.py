"""The output that a configuration of mergekit asks for: its dtype and vocabulary; and notes."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cfmerge.errors import CfmergeError
from cfmerge.mergekit.config import Config, Model, Named, reference
from cfmerge.mergekit.groups import Group
from cfmerge.mergekit.methods import Translation
from cfmerge.recipe import Recipe

DTYPES = ("float32", "float16", "bfloat16")


def dtype_of(config: Config, who: str) -> Any:
    """The output's dtype; none: the base's."""
    for key, value in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
        arithmetic = key == "dtype" and config.out_dtype is not None
        if value is not None and _plain(value) not in (*DTYPES, *(("float64",) if arithmetic else ())):
            raise CfmergeError(f"{who}: {key} {value!r}; the output can be {', '.join(DTYPES)}")
    return _plain(config.out_dtype or config.dtype or "") or None


def precision_of(config: Config) -> Any:
    """The precision of the arithmetic: float64 where that is asked for."""
    return "float64" if _plain(config.dtype or "") == "float64" else "auto"


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def chat_template_of(config: Config, who: str) -> str | None:
    """The chat template that the output is given; none: the base's."""
    if config.chat_template in ("alpaca", "llama3", "mistral", "exaone"):
        raise CfmergeError(
            f"{who}: chat_template {config.chat_template}: only chatml is known by name; take auto, that of most "
            "models, or write the template out, in Jinja"
        )
    return config.chat_template or None


def with_vocabulary(recipe: Recipe, config: Config, names: Mapping[Named, str], who: str) -> Recipe:
    """The recipe with the vocabulary that the configuration asks for."""
    tokenizer, source = config.tokenizer, config.tokenizer_source
    if tokenizer is not None:
        source = tokenizer.source
        for key, told in (("tokens", tokenizer.tokens), ("pad_to_multiple_of", tokenizer.pad_to_multiple_of)):
            if told:
                raise CfmergeError(
                    f"{who}: tokenizer.{key} is not taken: a merge here has the base's tokens, or all models' in "
                    "their order, and the base's padding; leave it out, and change the merged model with transformers "
                    "(resize_token_embeddings)"
                )
    if source is None:
        return recipe
    return msgspec.structs.replace(recipe, vocabulary=_vocabulary(source, recipe, names, who))


def _vocabulary(source: Model, recipe: Recipe, names: Mapping[Named, str], who: str) -> str:
    if source in ("base", "union"):
        return str(source)
    model = reference(source, who)
    if model.path == recipe.base and not model.adapter:
        return "base"
    if model not in names:
        raise CfmergeError(f"{who}: tokenizer_source {model.text} is none of the models that are merged")
    return names[model]


def notes_of(config: Config, method: Translation, groups: Sequence[Group]) -> list[str]:
    scopes = [scope or {} for group in groups for scope in group.scopes]
    scopes += [one.parameters or {} for group in groups for one in (group.ours, *group.experts)]
    idle = [name for name in method.idle if any(name in scope for scope in scopes)]
    notes = [f"{', '.join(idle)}: no effect in {config.merge_method}, here as in mergekit"] if idle else []
    if method.base == "required" and any(group.ours.parameters for group in groups):
        notes.append("parameters of the base model have no effect, here as in mergekit")
    if config.dtype is not None and _plain(config.dtype) in ("float16", "bfloat16"):
        notes.append(f"dtype {config.dtype}: of the output; arithmetic is in float32 at least")
    return notes
