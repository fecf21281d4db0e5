"""Joint feature moments of Flax models that run on the same batches: what ZipIt! and matching by activations need.

    moments = collect_joint_linen(model, [{"params": a}, {"params": b}], batches, spaces)       linen
    moments = collect_joint_nnx([a, b], batches, spaces)                                        nnx

The features of a space are what the layers that read it are given, behind activations and norms. The line of a kernel
in the table of the spaces says what its inputs are: of `in 49 c3` every token is 49 rows of `c3`, and a convolution is
given the channels of every place. Several layers that read a space, such as a residual stream, all count. Seen are the
layers that `collect_linen` and `collect_nnx` see.
"""

import functools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.activations.inputs import rows_of
from cfmerge.activations.looking import LINEAR, Call, Forward, in_linen, in_nnx, kernel_of
from cfmerge.activations.readers import Lines, features_of, lines_of, spaces_in
from cfmerge.align import Moments
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import flatten
from cfmerge.models.spaces import Spaces

Features = dict[str, dict[str, list[Any]]]  # {kernel: {space: arrays (tokens, elements of the space)}}
Run = Callable[[Any], Features]  # of one model, on a batch


def collect_joint_linen(
    model: Any,
    variables: Sequence[Any],
    batches: Iterable[Any],
    spaces: Spaces | Sequence[Spaces],
    *,
    match: str | Sequence[str] = "*",
    names: Sequence[str] | None = None,
    **options: Any,
) -> Moments:
    """Joint moments of linen models that run on the same batches.

    Args:
        model: the `flax.linen.Module`, or a list with one for each model where they differ, as in their widths.
        variables: of each model, as for `model.apply`: `{"params": ...}`.
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        spaces: of the models, whose tensors are named as in `variables["params"]`, also behind a prefix such as
            `params/`; a list with one for each model where the widths differ.
        match: which spaces, by name: a pattern or several.
        names: of the models; none: a, b, c, ...
        options: of `model.apply`, the same for all models and batches: `method`, `rngs`, `train=False`, ...

    Returns:
        Moments of the spaces that match. Features of a space with children are those of all its children, in order,
        element by element.

    Raises:
        CfmergeError: no batches; a space that no layer is seen to read; spaces that do not fit the models.
    """
    modules = list(model) if isinstance(model, list | tuple) else [model] * len(variables)
    tables = [spaces] * len(variables) if isinstance(spaces, Spaces) else list(spaces)
    _check_numbers(len(variables), {"modules": modules, "spaces": tables})
    lines = [lines_of(own, table, match) for own, table in zip(_params(variables), tables, strict=True)]

    def forward(number: int) -> Forward:
        return in_linen(modules[number], LINEAR, lambda: _look, _joined, options)

    same = [(id(module), id(table)) for module, table in zip(modules, tables, strict=True)]
    return _collected(_runs(forward, same, lines, variables), lines, batches, names)


def collect_joint_nnx(
    models: Sequence[Any],
    batches: Iterable[Any],
    spaces: Spaces | Sequence[Spaces],
    *,
    match: str | Sequence[str] = "*",
    names: Sequence[str] | None = None,
    method: str = "__call__",
    **options: Any,
) -> Moments:
    """Joint moments of nnx models that run on the same batches. The models themselves are left as they are.

    Args:
        models: the `nnx.Module` of each, in the mode in which it is to run (`model.eval()`).
        batches: a tuple holds the arguments of a call, a mapping those by name, anything else is the only argument.
        spaces: of the models, whose tensors are named as in `nnx.state(model)`; a list with one for each model where
            the widths differ.
        match: which spaces, by name: a pattern or several.
        names: of the models; none: a, b, c, ...
        method: the method that is called.
        options: arguments by name that are the same for all models and batches.

    Returns:
        Moments of the spaces that match, as `collect_joint_linen` has them.

    Raises:
        CfmergeError: no batches; a space that no layer is seen to read; spaces that do not fit the models.
    """
    from flax import nnx

    tables = [spaces] * len(models) if isinstance(spaces, Spaces) else list(spaces)
    _check_numbers(len(models), {"spaces": tables})
    graphs, states = zip(*(nnx.split(model) for model in models), strict=True)
    params = [flatten(nnx.state(model, nnx.Param))[0] for model in models]
    lines = [lines_of(own, table, match) for own, table in zip(params, tables, strict=True)]

    def forward(number: int) -> Forward:
        return in_nnx(graphs[number], LINEAR, lambda: _look, _joined, method, options)

    same = [(graphs.index(graph), id(table)) for graph, table in zip(graphs, tables, strict=True)]
    return _collected(_runs(forward, same, lines, states), lines, batches, names)


