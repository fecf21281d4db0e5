"""The models of a configuration of mergekit, in their roles: base, and experts."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.mergekit.config import Config, Named, OutputSlice, Parameters, reference
from cfmerge.mergekit.methods import Translation
from cfmerge.models.layers import stated_count
from cfmerge.recipe import Expert, Recipe


class Input(NamedTuple):
    """A model of a merge: what is said of it, and the layers that it gives."""

    model: Named
    parameters: Parameters | None
    range: tuple[int, int] | None = None


class Group(NamedTuple):
    """The models that one merge takes: those of the document, or of one slice.

    Attributes:
        base: the base model, if one is named and takes part.
        ours: the base of the recipe.
        experts: the inputs that are merged onto it.
        scopes: parameters that are said of all, the slice's before the document's.
    """

    who: str
    base: Named | None
    ours: Input
    experts: list[Input]
    scopes: tuple[Parameters | None, ...]


def groups_of(config: Config, method: Translation, who: str) -> list[Group]:
    """The merges of a document: one, or one for each slice.

    Raises:
        CfmergeError: a model is named twice, or the method cannot take so many, or needs another base.
    """
    top = reference(config.base_model, who) if config.base_model is not None else None
    if config.models:
        inputs = [
            Input(reference(one.model, f"{who}, models[{n}]"), one.parameters) for n, one in enumerate(config.models)
        ]
        if top is not None and all(one.model != top for one in inputs) and config.merge_method != "passthrough":
            inputs.append(Input(top, None))
        return [_group(config, method, who, top, inputs, (config.parameters,))]
    groups = []
    for n, one in enumerate(config.slices or []):
        place = f"{who}, slices[{n}]"
        base = reference(one.base_model, place) if one.base_model is not None else top
        inputs = [
            Input(reference(source.model, place), source.parameters, source.layer_range) for source in one.sources
        ]
        for source in inputs:
            first, end = source.range or (0, 1)
            if not 0 <= first < end:
                raise CfmergeError(f"{place}: layer_range [{first}, {end}] of {source.model.path} has no layers")
        groups.append(_group(config, method, place, base, inputs, (one.parameters, config.parameters)))
    return groups


def _group(
    config: Config, method: Translation, who: str, base: Named | None, inputs: list[Input], scopes: tuple
) -> Group:
    name = config.merge_method
    twice = [one.model.text for n, one in enumerate(inputs) if one.model in [other.model for other in inputs[:n]]]
    if twice:
        raise CfmergeError(f"{who}: model {twice[0]} is listed twice; give it the sum of its weights once")
    if not inputs:
        raise CfmergeError(f"{who}: no models")
    found = next((one for one in inputs if one.model == base), None)
    if name == "passthrough":
        if len(inputs) != 1:
            raise CfmergeError(f"{who}: passthrough copies one model, found {len(inputs)}; take linear to merge them")
        _check_plain(inputs[0].model, who)
        return Group(who, None, inputs[0], [], scopes)
    if base is not None and found is None and method.base != "member" and name != "karcher":
        raise CfmergeError(f"{who}: base_model {base.text} is not among the sources of the slice; add it, with a range")
    if method.base == "required" and found is None:
        raise CfmergeError(f"{who}: merge_method {name} needs a `base_model`")
    experts = inputs if found is None or method.base == "member" else [one for one in inputs if one is not found]
    least, most = method.experts
    if len(experts) < least or (most is not None and len(experts) > most):
        wanted = str(least) if least == most else f"at least {least}"
        beside = " beside the base model" if found is not None and method.base != "member" else ""
        raise CfmergeError(f"{who}: merge_method {name} takes {wanted} models{beside}, found {len(experts)}")
    if found is not None:
        _check_plain(found.model, who)
    ours = found or inputs[0]._replace(model=Named(inputs[0].model.path))  # any base does, so one without an adapter
    return Group(who, base if found is not None else None, ours, experts, scopes)


def _check_plain(model: Named, who: str) -> None:
    """Raises `CfmergeError` if the base of a merge has an adapter."""
    if model.adapter:
        raise CfmergeError(
            f"{who}: {model.text} is the base of the merge, and a base cannot have an adapter; merge the adapter into "
            "it first"
        )


def names_of(models: Iterable[Named]) -> dict[Named, str]:
    """The experts' names in the recipe."""
    different = list(dict.fromkeys(models))
    bare = Recipe("", [Expert(one.adapter or one.path) for one in different], allow=["one-expert"])
    return dict(zip(different, [spec.name for spec in bare.resolved_experts(least=0)], strict=True))


def expert(model: Named, name: str, weight: Any) -> Expert:
    return Expert(model.path, adapter=model.adapter, name=name, weight=weight)


def covers_all(slices: Sequence[OutputSlice]) -> bool:
    """Whether the only slice has one range, and that is all layers: then it is as `models`."""
    ranges = {source.layer_range for one in slices for source in one.sources}
    if len(slices) > 1 or len(ranges) > 1:
        return False
    model = reference(slices[0].sources[0].model, "slices")
    return ranges == {(0, _layer_count(model.path))}


def _layer_count(path: str) -> int | None:
    """The number of layers that a model's config.json states, if it is here."""
    place = Path(path).expanduser()
    try:
        content = json.loads((hub.newest(place) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return stated_count(content) if isinstance(content, dict) else None
