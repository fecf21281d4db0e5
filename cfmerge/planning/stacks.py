"""Recipes whose output has other layers than the base: base and experts as sources that give layers new numbers.

Layer k of the output is a layer of the run that it lies in, of the base and of each expert that takes part there.
Tensors before the layers (embeddings) are those of the first run, tensors behind them (last norm, head) of the last.
So planning sees an ordinary merge, of which some experts are partial.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cfmerge import methods
from cfmerge.core.numbers import Place, is_number, settle_number
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, quantised
from cfmerge.formats.stacked import Origin, Stack
from cfmerge.methods import Method
from cfmerge.models import is_float
from cfmerge.models.layers import Counted, comes_before, edited, layers_of, named, restacked
from cfmerge.models.patterns import escape, tell
from cfmerge.planning.configs import config_notes
from cfmerge.planning.depth import place
from cfmerge.recipe import Expert, LayerExpert, Layers, Recipe

OUTSIDE = -1  # in place of a layer's number


class Run(NamedTuple):
    """A run of layers: its first layer in the output, how many, and the first of them in base and experts."""

    asked: Layers
    begin: int
    length: int
    base: Source
    first: int
    experts: Mapping[str, int]
    weights: Mapping[str, Any]

    def depth(self, layer: int) -> float:
        """From 0 to 1 over the run: 0 outside the layers, 1 for the only one."""
        return 0.0 if layer == OUTSIDE else (layer - self.begin) / (self.length - 1) if self.length > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Base and experts of a recipe with `layers`.

    Attributes:
        specs: the experts, with weights by tensor.
        places: `{name: (its run, its layer in the output)}`.
    """

    base: Stack
    experts: list[Source]
    specs: list[Expert]
    places: Mapping[str, tuple[Run, int]]
    notes: list[str]

    def apart(self, one: str, other: str) -> bool:
        """Whether two tensors lie in different layers, so that equal ones are not tied."""
        return self.places[one][1] != self.places[other][1]

    def methods(self, recipe: Recipe) -> dict[str, Method | None]:
        """The methods of the tensors whose run has its own; None where nothing is merged."""
        made: dict[Any, Method] = {}

        def of(run: Run, layer: int) -> Method:
            parameters = fixed(run.asked.parameters, run.depth(layer))
            key = (run.begin, repr(parameters))
            if key not in made:
                inherited = {} if run.asked.method else recipe.parameters
                made[key] = methods.make(run.asked.method or recipe.method, {**inherited, **parameters})
            return made[key]

        return {
            name: of(run, layer) if run.experts else None
            for name, (run, layer) in self.places.items()
            if run.asked.method or run.asked.parameters or not run.experts
        }


def stacked(
    recipe: Recipe, specs: Sequence[Expert], base: Source, experts: Sequence[Source], opened: Mapping[str, Source]
) -> Stacked:
    """The stack that a recipe's `layers` describe; `opened` has the models that its runs name, by path.

    Raises:
        CfmergeError: the layers cannot be counted, a range or a name is wrong, or models do not fit on each other.
    """
    layers = layers_of(base.tensors, base.config, f"base {base.path}")
    by_name = {spec.name: source for spec, source in zip(specs, experts, strict=True)}
    runs: list[Run] = []
    for number, asked in enumerate(recipe.layers):
        own = opened[asked.base] if asked.base else base
        begin = runs[-1].begin + runs[-1].length if runs else 0
        runs.append(_run(f"layers[{number}]", asked, begin, own, by_name, layers.stem))
    for name in by_name:
        if not any(name in run.experts for run in runs):
            raise CfmergeError(f"expert {name!r} takes part in no run of `layers`: name it in one, or leave it out")
    _check_models(base, runs, layers)
    origins, places = _of_base(runs, layers.stem)
    configs = [(run.base.config, run.first + number) for run in runs for number in range(run.length)]
    changed = restacked(base.config, layers, configs)

    def stack(source: Source, origins: Mapping[str, Origin]) -> Stack:
        return Stack(source, origins, edited(source.config, layers.section, changed) if source.config else {})

    whole = stack(base, origins)
    parts: list[Source] = [stack(one, _of_expert(name, one, runs, layers.stem)) for name, one in by_name.items()]
    weighted = [_weighted(spec, runs, layers.stem, places) for spec in specs]
    others = {str(one.path): stack(one, {}) for one in whole.sources if one is not base}
    notes = [*_notes(whole, changed, len(configs), layers.number), *config_notes(whole, others)]
    return Stacked(whole, parts, weighted, places, notes)