def _params(variables: Sequence[Any]) -> list[dict[str, Any]]:
    for one in variables:
        if "params" not in one:
            raise CfmergeError(f"joint moments: expected variables {{'params': ...}}, found a tree of {', '.join(one)}")
    return [flatten(own["params"])[0] for own in variables]


def _check_numbers(models: int, given: Mapping[str, Sequence[Any]]) -> None:
    for what, found in given.items():
        if len(found) != models:
            raise CfmergeError(f"joint moments: {models} models and {len(found)} {what}; give one for all, or one each")


# --- running the models -------------------------------------------------------------------------------------------


def _look(call: Call) -> tuple[Any, Any]:
    return call.run(), rows_of(call.layer, call.inputs)


def _joined(known: Any, rows: Any) -> Any:
    return jnp.concatenate([known, rows])


def _runs(
    forward: Callable[[int], Forward], same: Sequence[Any], lines: Sequence[Lines], states: Sequence[Any]
) -> list[Run]:
    """What runs each model on a batch: models of one module and one table are compiled once."""

    def compiled(number: int) -> Callable[[Any, Any], Features]:
        own, look = lines[number], forward(number)

        def features(state: Any, batch: Any) -> Features:
            seen = {kernel_of(name): rows for name, rows in look(state, batch).items()}
            flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in seen.items() if name in own}
            return {name: features_of(rows, own[name]) for name, rows in flat.items()}

        return jax.jit(features)

    made = {key: compiled(same.index(key)) for key in dict.fromkeys(same)}
    return [functools.partial(made[key], state) for key, state in zip(same, states, strict=True)]


def _collected(
    runs: Sequence[Run], lines: Sequence[Lines], batches: Iterable[Any], names: Sequence[str] | None
) -> Moments:
    _check_numbers(len(runs), {} if names is None else {"names": names})
    moments = Moments([_letter(number) for number in range(len(runs))] if names is None else names)
    for batch in batches:
        found = [run(batch) for run in runs]
        _check_seen(found, lines, moments.models)
        known: dict[str, tuple[list[np.ndarray], Moments]] = {}
        for space, features in _of_batch(found):
            if space not in known or not all(map(np.array_equal, known[space][0], features)):
                own = Moments(moments.models)
                own.add(space, features)
                known[space] = features, own
            moments.merge(known[space][1])  # queries, keys and values are of one input, whose product is taken once
    if not moments.spaces:
        raise CfmergeError("no batches: joint moments need at least one")
    return moments


def _of_batch(found: Sequence[Features]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """A space, and an array of each model, for each reader of the space."""
    for kernel, spaces in found[0].items():
        for space, arrays in spaces.items():
            for number in range(len(arrays)):
                yield space, [np.asarray(own[kernel][space][number]) for own in found]


def _letter(number: int) -> str:
    return string.ascii_lowercase[number] if number < 26 else str(number)


def _check_seen(found: Sequence[Features], lines: Sequence[Lines], models: Sequence[str]) -> None:
    """Raises `CfmergeError` if the models ran different layers, or no layer that reads a space."""
    for own, model in zip(found, models, strict=True):
        if other := sorted(own.keys() ^ found[0].keys()):
            who, lacks = (model, models[0]) if other[0] in own else (models[0], model)
            raise CfmergeError(f"joint moments: model {who!r} calls the layer of {other[0]!r}, and {lacks!r} does not")
    seen, wanted = {space for own in found[0].values() for space in own}, spaces_in(lines[0].values())
    if wanted - seen:
        unseen = sorted(wanted - seen)
        readers = [repr(kernel) for kernel, blocks in lines[0].items() if unseen[0] in spaces_in([blocks])]
        raise CfmergeError(
            f"joint moments: no layer was seen to read space {and_more([repr(name) for name in unseen])}; its readers, "
            f"{and_more(readers)}, were not called as layers Dense, DenseGeneral or Conv, Linear or LinearGeneral, or "
            "lie within a scan of linen whose variable_axes lack 'intermediates': 0; leave such a space out: "
            f"match={sorted(seen)}, or give its features by Moments.add"
        )
