"""Models of different initialisation zipped on their spaces: ZipIt! for whole models, as far as a space or all through.

The features of each zipped space become groups (zipit.py), the tensors that write it are merged by M, those that read
it take U (folding.py). Where the zip stops, the trunk is one for all models, and each model keeps its head, whose first
tensors have U folded in (flow.py).
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.align.flow import Flow, divided, reads, writes
from cfmerge.align.folding import Folds, computing
from cfmerge.align.permuting import Permutations
from cfmerge.align.trees import flat
from cfmerge.align.zip_matches import Rule, Similarity, matched, similarity_of, told_by
from cfmerge.align.zip_weights import WeightSimilarity, matched_by_weights, order_of_flow
from cfmerge.align.zipit import OFFICIAL
from cfmerge.align.zipped import Zipped
from cfmerge.errors import CfmergeError, and_more
from cfmerge.models.buffers import is_buffer, is_counter
from cfmerge.models.kinds import is_running
from cfmerge.models.layouts import Shape
from cfmerge.models.spaces import Spaces, parse_spaces, same_spaces
from cfmerge.models.ties import OUTPUTS

LANGUAGE = re.compile(r"For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration)$|LMHeadModel$")  # have an output layer
Model = Mapping[str, Any]


def zip_models(
    spaces: Spaces | Sequence[Spaces],
    models: Mapping[str, Any] | Sequence[Any],
    similarity: Any,
    *,
    stop_at: str | Sequence[str] | None = None,
    method: str = "zip",
    width: Mapping[str, int] | float | None = None,
    budget: float = 0.125,
    penalty: float = 0.3,
    permutations: Sequence[Permutations] | None = None,
    tied: Sequence[str] = (),
    reset_norms: bool = False,
    compat: str | None = None,
) -> Zipped:
    """Several models as one, or as one trunk with a head for each.

        >>> table = {"up": "hidden, in -", "down": "-, in hidden"}
        >>> spaces = cfmerge.align.parse_spaces(table, {"up": (3, 2), "down": (1, 3)})
        >>> a = {"up": np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 2.0]]), "down": np.array([[1.0, 2.0, 4.0]])}
        >>> b = cfmerge.align.permute(spaces, a, {"hidden": np.array([2, 0, 1])})
        >>> zipped = cfmerge.align.zip_models(spaces, {"a": a, "b": b}, "weights")
        >>> zipped.model("b")["up"].tolist() == a["up"].tolist()
        True
        >>> zipped.groups["hidden"].partition
        array([0, 1, 2, 2, 0, 1])

    Args:
        spaces: of all models; or those of each, where sizes do not follow from shapes.
        models: by name, or in order; each a mapping of arrays by name, which may read an array when it is asked for, or
            a tree whose leaves are called as `formats.pytree` calls them (`Dense_0/kernel`).
        similarity: how alike the features of a space are, all models side by side: joint `Moments`, whose correlation
            is taken; or `{space: (O, O)}`. `"weights"`, an extension: the cosine of their weights, see zip_weights.py.
        stop_at: the last space that is zipped, or some: all in front of it are zipped too. None: all spaces.
        method: "zip"; "permute": the assignment of each model to the first; "identity": the same order.
        width: how many groups are left, `{space: n}`, or a factor of the first model's; None: as many as it has.
        budget, penalty, compat: see `match`.
        permutations: for each model, the order of spaces that are not matched by similarity; they are averaged.
        tied: tensors that are also the model's output layer, under one name; of Hugging Face's files that is known.
        reset_norms: running statistics of BatchNorm in the trunk will be estimated again with inputs.

    Raises:
        CfmergeError: other tensors than the spaces'; no such space; no similarity of one; a tensor that cannot be
            zipped; statistics of BatchNorm that will be wrong.
    """
    names, mappings, layout = _flat(models, spaces if isinstance(spaces, Spaces) else spaces[0])
    own = _spaces(spaces, names, mappings)
    flow = divided(own[0], stop_at)
    _check_norms(own[0], flow, reset_norms)
    rule = Rule(method, width, budget, penalty, compat, permutations)
    order, by, rule, notes = _told(similarity, names, own, mappings, flow, rule)
    known = getattr(similarity, "models", names)
    if isinstance(models, Mapping) and set(known) != set(names):
        notes.append(f"the moments of {', '.join(known)} are taken, in that order, to be of {', '.join(names)}")
    folds = matched(names, own, order, by, rule)
    _check_tied(own[0], flow, folds, {*tied, *_outputs(mappings)})
    if flow.plain:
        notes.append(f"{and_more(flow.plain)}: of no space, averaged as they are")
    trunk = {name: _shared(name, flow, folds, names, mappings, notes) for name in flow.trunk}
    heads = {
        model: {name: _kept(name, folds, number, model, tensors) for name in flow.heads}
        for number, (model, tensors) in enumerate(zip(names, mappings, strict=True))
    }
    if reset_norms and (stale := _running(own[0], flow)):
        notes.append(f"running statistics are those of no model until they are estimated again: {and_more(stale)}")
    sizes = {**own[0].sizes, **{space: groups.width for space, groups in folds.groups.items()}}
    table = own[0].table()
    return Zipped(
        models=tuple(names),
        trunk=trunk,
        heads=heads,
        groups=dict(folds.groups),
        blocks=tuple(folds.blocks),
        table={name: table[name] for name in mappings[0]},
        sizes=sizes,
        stop_at=(stop_at,) if isinstance(stop_at, str) else tuple(stop_at or ()),
        notes=tuple(notes),
        layout=layout,
    )


def _told(
    similarity: Any, names: Sequence[str], own: Sequence[Spaces], models: Sequence[Model], flow: Flow, rule: Rule
) -> tuple[Sequence[str], Similarity | None, Rule, list[str]]:
    """The order in which spaces are matched, how alike their features are, a rule with known permutations, notes."""
    blocks = [name for name in flow.zipped if own[0].children(name)]
    if isinstance(similarity, str) and similarity == "weights":
        found = matched_by_weights(names, own, models, flow.zipped)
        order = flow.zipped if found else order_of_flow(own[0], flow.zipped)
        note = "similarities are from weights, an extension of ZipIt!, whose authors take activations"
        return order, WeightSimilarity(models, found), _with(blocks, found, rule), [note]
    if similarity is None:
        return flow.zipped, None, rule, []
    by = similarity_of(similarity, names, rule.compat == OFFICIAL)
    known = set(told_by(similarity)).union(*(rule.permutations or ()))
    untold = [name for name in blocks if name not in known]
    if untold and rule.method != "identity" and (found := matched_by_weights(names, own, models, flow.zipped)):
        note = f"{and_more(untold)}: in an order that weights tell, since no similarity does"
        return flow.zipped, by, _with(untold, found, rule), [note]
    return flow.zipped, by, rule, []


def _flat(models: Mapping[str, Any] | Sequence[Any], spaces: Spaces) -> tuple[list[str], list[Model], Any]:
    """Names, mappings by name, and the structure of a tree, which is None of a mapping."""
    pairs = list(models.items() if isinstance(models, Mapping) else ((f"model_{i}", m) for i, m in enumerate(models)))
    if len(pairs) < 2:
        raise CfmergeError(f"zip: {len(pairs)} models; give two or more")
    names, mappings, layouts = [str(name) for name, _ in pairs], [], []
    for _, model in pairs:
        mapping, layout = flat(spaces, model)
        mappings.append(mapping)
        layouts.append(layout)
    return names, mappings, layouts[0]


def _spaces(spaces: Spaces | Sequence[Spaces], names: Sequence[str], models: Sequence[Model]) -> list[Spaces]:
    """The spaces of each model, whose tensors have the shapes that they tell."""
    if not isinstance(spaces, Spaces) and len(spaces) != len(models):
        raise CfmergeError(f"zip: spaces of {len(spaces)} models, expected of {len(models)}, or those of all")
    result = []
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        one = spaces if isinstance(spaces, Spaces) else spaces[number]
        expected = {tensor: tuple(axis.size for axis in axes) for tensor, axes in one.axes.items()}
        shapes = _shapes(model)
        same_spaces(expected, shapes, "zip: the table of spaces", f"model {name!r}")
        try:
            result.append(one if shapes == expected else parse_spaces(one.table(), shapes, _given(one)))
        except CfmergeError as error:
            raise CfmergeError(f"model {name!r}: {error}") from None
    return result


def _shapes(model: Model) -> dict[str, Shape]:
    headers = getattr(model, "tensors", None)  # of a model in files, whose tensors are not read for it
    return {name: tuple(np.shape(model[name]) if headers is None else headers[name].shape) for name in model}


def _given(spaces: Spaces) -> dict[str, int]:
    """The sizes that do not follow from shapes: those of spaces that stand beside another space on all their axes."""
    alone = {
        factor.name for axes in spaces.axes.values() for axis in axes for part in axis.parts for factor in part
        if factor.name and sum(bool(other.name) for other in part) == 1
    }  # fmt: skip
    return {name: size for name, size in spaces.sizes.items() if name not in alone}


def _with(blocks: Sequence[str], found: Sequence[Permutations] | None, rule: Rule) -> Rule:
    """The rule, and the permutations that were found of some spaces with children, where the user has none."""
    if found is None:
        return rule
    mine = rule.permutations or [{}] * len(found)
    left = [block for block in blocks if not any(block in one for one in mine)]
    both = [
        {**own, **{name: order for name, order in one.items() if name.partition(".")[0] in left}}
        for own, one in zip(mine, found, strict=True)
    ]
    return dataclasses.replace(rule, permutations=both)


def _running(spaces: Spaces, flow: Flow) -> list[str]:
    return [name for name in flow.trunk if is_running(name, spaces.axes) and writes(spaces, name)]


def _check_norms(spaces: Spaces, flow: Flow, reset: bool) -> None:
    if not reset and (stale := _running(spaces, flow)):
        raise CfmergeError(
            f"zip: {and_more([repr(name) for name in stale])}: running statistics of BatchNorm are those of no zipped "
            "feature; say reset_norms=True (--reset-norms) and estimate them again with inputs "
            "(cfmerge.activations.reset_norms_linen, reset_norms_nnx), or stop in front of them"
        )


def _outputs(models: Sequence[Model]) -> set[str]:
    """The embeddings of models in files that are their output layers too, and are stored once."""
    found = set()
    for source, model in ((getattr(model, "source", None), model) for model in models):
        if source is not None and any(map(LANGUAGE.search, source.config.get("architectures") or ())):
            found |= {name for alias, name in source.ties.items() if (alias, name) in OUTPUTS and alias not in model}
    return found


def _check_tied(spaces: Spaces, flow: Flow, folds: Folds, tied: Collection[str]) -> None:
    for name in sorted(tied):
        if name not in spaces.axes:
            raise CfmergeError(f"zip: tied: there is no tensor {name!r}")
        wide = [
            space for space in sorted(writes(spaces, name))
            if space in folds.groups and not folds.groups[space].is_permutation
        ]  # fmt: skip
        if wide and name in flow.trunk:
            raise CfmergeError(
                f"zip: tensor {name!r} writes {wide[0]!r} and, as the output layer, reads it: it would have to be "
                "merged by M and by U; store the output layer by itself, or match by permutations: method='permute'"
            )
        if name in flow.trunk and len(flow.zipped) < len(spaces.names):
            raise CfmergeError(
                f"zip: tensor {name!r} is of the trunk and, as the output layer, of each model's head; store the "
                "output layer by itself"
            )


def _shared(
    name: str, flow: Flow, folds: Folds, names: Sequence[str], models: Sequence[Model], notes: list[str]
) -> Any:
    """One tensor of the trunk."""
    first = models[0][name]
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return _same(name, names, models, notes)
    if name in flow.plain:
        shapes = {np.shape(model[name]) for model in models}
        if len(shapes) > 1:
            raise CfmergeError(f"zip: tensor {name!r} has the shapes {' and '.join(map(str, sorted(shapes)))}")
        return _as(sum(computing(model[name]) for model in models) / len(models), first)
    whole = _as(folds.written(name, [_Later(model, name) for model in models]), first)
    return _finite(name, whole, dict(zip(names, models, strict=True)))


class _Later:
    """A tensor that is read when it is computed with."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.model[self.name], dtype)