def fixed(value: Any, depth: float) -> Any:
    """A value with the gradients in it taken at a depth."""
    if isinstance(value, Mapping):
        stops = value.get("gradient")
        if set(value) == {"gradient"} and isinstance(stops, Sequence) and stops and all(map(is_number, stops)):
            return float(np.interp(depth * (len(stops) - 1), range(len(stops)), stops))
        return {key: fixed(item, depth) for key, item in value.items()}
    return [fixed(item, depth) for item in value] if isinstance(value, list) else value


def _run(who: str, asked: Layers, begin: int, base: Source, experts: Mapping[str, Source], stem: str) -> Run:
    first, end = asked.range or (0, _count(base, stem))
    _check_range(who, base, (first, end), stem)
    taking = list(experts) if asked.experts is None else asked.experts
    if asked.method == "keep-base":
        taking = []
    own = [LayerExpert(one) if isinstance(one, str) else one for one in taking]
    starts: dict[str, int] = {}
    for one in own:
        if one.name not in experts:
            raise CfmergeError(f"{who}: there is no expert {one.name!r}{nearest(one.name, experts)}")
        if one.name in starts:
            raise CfmergeError(f"{who}: expert {one.name!r} is named twice; a second one needs a name of its own")
        theirs = one.range or (first, end)
        if theirs[1] - theirs[0] != end - first:
            raise CfmergeError(
                f"{who}: {end - first} layers of the base meet {theirs[1] - theirs[0]} of expert {one.name!r} "
                f"(range {list(theirs)}); give both as many"
            )
        _check_range(who, experts[one.name], theirs, stem)
        starts[one.name] = theirs[0]
    if starts and asked.scale is not None:
        raise CfmergeError(f"{who}: scale is for layers that are copied; with experts, write `experts: []` beside it")
    if not starts and (asked.parameters or asked.method not in ("", "keep-base")):
        raise CfmergeError(f"{who}: a method or parameters, and no experts that it merges; name them in `experts`")
    weights = {one.name: one.weight for one in own if one.weight is not None}
    return Run(asked, begin, end - first, base, first, starts, weights)


def _count(source: Source, stem: str) -> int:
    return len({parts.layer for parts in filter(None, map(named, source.tensors)) if parts.stem == stem})


def _check_range(who: str, source: Source, wanted: tuple[int, int], stem: str) -> None:
    count = _count(source, stem)
    if not count:
        looks = next(iter(source.tensors))
        raise CfmergeError(
            f"{who}: {source.path} has no layers called {stem + '*'!r}, as the base has, and models of one stack need "
            f"the same names; its names look like {looks!r}"
        )
    if wanted[1] > count:
        raise CfmergeError(
            f"{who}: range {list(wanted)}, and {source.path} has {count} layers; layers count from 0, and the last "
            f"number is one past the last layer: [{wanted[0]}, {count}] goes to the end"
        )


def _by_layer(source: Source, stem: str) -> dict[int, list[str]]:
    """Names by layer; those outside the layers under `OUTSIDE`."""
    found: dict[int, list[str]] = {OUTSIDE: []}
    for name in source.tensors:
        parts = named(name)
        found.setdefault(parts.layer if parts and parts.stem == stem else OUTSIDE, []).append(name)
    return found


def _renumbered(name: str, stem: str, layer: int) -> str:
    rest = name[len(stem) :].lstrip("0123456789")
    return f"{stem}{layer}{rest}"


def _of_base(runs: Sequence[Run], stem: str) -> tuple[dict[str, Origin], dict[str, tuple[Run, int]]]:
    """Where each tensor of the output comes from, and its run and layer."""
    listed: list[tuple[str, Run, int, str]] = []  # new name, run, layer, name in the run's base
    first, last = runs[0], runs[-1]
    listed += [(name, first, OUTSIDE, name) for name in _by_layer(first.base, stem)[OUTSIDE] if comes_before(name)]
    for run in runs:
        names = _by_layer(run.base, stem)
        for number in range(run.length):
            layer = run.begin + number
            listed += [(_renumbered(name, stem, layer), run, layer, name) for name in names[run.first + number]]
    listed += [(name, last, OUTSIDE, name) for name in _by_layer(last.base, stem)[OUTSIDE] if not comes_before(name)]
    origins = {new: Origin(run.base, name, _factor(new, run, layer, name)) for new, run, layer, name in listed}
    return origins, {new: (run, layer) for new, run, layer, _ in listed}


