"""Configurations of mergekit as recipes of cfmerge."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from cfmerge.errors import CfmergeError, nearest
from cfmerge.mergekit.config import Config, Named, Parameters, documents, is_mergekit, reference
from cfmerge.mergekit.groups import Group, Input, covers_all, expert, groups_of, names_of
from cfmerge.mergekit.methods import METHODS, Given, Translation
from cfmerge.mergekit.output import chat_template_of, dtype_of, notes_of, precision_of, with_vocabulary
from cfmerge.mergekit.parameters import Parameter, check_names, number, setting
from cfmerge.recipe import Expert, LayerExpert, Layers, Recipe


class Stage(NamedTuple):
    """A recipe to carry out: the name that others use its result by, and notes for the user."""

    name: str
    recipe: Recipe
    notes: tuple[str, ...] = ()
    translated: bool = False  # its recipe was another configuration
    window: Any = None  # the steps of a training run that it merges: a `temporal.Window`


def load(path: str | Path) -> list[Stage]:
    """The documents of a file of mergekit as recipes, those that others need before these.

        >>> import pathlib
        >>> models = "models: [{model: math, parameters: {weight: 1}}, {model: code, parameters: {weight: 3}}]"
        >>> _ = pathlib.Path("mergekit.yml").write_text("merge_method: linear\\n" + models)
        >>> cfmerge.mergekit.load("mergekit.yml")[0].recipe.method
        'linear'

    Raises:
        CfmergeError: a key or value is wrong, or cannot be done here.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CfmergeError(f"{path}: cannot be read: {error}") from None
    return translated(text, str(path))