def _same(name: str, names: Sequence[str], models: Sequence[Model], notes: list[str]) -> Any:
    """Integers, which are kept where they are the same, or where no parameter hangs on them."""
    first = models[0][name]
    if is_counter(name):
        return first
    for who, model in zip(names[1:], models[1:], strict=True):
        if not np.array_equal(np.asarray(first), np.asarray(model[name])):
            if not is_buffer(name, np.shape(first)):
                raise CfmergeError(
                    f"zip: tensor {name!r} holds integers, which are others in model {who!r} than in {names[0]!r}, and "
                    "are not averaged"
                )
            notes.append(f"{name}: kept from {names[0]}; {who} has others")
    return first


def _kept(name: str, folds: Folds, number: int, who: str, model: Model) -> Any:
    """One tensor of a model's head, with U of the zipped spaces that it reads."""
    tensor, spaces = model[name], folds.spaces[number]
    if not any(space in folds.groups or space in folds.blocks[number] for space in reads(spaces, name)):
        return tensor
    return _finite(name, _as(folds.read(name, computing(tensor), number), tensor), {who: model})


def _finite(name: str, result: Any, models: Mapping[str, Model]) -> Any:
    """The tensor that was made of the models', if it is finite.

    Raises:
        CfmergeError: it is not; the message says which model's is not, or that the dtype is too narrow.
    """
    if not jnp.isfinite(result).all():
        broken = [who for who, model in models.items() if not np.isfinite(computing(model[name])).all()]
        why = f"of model {broken[0]!r} holds NaN or infinity" if broken else f"does not fit {result.dtype} when zipped"
        raise CfmergeError(f"zip: tensor {name!r} {why}")
    return result


def _as(values: Any, example: Any) -> Any:
    """An array of the dtype and the kind, NumPy's or JAX's, of another."""
    array = np.asarray(values).astype(example.dtype)
    return jnp.asarray(array) if isinstance(example, jax.Array) else array
