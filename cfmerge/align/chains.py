"""Spaces of models that are a chain of layers, MLPs and ConvNets, by the names and shapes of their tensors alone.

Each layer reads what the one before it writes, and norms lie on what is written last. Channels that are flattened in
front of a dense layer are the last factor of its inputs in Flax, `(h, w, c)`, and the first in PyTorch, `(c, h, w)`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import named_leaves
from cfmerge.models.layouts import Shape
from cfmerge.models.spaces import FIXED, READS, Spaces, parse_spaces

COLLECTIONS = re.compile("^(params|batch_stats)/")  # of Flax


class Layer(NamedTuple):
    """Tensors that have a name in common: `{last part of its name: (name, shape)}`."""

    name: str
    tensors: dict[str, tuple[str, Shape]]

    @property
    def matrix(self) -> str:
        """The last part of its matrix's name; empty for a norm."""
        return next((key for key in ("kernel", "weight") if len(self.tensors.get(key, ("", ()))[1]) > 1), "")

    @property
    def shape(self) -> Shape:
        """`(out, in, window ...)` of its matrix."""
        own = self.tensors[self.matrix][1]
        return (own[-1], own[-2], *own[:-2]) if self.matrix == "kernel" else own


def chain_spaces(params: Any, layers: Sequence[str] | None = None) -> Spaces:
    """The spaces of layers that are called one after the other: an MLP, or a ConvNet with norms.

        >>> shapes = {"0.weight": (8, 3, 3, 3), "0.bias": (8,), "1.weight": (8,), "3.weight": (5, 32)}
        >>> model = {name: np.ones(shape) for name, shape in shapes.items()}
        >>> cfmerge.align.chain_spaces(model).table()
        {'0.weight': '_0, in 3, -, -', '0.bias': '_0', '1.weight': '_0', '3.weight': '-, in _0 4'}

    It is for models whose code is not at hand: `trace_spaces` guesses nothing. Tensors are named as those of Flax
    (`kernel`, `bias`, `scale`, `mean`, `var`) or of PyTorch (`weight`, `bias`, `running_mean`). Branches and sums need
    a table, and so does GroupNorm: names and shapes do not tell its groups, nor, in PyTorch, that it is one.

    Args:
        params: a tree, or a flat mapping; of arrays, or `jax.ShapeDtypeStruct`.
        layers: their names in the order of calls, each norm behind the layer on whose outputs it lies. By default those
            of a flat mapping with names of PyTorch are taken as they come; of Flax, convolutions and then dense
            layers by their numbers, with norms behind all but the last, or behind the convolutions.

    Raises:
        CfmergeError: layers that are missing or unknown; one that does not read what the one before it writes; a norm
            of another size; GroupNorm.
    """
    shapes = _shapes(params)
    known = _layers(shapes)
    order = _order(known) if layers is None else [name.replace(".", "/") for name in layers]
    if wrong := [name for name in order if name not in known] or [name for name in known if name not in order]:
        what = "the model has no layer" if wrong[0] not in known else "the order leaves out layer"
        raise CfmergeError(f"spaces: {what} {and_more(wrong)}; the model's layers: {', '.join(known)}")
    return parse_spaces(_table([known[name] for name in order], shapes), shapes)


def _shapes(params: Any) -> dict[str, Shape]:
    flat = isinstance(params, Mapping) and not any(isinstance(value, Mapping) for value in params.values())
    named = params if flat else named_leaves(params)[0]
    return {name: tuple(np.shape(tensor)) for name, tensor in named.items()}


def _layers(shapes: Mapping[str, Shape]) -> dict[str, Layer]:
    known: dict[str, Layer] = {}
    for name, shape in shapes.items():
        own, _, last = re.sub(COLLECTIONS, "", name).replace(".", "/").rpartition("/")
        known.setdefault(own, Layer(own, {})).tensors[last] = (name, shape)
    return known