def is_file(path: str | Path) -> bool:
    """Whether a file is a configuration of mergekit: one of its YAML documents has a `merge_method`."""
    path = Path(path)
    if path.suffix.lower() in (".md", ".safetensors"):
        return False
    try:
        return any(is_mergekit(content) for content in yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False


def translated(text: str, source: str) -> list[Stage]:
    """The documents of a text as recipes; see `load`. `source` is named in errors."""
    configs = documents(text, source)
    if not configs:
        raise CfmergeError(f"{source}: is empty")
    names = [config.name or "" for config in configs[:-1]]
    if "" in names or len({*names, configs[-1].name}) < len(configs):
        raise CfmergeError(f"{source}: of several documents, all but the last need a `name` of their own")
    for name in names:
        if not name.strip(".") or "/" in name or "\\" in name:
            raise CfmergeError(f"{source}: name {name!r} cannot be used as the name of a directory")
    stages = [
        _stage(config, source if len(configs) == 1 else f"{source}, document {number}", name)
        for number, (config, name) in enumerate(zip(configs, [*names, ""], strict=True), 1)
    ]
    return _in_order(stages, source)


def located(stages: Sequence[Stage], directory: Path) -> list[Stage]:
    """The stages with the paths of earlier results, which lie in `directory`, in place of their names."""
    places = {stage.name: str(directory / stage.name) for stage in stages if stage.name}

    def at(path: str) -> str:
        return places.get(path, path)

    def moved(recipe: Recipe) -> Recipe:
        replace = msgspec.structs.replace
        experts = [at(one) if isinstance(one, str) else replace(one, path=at(one.path)) for one in recipe.experts]
        layers = [replace(run, base=at(run.base)) for run in recipe.layers]
        return replace(recipe, base=at(recipe.base), experts=experts, layers=layers)

    return [stage._replace(recipe=moved(stage.recipe)) for stage in stages]


def _in_order(stages: Sequence[Stage], source: str) -> list[Stage]:
    """The stages, each behind those whose results it takes; the last document stays last."""
    left, done = list(stages), []  # type: tuple[list[Stage], list[Stage]]
    names = {stage.name for stage in stages}
    while left:
        made = {stage.name for stage in done}
        ready = next((s for s in left if not (needed_by(s.recipe) & names) - made and (s.name or len(left) == 1)), None)
        if ready is None:
            cycle = ", ".join(repr(stage.name) for stage in left if stage.name)
            raise CfmergeError(f"{source}: the documents {cycle} need each other's results")
        done.append(ready)
        left.remove(ready)
    return done


def needed_by(recipe: Recipe) -> set[str]:
    """The paths that a recipe names."""
    experts = [one if isinstance(one, str) else one.path for one in recipe.experts]
    return {recipe.base, *experts, *(run.base for run in recipe.layers if run.base)}


def _stage(config: Config, who: str, name: str) -> Stage:
    method = METHODS.get(config.merge_method)
    if method is None:
        raise CfmergeError(
            f"{who}: unknown merge_method {config.merge_method!r}{nearest(config.merge_method, METHODS)}"
        )
    groups = groups_of(config, method, who)
    _check_parameters(config, method, who)
    names = names_of(one.model for group in groups for one in group.experts)
    notes = notes_of(config, method, groups)
    if config.merge_method == "passthrough":
        base = _base_of_stack(config, groups)
        recipe = Recipe(base, [], "average", layers=[_copied(group, base) for group in groups])
    elif config.slices and not covers_all(config.slices):
        recipe = _stack(_base_of_stack(config, groups), config, method, groups, names)
    else:
        ((ours, parameters), weights) = _made(config, method, groups[0], names), _weights(method, groups[0])
        experts: list[str | Expert] = [
            expert(one.model, names[one.model], weights[one.model]) for one in groups[0].experts
        ]
        recipe = Recipe(groups[0].ours.model.path, experts, ours, parameters)
    recipe = msgspec.structs.replace(
        recipe, allow=_allowed(groups, recipe), dtype=dtype_of(config, who), precision=precision_of(config),
        chat_template=chat_template_of(config, who),
    )  # fmt: skip
    return Stage(name, with_vocabulary(recipe, config, names, who), tuple(notes), translated=True)


def _allowed(groups: Sequence[Group], recipe: Recipe) -> list[Any]:
    allow = ["one-expert"] if len(recipe.experts) == 1 else []
    among = any(one.model == group.ours.model for group in groups for one in group.experts)
    return [*allow, *(["base-as-expert"] if among else [])]


# --- parameters -----------------------------------------------------------------------------------------------------


def _check_parameters(config: Config, method: Translation, who: str) -> None:
    def check(scope: Parameters | None, place: str, of_model: bool) -> None:
        check_names(scope, method.parameters, place, config.merge_method, of_model)

    check(config.parameters, f"{who}, parameters", False)
    for n, model in enumerate(config.models or []):
        check(model.parameters, f"{who}, models[{n}]", True)
    for n, one in enumerate(config.slices or []):
        check(one.parameters, f"{who}, slices[{n}]", False)
        for source in one.sources:
            check(source.parameters, f"{who}, slices[{n}]", True)


def _made(
    config: Config, method: Translation, group: Group, names: Mapping[Named, str], everybody: Iterable[str] = ()
) -> tuple[str, dict[str, Any]]:
    """The method and its parameters; a value for each expert is one for `everybody`, where these are more."""
    shared = {
        name: (number if one.kind is float else setting)(name, one, group.scopes, group.who)
        for name, one in method.parameters.items() if not one.own
    }  # fmt: skip
    own = {}
    for name, one in method.parameters.items():
        if one.own and name != "weight":
            values = {
                names[item.model]: number(
                    name, one, (item.parameters, *group.scopes), f"{group.who}, {item.model.text}"
                )
                for item in group.experts
            }
            own[name] = {**dict.fromkeys(everybody, next(iter(values.values()))), **values}
    return method.made(Given(shared, own, group.base is not None))


def _weights(method: Translation, group: Group) -> dict[Named, Any]:
    known = method.parameters.get("weight")
    return {one.model: _own("weight", known, one, group) if known else 1.0 for one in group.experts}


def _own(name: str, parameter: Parameter, item: Input, group: Group) -> Any:
    """A model's own value of a parameter."""
    return number(name, parameter, (item.parameters, *group.scopes), f"{group.who}, {item.model.text}")


# --- stacks ---------------------------------------------------------------------------------------------------------


def _base_of_stack(config: Config, groups: Sequence[Group]) -> str:
    """The model that gives the output its config and side files."""
    base = groups[0].ours.model if config.base_model is None else reference(config.base_model, "base_model")
    return base.path


def _copied(group: Group, base: str) -> Layers:
    """The run of layers of a group that copies a model."""
    known = METHODS["passthrough"].parameters["scale"]
    scale = number("scale", known, (group.ours.parameters, *group.scopes), group.who)
    _check_filters(scale, group)
    path = group.ours.model.path
    return Layers(group.ours.range, "" if path == base else path, [], scale=None if scale == 1 else scale)


def _stack(
    base: str, config: Config, method: Translation, groups: Sequence[Group], names: Mapping[Named, str]
) -> Recipe:
    """The recipe of slices that are merged."""
    made = [_made(config, method, group, names, names.values()) for group in groups]
    alike = all(one == made[0] for one in made) and "gradient" not in repr(made)
    runs = []
    for group, (_, parameters) in zip(groups, made, strict=True):
        weights = _weights(method, group)
        _check_filters(
            [*weights.values(), *(value for value in parameters.values() if "experts" in repr(value))], group
        )
        experts: list[str | LayerExpert] = []
        for one in group.experts:
            other = None if one.range == group.ours.range else one.range
            weight = None if weights[one.model] == 1 else weights[one.model]
            named = names[one.model]
            experts.append(named if other is None and weight is None else LayerExpert(named, other, weight))
        own = "" if group.ours.model.path == base else group.ours.model.path
        runs.append(Layers(group.ours.range, own, experts, parameters={} if alike else parameters))
    all_experts: list[str | Expert] = [expert(model, name, 1.0) for model, name in names.items()]
    return Recipe(base, all_experts, made[0][0], made[0][1] if alike else {}, layers=runs)


def _check_filters(value: Any, group: Group) -> None:
    """Raises `CfmergeError` if a model's own value in a stack depends on the number of a layer."""
    if any(digit in text for text in _filters(value) for digit in "0123456789"):
        raise CfmergeError(
            f"{group.who}: a filter with a number in it, in a stack of layers: mergekit asks the name that a tensor "
            "has in its own model, cfmerge the name that it gets; write the merge as a recipe with `layers`"
        )


def _filters(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        yield from [value["match"]] if isinstance(value.get("match"), str) else []
        yield from _filters([one for key, one in value.items() if key != "match"])
    elif isinstance(value, list):
        for one in value:
            yield from _filters(one)
