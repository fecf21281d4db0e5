r"""Permutations of a model's spaces, and the same model with its neurons in another order.

A permutation of a space of n elements is an integer array of shape `(n,)`: element i of the permuted model is element
`permutation[i]` of the model. A child, which permutes within each of n elements, has an array of shape `(n, m)`, whose
row i is for element i of the *permuted* model. So, for an axis `heads heads.v`,

    permuted[i, j] = model[sigma(i), tau_i(j)]
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cfmerge.align.trees import built, flat
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.models.spaces import Axis, Spaces

Permutations = Mapping[str, np.ndarray]


def permute(spaces: Spaces, tensors: Any, permutations: Permutations) -> Any:
    """The same model with its neurons in another order: it computes the same.

        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
        >>> model = {"up": np.array([[1, 2], [3, 4], [5, 6]]), "down": np.array([[1, 2, 3], [4, 5, 6]])}
        >>> cfmerge.align.permute(spaces, model, {"h": np.array([2, 0, 1])})["down"]
        array([[3, 1, 2],
               [6, 4, 5]])

    Args:
        spaces: of the model.
        tensors: `{name: array}`, NumPy or JAX, or a tree of arrays.
        permutations: `{space: permutation}`; a space that is not there keeps its order.

    Raises:
        CfmergeError: a tensor has no line in the table; what is no permutation.
    """
    check_permutations(spaces, permutations)
    permutations = {name: np.asarray(permutation) for name, permutation in permutations.items()}
    named, structure = flat(spaces, tensors)
    unknown = [name for name in named if name not in spaces.axes]
    if unknown:
        raise CfmergeError(f"permute: the table of spaces has no line for {and_more(unknown)}")
    return built(structure, {name: permute_tensor(spaces, name, own, permutations) for name, own in named.items()})


def permute_tensor(spaces: Spaces, name: str, tensor: Any, permutations: Permutations, but: int | None = None) -> Any:
    """One tensor of the permuted model; the axis `but` keeps its order.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> cfmerge.align.permute_tensor(spaces, "up", np.array([[1, 2], [3, 4], [5, 6]]), {"h": np.array([2, 0, 1])})
    array([[5, 6],
           [1, 2],
           [3, 4]])
    """
    for number, axis in enumerate(spaces.axes[name]):
        if number != but and any(space in permutations for space in axis.spaces):
            tensor = tensor.take(order_of(axis, permutations), axis=number)
    return tensor


def order_of(axis: Axis, permutations: Permutations) -> np.ndarray:
    """Which entry of the model each entry of an axis of the permuted model is: an integer array as long as the axis."""
    orders, start = [], 0
    for part in axis.parts:
        sizes = tuple(factor.size for factor in part)
        own, places = {}, []  # {space: its element}, of the entries of the permuted model; the same of the model
        for factor, place in zip(part, np.indices(sizes).reshape(len(sizes), -1), strict=True):
            own[factor.name] = place
            permutation = permutations.get(factor.name)
            if permutation is not None:
                place = permutation[own[factor.parent], place] if factor.parent else permutation[place]
            places.append(place)
        orders.append(start + np.ravel_multi_index(tuple(places), sizes))
        start += int(np.prod(sizes))
    return np.concatenate(orders)


def identity(spaces: Spaces) -> dict[str, np.ndarray]:
    """The permutations that leave every space as it is.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> cfmerge.align.identity(spaces)
    {'h': array([0, 1, 2])}
    """
    return {name: identity_of(spaces, name) for name in spaces.sizes}


def random_permutations(spaces: Spaces, seed: int) -> dict[str, np.ndarray]:
    """A random permutation of every space.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> cfmerge.align.random_permutations(spaces, seed=2)
    {'h': array([2, 0, 1])}
    """
    check_seed(seed)
    generator = np.random.default_rng(seed)
    return {name: generator.permuted(order, axis=-1) for name, order in identity(spaces).items()}


def inverse(spaces: Spaces, permutations: Permutations) -> dict[str, np.ndarray]:
    """The permutations that undo these: `permute(permute(model, p), inverse(p))` is the model.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> cfmerge.align.inverse(spaces, {"h": np.array([2, 0, 1])})
    {'h': array([1, 2, 0])}
    """
    result = {}
    for name, permutation in permutations.items():
        back = np.argsort(permutation, axis=-1)
        parent = name.rpartition(".")[0]
        result[name] = back[np.argsort(permutations[parent])] if parent in permutations else back
    return result


def compose(spaces: Spaces, first: Permutations, second: Permutations) -> dict[str, np.ndarray]:
    """The permutations that do the first, then the second: `permute(permute(model, first), second)`.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> cfmerge.align.compose(spaces, {"h": np.array([2, 0, 1])}, {"h": np.array([2, 0, 1])})
    {'h': array([1, 2, 0])}
    """
    one, two, result = {**identity(spaces), **first}, {**identity(spaces), **second}, {}
    for name in spaces.sizes:
        parent = name.rpartition(".")[0]
        result[name] = (
            np.take_along_axis(one[name][two[parent]], two[name], axis=-1) if parent else one[name][two[name]]
        )
    return result


def check_permutations(spaces: Spaces, permutations: Permutations) -> None:
    """Raises `CfmergeError` if a space is unknown, or its array is no permutation of its elements.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
    >>> try:
    ...     cfmerge.align.check_permutations(spaces, {"h": np.arange(2)})
    ... except cfmerge.CfmergeError as error:
    ...     print(error)
    permutations: space 'h': expected each of 0 .. 2 once, in an array of shape (3,); found an array of shape (2,)
    """
    if not isinstance(permutations, Mapping):
        raise CfmergeError(
            f"permutations: expected {{space: permutation}}, found {type(permutations).__name__}"
            + ("; give its `permutations`" if hasattr(permutations, "permutations") else "")
        )
    for name, permutation in permutations.items():
        if name not in spaces.sizes:
            raise CfmergeError(f"permutations: there is no space {name!r}; there is: {', '.join(spaces.sizes)}")
        shape = _shape(spaces, name)
        good = np.shape(permutation) == shape
        integers = np.issubdtype(np.asarray(permutation).dtype, np.integer)
        if not good or not integers or not np.array_equal(np.sort(permutation, axis=-1), identity_of(spaces, name)):
            found = f"an array of shape {np.shape(permutation)}" + (
                "" if not good else " with other values" if integers else " of numbers that are no integers"
            )
            raise CfmergeError(
                f"permutations: space {name!r}: expected each of 0 .. {spaces.sizes[name] - 1} once, in an array of "
                f"shape {shape}; found {found}"
            )


def started(
    spaces: Spaces, models: Iterable[str], start: Mapping[str, Permutations] | None
) -> dict[str, dict[str, np.ndarray]]:
    """The permutations that a search starts from, of each model: the user's, and the identity where there are none.

    Raises:
        CfmergeError: there is no such model, or no such permutation.
    """
    begin = {name: identity(spaces) for name in models}
    for name, permutations in (start or {}).items():
        if name not in begin:
            raise CfmergeError(f"start: there is no model {name!r}{nearest(name, begin)}")
        check_permutations(spaces, permutations)
        begin[name] |= {space: np.asarray(permutation) for space, permutation in permutations.items()}
    return begin


def identity_of(spaces: Spaces, name: str) -> np.ndarray:
    """The permutation that leaves one space as it is."""
    return np.broadcast_to(np.arange(spaces.sizes[name]), _shape(spaces, name)).copy()


def _shape(spaces: Spaces, name: str) -> tuple[int, ...]:
    parent = name.rpartition(".")[0]
    return (spaces.sizes[parent], spaces.sizes[name]) if parent else (spaces.sizes[name],)