def _order(known: Mapping[str, Layer]) -> list[str]:
    """The layers of PyTorch as they come; those of Flax by kind and number, with norms between them."""
    if not any("kernel" in layer.tensors for layer in known.values()):
        _check_order(known)
        return list(known)
    matrices = sorted((n for n in known if known[n].matrix), key=lambda n: (len(known[n].shape) == 2, _natural(n)))
    norms = sorted((n for n in known if not known[n].matrix), key=_natural)
    windows = sum(len(known[name].shape) > 2 for name in matrices)
    kinds = {re.sub(r"\d", "", name) for name in norms}
    if norms and (len(norms) not in (windows, len(matrices) - 1) or len(kinds) > 1 or len(norms) == len(matrices)):
        raise CfmergeError(
            f"spaces: which layers do the norms {', '.join(norms)} lie behind? Give all layers in the order of calls: "
            f"chain_spaces(params, {[*matrices, *norms]})"
        )
    behind = dict(zip(matrices, norms, strict=False))
    return [name for matrix in matrices for name in (matrix, behind.get(matrix)) if name]


def _check_order(known: Mapping[str, Layer]) -> None:
    """Raises `CfmergeError` where layers of PyTorch do not come as they are called: files have them by the alphabet."""
    numbered = sorted(known, key=_natural)
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(re.sub(r"\d+", "", name), []).append(name)
    norms = [not layer.matrix for layer in known.values()]
    if any(own != [name for name in numbered if name in own] for own in alike.values()) or any(
        norm and before for before, norm in zip([True, *norms], norms, strict=False)
    ):
        raise CfmergeError(
            f"spaces: the layers come as {', '.join(known)}, which is no order of calls; give it: "
            f"chain_spaces(params, {numbered})"
        )


def _natural(name: str) -> list[Any]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def _table(layers: Sequence[Layer], shapes: Mapping[str, Shape]) -> dict[str, str]:
    last = [layer.name for layer in layers if layer.matrix][-1:]
    space, size, writer = FIXED, 0, ""
    table = {}
    for layer in layers:
        if layer.matrix:
            reads = _reads(layer, space, size, writer)
            depthwise = size > 1 and layer.shape[:2] == (size, 1)
            if not depthwise:
                space, size = (FIXED if layer.name in last else _word(layer.name)), layer.shape[0]
            writer = layer.name
            window = [FIXED] * (len(layer.shape) - 2)
            axes = [*window, reads, space] if layer.matrix == "kernel" else [space, reads, *window]
            table[layer.tensors[layer.matrix][0]] = ", ".join(axes)
        elif "GroupNorm" in layer.name:
            raise CfmergeError(f"spaces: layer {layer.name!r}: a chain has no groups; use `trace_spaces` or a table")
        for key, (name, shape) in layer.tensors.items():
            if key != layer.matrix:
                if shape and size and shape != (size,):
                    raise CfmergeError(
                        f"spaces: tensor {name!r}: expected shape ({size},), as layer {writer!r} writes; found {shape}"
                    )
                table[name] = space if shape else ""
    return {name: table[name] for name in shapes}


def _reads(layer: Layer, space: str, size: int, writer: str) -> str:
    """A matrix's inputs: what was written last, flattened or not."""
    own = layer.shape[1]
    if space == FIXED or (own == 1 and layer.shape[0] == size):
        return f"{READS} {FIXED}"
    if own % size:
        raise CfmergeError(
            f"spaces: layer {layer.name!r} reads {own} inputs, and layer {writer!r} before it writes {size}: "
            "give the layers in the order of calls"
        )
    places = own // size
    if places == 1:
        return f"{READS} {space}"
    return f"{READS} {places} {space}" if layer.matrix == "kernel" else f"{READS} {space} {places}"


def _word(name: str) -> str:
    """A layer's name in the letters that a table has."""
    word = re.sub(r"[^\w/:-]", "_", name)
    return word if re.match(r"[A-Za-z_]", word) and word != READS else f"_{word}"
