"""The recipe's key `align`: base and experts brought into the order of one of them, as they are read."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfmerge import align
from cfmerge.align.source import Aligned, Alignment, Found, check_same_sizes
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError, NonFiniteError, nearest
from cfmerge.formats import Source
from cfmerge.formats.adapters import AdapterSource
from cfmerge.formats.named import Chosen, Tensors
from cfmerge.models import is_float
from cfmerge.models.kinds import is_running
from cfmerge.models.patterns import tell
from cfmerge.models.space_tables import Described, describe, read_table
from cfmerge.models.spaces import Spaces
from cfmerge.recipe import Align, Expert, Recipe

BASE = "base"  # its name among the models


class Model(NamedTuple):
    """A model that takes part: its source, its tensors by the base's names, and how messages call it."""

    source: Source
    names: Mapping[str, str]
    told: str


class InOrder(NamedTuple):
    """Base and experts in one order, and notes."""

    base: Source
    experts: list[Source]
    notes: list[str]


def check_align(recipe: Recipe, sums: bool = False, composing: bool = False) -> None:
    """Raises `CfmergeError` where other keys of the recipe leave no common order, or the key lacks something.

    Args:
        sums: statistics are wanted, or come before the experts.
        composing: the result is not one checkpoint.
    """
    how = recipe.align
    if how is None:
        return
    in_the_base = {
        "`unmerged` takes what is not merged into the base": recipe.unmerged not in (None, BASE),
        "an adapter (`adapter_out`) changes the base as it lies": recipe.adapter_out is not None,
        "statistics are of changes of the base as it lies": sums or recipe.statistics is not None,
        "a composed result changes the base as it lies": composing,
    }
    why = next((why for why, here in in_the_base.items() if here), "")
    if how.to != BASE and why:
        raise CfmergeError(f"align: to: {how.to}: {why}; align to the base: 'align: {{to: base}}'")
    check_seed(how.seed)
    if how.sweeps < 0:
        raise CfmergeError(f"align: sweeps: expected a number of at least 0, found {how.sweeps}")
    if recipe.vocabulary not in (None, BASE):
        raise CfmergeError(
            f"align: `vocabulary: {recipe.vocabulary}` gives the base rows of experts, in their own order; say "
            "`vocabulary: base`, or write each expert in the base's order first"
        )
    if recipe.layers:
        raise CfmergeError("align: layers of several models have no common order; leave `align` or `layers` out")
    if (how.method == "activations") != bool(how.moments):
        raise CfmergeError(
            "align: method activations needs `moments: FILE`, joint moments as cfmerge.activations.collect_joint_linen "
            "collects them"
            if how.method == "activations"
            else f"align: method {how.method} looks at weights, and takes no `moments`; write `method: activations`"
        )


def in_one_order(
    recipe: Recipe, base: Source, experts: Sequence[Source], specs: Sequence[Expert],
    sources: Sequence[Mapping[str, str]],
) -> InOrder:  # fmt: skip
    """Base and experts, in the order that the recipe asks for.

    Args:
        sources: `{the base's name: the expert's}`, of each expert.

    Raises:
        CfmergeError: the architecture is not known, or models differ in the number of neurons, or there are running
            statistics of BatchNorm, which would be wrong.
    """
    how = recipe.align
    if how is None:
        return InOrder(base, list(experts), [])
    models = {BASE: Model(base, {name: name for name in base.tensors}, f"base ({base.path})")}
    for spec, expert, names in zip(specs, experts, sources, strict=True):
        if spec.name != BASE:
            models[spec.name] = Model(expert, names, f"expert {spec.name!r} ({spec.path})")
        elif expert.path.resolve() != base.path.resolve():
            raise CfmergeError(
                f"align: expert {BASE!r} ({spec.path}) has the name that stands for the base ({base.path}); give it "
                "another: NAME=PATH (recipe: 'name: NAME')"
            )
    _check_to(how, models)
    of_base = [
        name for name, one in models.items() if isinstance(one.source, AdapterSource) and not one.source.own_base
    ]
    if of_base and how.to != BASE:
        raise CfmergeError(
            f"align: expert {of_base[0]!r} is an adapter over the base, and has its order; align to the base: "
            "'align: {to: base}'"
        )
    taken = {name: one for name, one in models.items() if name not in of_base}
    described = {name: _described_spaces(how, one, base.config) for name, one in taken.items()}
    spaces = {name: one.spaces for name, one in described.items()}
    _check_moments(specs, [name for name in taken if name != how.to], models[how.to].told)
    _check_norms(recipe, spaces[how.to])
    for name, one in taken.items():
        check_same_sizes(models[how.to].told, spaces[how.to], one.told, spaces[name])
    common, left_out = _common(taken, spaces[how.to])
    alignment = Alignment(spaces[how.to], functools.partial(_found, how, taken, common), _described(how))

    def seen(name: str, source: Source) -> Source:
        if name == how.to or name in of_base:
            return source
        back = {theirs: ours for ours, theirs in models[name].names.items()}
        axes = {own: spaces[name].axes[back.get(own, own)] for own in source.tensors}
        return Aligned(source, alignment, name, Spaces(axes, spaces[name].sizes))

    notes = [f"align: {note.removeprefix('spaces: ')}" for note in described[how.to].notes]
    if left_out:
        notes.append(f"align: {tell(left_out, list(base.tensors))}: not in all models in one shape, so not matched")
    notes += [f"expert {name!r} is an adapter over the base, and is in its order already" for name in of_base]
    return InOrder(seen(BASE, base), [seen(s.name, e) for s, e in zip(specs, experts, strict=True)], notes)