def _factor(new: str, run: Run, layer: int, name: str) -> float:
    scale = run.asked.scale
    if scale is None or not is_float(run.base.tensors[name].dtype.name):
        return 1.0
    where: Place = place(new, run.depth(layer), ())
    return float(settle_number(fixed(scale, run.depth(layer)), where, "layers: scale"))


def _of_expert(name: str, source: Source, runs: Sequence[Run], stem: str) -> dict[str, Origin]:
    names = _by_layer(source, stem)
    found = {}
    for run in runs:
        if name not in run.experts:
            continue
        for number in range(run.length):
            for own in names[run.experts[name] + number]:
                found[_renumbered(own, stem, run.begin + number)] = Origin(source, own)
    ends = [(runs[0], True), (runs[-1], False)]
    outside = [own for run, before in ends if name in run.experts
               for own in names[OUTSIDE] if comes_before(own) == before]  # fmt: skip
    return {**{own: Origin(source, own) for own in outside}, **found}


def _weighted(spec: Expert, runs: Sequence[Run], stem: str, places: Mapping[str, tuple[Run, int]]) -> Expert:
    """The expert with its weight by tensor; a partial one where some run lacks it."""
    partial = spec.partial or any(spec.name not in run.experts for run in runs)
    if not any(spec.name in run.weights for run in runs):
        return msgspec.structs.replace(spec, partial=partial)
    by_tensor: list[dict[str, Any]] = []
    for run in runs:
        if spec.name not in run.weights:
            continue
        weight = run.weights[spec.name]
        for layer in range(run.begin, run.begin + run.length):
            by_tensor.append({"match": f"{escape(stem)}{layer}[./]*", "value": fixed(weight, run.depth(layer))})
        outside = [name for name, (own, layer) in places.items() if own is run and layer == OUTSIDE]
        by_tensor += [{"match": escape(name), "value": fixed(weight, 0.0)} for name in outside]
    return msgspec.structs.replace(spec, partial=partial, weight=[*by_tensor, {"value": spec.weight}])


def _check_models(base: Source, runs: Sequence[Run], layers: Counted) -> None:
    """Raises `CfmergeError` if models of different runs cannot be parts of one model."""
    others = list({id(run.base): run.base for run in runs if run.base is not base}.values())
    problems = quantised.problems(base, {str(other.path): other for other in others})
    if problems:
        raise CfmergeError("\n".join(problems))
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, info in base.tensors.items():
        parts = named(name)
        inside = parts is not None and parts.stem == layers.stem
        shapes.setdefault(parts.rest if inside and parts else name, set()).add(info.shape)
    for other in others:
        for key in ("model_type", "tie_word_embeddings"):
            ours, theirs = base.config.get(key), other.config.get(key)
            if ours != theirs and (key == "tie_word_embeddings" or (ours and theirs)):
                raise CfmergeError(
                    f"layers: {other.path} has {key} {theirs!r} in its config.json, the base ({base.path}) {ours!r}: "
                    "they cannot be layers of one model"
                )
        wrong = []
        for name, info in other.tensors.items():
            parts = named(name)
            key = parts.rest if parts and parts.stem == layers.stem else name
            if (key in shapes or key != name) and info.shape not in shapes.get(key, ()):
                wrong.append(name)
        if wrong:
            found = other.tensors[wrong[0]].shape
            raise CfmergeError(
                f"layers: {tell(wrong)} of {other.path} do not fit on the base ({base.path}): {wrong[0]!r} has shape "
                f"{found}, expected one of {sorted(shapes.get(_rest(wrong[0], layers.stem), set()))}"
            )


def _rest(name: str, stem: str) -> str:
    parts = named(name)
    return parts.rest if parts and parts.stem == stem else name


def _notes(whole: Stack, changed: Mapping[str, Any], count: int, before: int) -> list[str]:
    notes = []
    if changed:
        notes.append(f"config.json: {', '.join(changed)}: changed for {count} layers ({before} in the base)")
    dtypes = sorted({info.dtype.name for info in whole.tensors.values() if is_float(info.dtype.name)})
    if len(dtypes) > 1 and len(whole.sources) > 1:
        notes.append(f"the stack's layers are stored in {' and '.join(dtypes)}; --dtype gives all of them one")
    return notes
