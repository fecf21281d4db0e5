r"""Gains of a space's permutation from two models' weights: products of their tensors.

Model b is permuted to be near a. A space occurs on axes of some tensors. Unfold each on that axis, with b's other axes
in their present order:

    A = sum over (tensor, axis) of the space   W^A_(axis) (W^B_(axis), other axes permuted)^T                  (n, n)

so that `<W^A, permuted W^B> = sum_k A[k, sigma(k)]` over these tensors, as long as the space is on no second axis of a
tensor. Where an axis is a product, such as `heads heads.v`, the space's factor and its children's are kept, and the
product is over all else. Axes that are joined by `+` give a product for each part.

Tensors are read one at a time, and computed with in float32, or in float64 if one of the two is; so whoever calls does
it under `jax.enable_x64(True)`.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import linalg
from cfmerge.align.permuting import Permutations, order_of, permute_tensor
from cfmerge.errors import CfmergeError, and_more
from cfmerge.models.spaces import Spaces

Tensors = Mapping[str, Any]


class Term(NamedTuple):
    """A place where a space occurs: one part of an axis.

    Attributes:
        tensor: its name.
        axis: number of the axis.
        start: where on the axis the part begins.
        sizes: of its factors.
        keep: places among the factors of the space and its children; the space's is the first.
        names: of the space and its children there.
        others: other spaces of the tensor, and the space itself if it is on the tensor once more.
        features: how many entries of the tensor each neuron has, which are multiplied.
    """

    tensor: str
    axis: int
    start: int
    sizes: tuple[int, ...]
    keep: tuple[int, ...]
    names: tuple[str, ...]
    others: frozenset[str]
    features: int

    @property
    def size(self) -> int:
        """Elements of the space and its children."""
        return math.prod(self.sizes[place] for place in self.keep)


def terms_of(spaces: Spaces, space: str) -> tuple[Term, ...]:
    """Where a space occurs, with its children, part by part."""
    family, terms = {space, *spaces.children(space)}, []
    for tensor, number in spaces.uses(space):
        axes = spaces.axes[tensor]
        elsewhere = {name for other, axis in enumerate(axes) if other != number for name in axis.spaces}
        entries = math.prod(axis.size for other, axis in enumerate(axes) if other != number)
        start = 0
        for part in axes[number].parts:
            sizes = tuple(factor.size for factor in part)
            keep = tuple(place for place, factor in enumerate(part) if factor.name in family)
            names = tuple(part[place].name for place in keep)
            if len(set(names)) < len(names):
                raise CfmergeError(f"spaces: tensor {tensor!r}: {space!r} is twice in one product: {axes[number]}")
            if keep:
                others = elsewhere | {factor.name for factor in part} - family - {""}
                features = entries * math.prod(sizes) // math.prod(sizes[place] for place in keep)
                outer = frozenset(name.partition(".")[0] for name in others)
                terms.append(Term(tensor, number, start, sizes, keep, names, outer, features))
            start += math.prod(sizes)
    return tuple(terms)


def gain_of(spaces: Spaces, term: Term, a: Any, b: Any, permutations: Permutations) -> jax.Array:
    """The gain (n, n, and (m, m) for each child) of one term, from its tensor of both models."""
    own = spaces.axes[term.tensor][term.axis]
    beside = {name: p for name, p in permutations.items() if name in own.spaces and name not in term.names}
    b = permute_tensor(spaces, term.tensor, b, permutations, but=term.axis)
    if beside:
        b = b.take(order_of(own, beside), axis=term.axis)
    return product(a, b, axis=term.axis, start=term.start, sizes=term.sizes, keep=term.keep)


@functools.partial(jax.jit, static_argnames=("axis", "start", "sizes", "keep"))
def product(a: Any, b: Any, *, axis: int, start: int, sizes: tuple[int, ...], keep: tuple[int, ...]) -> jax.Array:
    """`sum over all other entries of a[k, i, ...] b[l, j, ...]` as `(k, l, i, j, ...)`, of one part of an axis."""

    def factored(tensor: jax.Array) -> jax.Array:
        part = jax.lax.slice_in_dim(tensor, start, start + math.prod(sizes), axis=axis)
        return part.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])

    left, right, kept = factored(a), factored(b), [axis + place for place in keep]
    others = [other for other in range(left.ndim) if other not in kept]
    found = jnp.tensordot(left, right, (others, others), precision=linalg.HIGHEST)
    return found.transpose([place + side * len(keep) for place in range(len(keep)) for side in (0, 1)])


def objective(
    spaces: Spaces, a: Tensors, b: Tensors, permutations: Permutations, names: Iterable[str] | None = None
) -> float:
    """`sum of <A, permuted B>` over some tensors, by default over all with numbers in them, in float64."""
    total = 0.0
    for name in spaces.axes if names is None else names:
        pair = pair_of(spaces, name, a, b)
        if pair is not None:
            total += float(inner(pair[0], permute_tensor(spaces, name, pair[1], permutations)))
    return total


@jax.jit
def inner(a: Any, b: Any) -> jax.Array:
    return jnp.sum(a.astype(jnp.float64) * b.astype(jnp.float64))


def pair_of(spaces: Spaces, name: str, a: Tensors, b: Tensors) -> tuple[Any, Any] | None:
    """A tensor of both models, in the dtype of the computation; None for integers, which do not permute."""
    pair = [read(spaces, name, tensors, who) for tensors, who in ((a, "a"), (b, "b"))]
    if any(tensor is None for tensor in pair):
        return None
    wide = any(tensor.dtype == np.float64 for tensor in pair)
    left, right = (tensor.astype(np.float64 if wide else np.float32, copy=False) for tensor in pair)
    return left, right


def read(spaces: Spaces, name: str, tensors: Tensors, who: str) -> Any:
    """One tensor of a model as it is stored; None if it holds no real floating-point numbers, and does not permute."""
    axes, tensor = spaces.axes[name], tensors[name]
    tensor = tensor if isinstance(tensor, jax.Array) else np.asarray(tensor)
    shape = tuple(axis.size for axis in axes)
    if tensor.shape != shape:
        raise CfmergeError(f"tensor {name!r}: model {who} has the shape {tensor.shape}, the spaces have {shape}")
    if jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    if any(axis.spaces for axis in axes):
        raise CfmergeError(
            f"tensor {name!r} of model {who}: has the dtype {tensor.dtype}; a tensor whose axes permute holds real "
            "floating-point numbers, and others have `-` for each axis"
        )
    return None


def check_model(spaces: Spaces, tensors: Tensors, who: str) -> None:
    """Raises `CfmergeError` unless a model has the tensors of the table, in their shapes, of finite numbers."""
    names = dict.fromkeys(tensors)  # `in` would read a tensor of a mapping that reads
    missing, added = [n for n in spaces.axes if n not in names], [n for n in names if n not in spaces.axes]
    if missing or added:
        raise CfmergeError(
            f"model {who}: has no tensor {and_more(missing)}, which the table of spaces has" if missing else
            f"model {who}: has a tensor {and_more(added)}, for which the table of spaces has no line"
        )  # fmt: skip
    for name in spaces.axes:
        tensor = read(spaces, name, tensors, who)
        if tensor is not None and not (jnp if isinstance(tensor, jax.Array) else np).isfinite(tensor).all():
            raise CfmergeError(f"tensor {name!r} of model {who}: has a NaN or an infinity")


def check_named(models: Any) -> None:
    """Raises `CfmergeError` unless several models have names."""
    if not isinstance(models, Mapping):
        raise CfmergeError(f"models: expected {{name: model}}, found {type(models).__name__}; give names")