def _check_to(how: Align, models: Mapping[str, Model]) -> None:
    if how.to not in models:
        raise CfmergeError(f"align: to: expected base or an expert's name, found {how.to!r}{nearest(how.to, models)}")


def _check_moments(specs: Sequence[Expert], permuted: Sequence[str], reference: str) -> None:
    """Raises `CfmergeError` if an expert that is permuted has moments, which are in its own order."""
    for spec in specs:
        if spec.moments and spec.name in permuted:
            raise CfmergeError(
                f"align: expert {spec.name!r} has moments ({spec.moments}), which are in its own order and not in that "
                f"of {reference}; write the expert in that order first (merge it alone by `average`, with `align`), "
                "and collect them from what is written"
            )


def _described_spaces(how: Align, model: Model, config: Mapping[str, Any]) -> Described:
    """The spaces of a model by the base's names; tensors that the base lacks by their own."""
    back = {theirs: ours for ours, theirs in model.names.items()}
    headers = {back.get(name, name): info.shape for name, info in model.source.tensors.items()}
    try:
        return describe(headers, model.source.config or config, read_table(how.spaces) if how.spaces else None)
    except CfmergeError as error:
        raise CfmergeError(f"align: {model.told}: {error}") from None


def _check_norms(recipe: Recipe, spaces: Spaces) -> None:
    plain = {name.removesuffix("/value"): name for name in spaces.axes}
    running = [name for short, name in plain.items() if is_running(short, plain)]
    if running and "batch-norm" not in recipe.allow:
        raise CfmergeError(
            f"align: {tell(running, list(spaces.axes))}: running statistics of BatchNorm, which are wrong for weights "
            "that are averaged, whatever their order; they must be estimated again with inputs "
            "(cfmerge.activations.reset_norms_linen, or a pass of the merged model in training mode). To merge all the "
            "same: --allow batch-norm (recipe: 'allow: [batch-norm]')"
        )


def _common(models: Mapping[str, Model], spaces: Spaces) -> tuple[Spaces, list[str]]:
    """The spaces with the floating-point tensors that all models have in one shape alone; the names of the others."""
    kept, left_out = {}, []
    for name, axes in spaces.axes.items():
        infos = [one.source.tensors.get(one.names.get(name, "")) for one in models.values()]
        alike = {(info.shape, is_float(info.dtype.name)) for info in infos if info is not None}
        if None not in infos and len(alike) == 1 and next(iter(alike))[1]:
            kept[name] = axes
        elif any(axis.spaces for axis in axes):
            left_out.append(name)
    there = {space for axes in kept.values() for axis in axes for space in axis.spaces}
    return Spaces(kept, {space: size for space, size in spaces.sizes.items() if space in there}), left_out


def _described(how: Align) -> str:
    """How models are aligned, and the state of the files that decide it."""
    try:
        states = [Path(file).expanduser().stat() for file in (how.moments, how.spaces) if file]
    except OSError as error:
        raise CfmergeError(f"align: {error.filename}: cannot be read: {error.strerror}") from None
    return repr((how, [(state.st_size, state.st_mtime_ns) for state in states]))


