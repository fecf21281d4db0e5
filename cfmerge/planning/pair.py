"""The tensor of an expert for each of the base: by its name, renamed, wrapped, or packed otherwise."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats import Source, TensorInfo
from cfmerge.formats.adapters import AdapterSource
from cfmerge.formats.wrapped import Wrapped
from cfmerge.models.mixtures import View, other_form, transposed
from cfmerge.models.renames import apply_renames, pair
from cfmerge.recipe import Expert, Recipe, Rename


class Viewed(Wrapped):
    """A checkpoint of which some tensors have other names, or are made of others when they are read."""

    def __init__(self, inner: Source, views: Mapping[str, View], consumed: Sequence[str] = ()):
        super().__init__(inner)
        self.changed: Mapping[str, View] = views
        gone = {*consumed, *(source for view in views.values() for source in view.sources)}
        made = {
            name: TensorInfo(view.shape, inner.tensors[view.sources[0]].dtype, inner.tensors[view.sources[0]].file)
            for name, view in views.items()
        }
        kept = {name: info for name, info in inner.tensors.items() if name not in gone}
        self.tensors = {**kept, **made}
        renamed = {view.sources[0]: name for name, view in views.items() if len(view.sources) == 1}
        ties = {renamed.get(alias, alias): renamed.get(name, name) for alias, name in inner.ties.items()}
        self.ties = {alias: name for alias, name in ties.items() if name in self.tensors}

    def grain(self, name: str) -> int:
        return self.inner.grain(self.changed[name].sources[0] if name in self.changed else name)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        view = self.changed.get(name)
        if view is None:
            return self.inner.read(name, first, count)
        return view.make(self.inner.read) if count is None else view.flat(self.inner.read, first, count)


@dataclasses.dataclass
class Paired:
    """`sources[t]` maps the base's names to those of `experts[t]`."""

    experts: list[Source]
    sources: list[dict[str, str]]
    notes: list[str]
    problems: list[str]
    architectures: list[str] = dataclasses.field(default_factory=list)  # experts that say they are another model


def pair_experts(recipe: Recipe, base: Source, experts: Sequence[Source], specs: Sequence[Expert]) -> Paired:
    """The experts with their names seen through, and every note and problem on the way.

    Raises:
        CfmergeError: a `rename` that matches nothing, or gives two tensors one name.
    """
    result = Paired([], [], [], [])
    matched: set[str] = set()
    for spec, expert in zip(specs, experts, strict=True):
        expert = _renamed(expert, spec, recipe.rename, matched)
        _architecture(base, spec, expert, result)
        _pair_one(base, spec, expert, result)
    for rule in recipe.rename:
        if rule.pattern not in matched:
            raise CfmergeError(f"rename {rule.pattern!r} matches no tensor of any expert{_looks_like(experts)}")
    return result


def _renamed(expert: Source, spec: Expert, everyones: Sequence[Rename], matched: set[str]) -> Source:
    """The expert with the names that the recipe gives it; an adapter over the base has them already."""
    if isinstance(expert, AdapterSource) and not expert.own_base:
        matched |= expert.matched
        wrong = [rule.pattern for rule in spec.rename if rule.pattern not in expert.matched]
        if wrong:
            raise CfmergeError(f"expert {spec.name!r} ({spec.path}): rename {wrong[0]!r} matches none of its tensors")
        return expert
    if not spec.rename and not everyones:
        return expert
    names = list(expert.tensors)
    new = {name: name for name in names}
    for rule in (*spec.rename, *everyones):
        hit = [name for name, current in new.items() if re.search(rule.pattern, current)]
        if hit:
            matched.add(rule.pattern)
        elif rule in spec.rename:
            raise CfmergeError(
                f"expert {spec.name!r} ({spec.path}): rename {rule.pattern!r} matches none of its tensors"
                f"{_looks_like([expert])}"
            )
        try:
            new |= {name: apply_renames([new[name]], [(rule.pattern, rule.to)])[new[name]] for name in hit}
        except (re.error, IndexError) as error:
            raise CfmergeError(f"rename {rule.pattern!r} to {rule.to!r}: {error}") from None
    seen: dict[str, str] = {}
    for name, to in new.items():
        if to in seen:
            raise CfmergeError(
                f"expert {spec.name!r} ({spec.path}): rename gives {seen[to]!r} and {name!r} the same name {to!r}"
            )
        seen[to] = name
    views = {
        to: View(expert.tensors[name].shape, (name,), lambda read, name=name: read(name))  # type: ignore[misc]
        for name, to in new.items() if to != name
    }  # fmt: skip
    return Viewed(expert, views)


def _looks_like(experts: Sequence[Source]) -> str:
    return f"; names look like {next(iter(experts[0].tensors))!r}" if experts else ""


def _architecture(base: Source, spec: Expert, expert: Source, result: Paired) -> None:
    ours, theirs = base.config.get("model_type"), expert.config.get("model_type")
    if ours and theirs and ours != theirs:
        result.architectures.append(
            f"expert {spec.name!r} ({spec.path}) says that it is another architecture: {theirs!r} in its config.json, "
            f"{ours!r} in the base's; it is merged where its tensors match the base's"
        )


def _pair_one(base: Source, spec: Expert, expert: Source, result: Paired) -> None:
    headers, theirs = _headers(base), _headers(expert)
    views = {} if headers.keys() == theirs.keys() else other_form(headers, theirs, base.config, expert.config)
    if views:
        first = next(iter(views.values())).sources[0]
        result.notes.append(
            f"expert {spec.name!r}: the experts of its mixture are stored in another form (such as {first!r}) and are "
            f"read as {next(iter(views))!r}"
        )
        expert = Viewed(expert, views)
    pairs = pair(_shapes(base), _shapes(expert))
    theirs = _headers(expert)
    turned: dict[str, View] = {}
    for name, source in pairs.sources.items():
        if name in headers and source in theirs:
            view = transposed(name, source, headers, theirs, base.config, expert.config)
            turned |= {source: view} if view else {}
    if turned:
        expert = Viewed(expert, turned)
        result.notes.append(
            f"expert {spec.name!r}: {len(turned)} packed arrays are stored transposed, such as {next(iter(turned))!r}"
        )
    result.notes += [f"expert {spec.name!r}: {told}" for told in pairs.told]
    if pairs.ambiguous:
        result.problems.append(
            f"expert {spec.name!r} ({spec.path}): its names are the base's with {' or with '.join(pairs.ambiguous)}: "
            "say which by 'rename: [{from: REGEX, to: TEXT}]' for this expert"
        )
    result.experts.append(expert)
    result.sources.append(_through_ties(base, expert, pairs.sources))


def _headers(checkpoint: Source) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}


def _shapes(checkpoint: Source) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, and of names that are tied to them and not stored."""
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    return {**stored, **{a: stored[n] for a, n in checkpoint.ties.items() if a not in stored and n in stored}}


def _through_ties(base: Source, expert: Source, pairs: Mapping[str, str]) -> dict[str, str]:
    """The expert's stored tensor for each name of the base, stored or tied."""
    stored = {
        name: source if source in expert.tensors else expert.ties[source] for name, source in pairs.items()
    }  # fmt: skip
    for alias, name in base.ties.items():
        if name not in stored and alias in stored:
            stored[name] = stored[alias]
    return stored