def _found(how: Align, models: Mapping[str, Model], spaces: Spaces) -> Found:
    """The permutations of all models into the order of one.

    Raises:
        NonFiniteError: a model holds a NaN or an infinity.
    """
    try:
        return _matched(how, models, spaces)
    except CfmergeError:
        for name, one in models.items():
            _check_finite("" if name in {BASE, how.to} else name, one, spaces)
        raise


def _check_finite(source: str, model: Model, spaces: Spaces) -> None:
    for name in spaces.axes:
        if not np.isfinite(model.source.read(model.names[name])).all():
            way_out = ", or pass --on-nonfinite skip-expert" if source else ""
            raise NonFiniteError(
                f"align: {model.told}: tensor {model.names[name]!r} holds NaN or infinity. Repair or leave out that "
                f"model{way_out}",
                source=source, tensor=model.names[name],
            )  # fmt: skip


def _matched(how: Align, models: Mapping[str, Model], spaces: Spaces) -> Found:
    tensors = {
        name: Chosen(Tensors(one.source), {n: one.names[n] for n in spaces.axes}) for name, one in models.items()
    }
    others = [name for name in models if name != how.to]
    for one in models.values():
        one.source.prepare()
    if how.method in {"many", "universe"}:
        return _jointly(how, tensors, spaces)
    moments = align.Moments.load(Path(how.moments).expanduser()) if how.moments else None
    permutations, told = {}, []
    for name in others:
        if moments is None:
            found = align.weight_matching(spaces, tensors[how.to], tensors[name], seed=how.seed, sweeps=how.sweeps)
            worth = f"inner product {found.before:.4g} before, {found.objective:.4g} after {_sweeps(found.sweeps)}"
        else:
            numbers = (_place(how, moments, how.to, models), _place(how, moments, name, models))
            heads = [space for space in spaces.names if space not in moments.spaces and spaces.children(space)]
            found = align.activation_matching(spaces, moments, models=numbers, partial=bool(heads))
            worth = f"sum of correlations {found.before:.4g} before, {found.objective:.4g} after"
            if heads:
                hold = found.permutations
                found = align.weight_matching(spaces, tensors[how.to], tensors[name], seed=how.seed, hold=hold)
                worth += f"; {tell(heads, heads)} have no moments, and are matched by weights"
        permutations[name] = found.permutations
        told.append(f"align: {name!r} to {how.to!r} by {how.method}: {worth}")
    return Found(permutations, tuple(told))


def _place(how: Align, moments: align.Moments, model: str, models: Mapping[str, Model]) -> int:
    """Which of the moments' models one is: by its name, or by that of another that is read from the same path."""
    path = models[model].source.path
    names = [model, *(name for name, one in models.items() if one.source.path == path)]
    found = next((name for name in names if name in moments.models), None)
    if found is None:
        raise CfmergeError(
            f"align: {how.moments}: has moments of {', '.join(moments.models)}, none of {model!r}; they go by the "
            f"names of the experts, and `base`; here these are {', '.join(models)}"
        )
    return moments.models.index(found)


def _sweeps(count: int) -> str:
    return "1 sweep" if count == 1 else f"{count} sweeps"


def _jointly(how: Align, tensors: Mapping[str, Chosen], spaces: Spaces) -> Found:
    """All models matched at once; then all in the order of the reference."""
    if how.method == "many":
        own = align.merge_many(spaces, tensors, seed=how.seed, sweeps=how.sweeps, keep_mean=False)
        worth = (
            f"sum of squared distances from the mean {own.history[0]:.4g} with each matched to "
            f"{next(iter(tensors))!r}, {own.history[-1]:.4g} after"
        )
        into = own.permutations
    else:
        found = align.universe(spaces, tensors, seed=how.seed, steps=how.sweeps)
        worth = f"inner products of all pairs {found.before:.4g} before, {found.objective:.4g} after"
        into = found.permutations
    back = {name: align.between(spaces, into[name], into[how.to]) for name in tensors if name != how.to}
    return Found(back, (f"align: {len(tensors)} models at once to {how.to!r} by {how.method}: {worth}",))
