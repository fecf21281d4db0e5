r"""MergeMany: several models of different initialisation, each permuted to the mean of the others, and their mean.

Samuel K. Ainsworth, Jonathan Hayase, Siddhartha Srinivasa, "Git Re-Basin: Merging Models modulo Permutation
Symmetries", ICLR 2023, https://arxiv.org/abs/2209.04836, algorithm 3. With T models, permuted X_i = P_i W_i:

    for i in random order, until no model gains:
        P_i = argmax_P  <mean of X_j, j != i;  P W_i>                               (weight matching, from P_i)

Each step lowers the same sum of squared distances,

    sum_i |X_i - mean|^2,       by  2 (T - 1)/T  times what the matching gains

so the search ends. It starts from all models matched to the first one; the authors' starts from the models as they are,
whose mean tells little. The mean of the others is formed tensor by tensor when the matching asks for it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.align.gains import Tensors, check_model, check_named, read
from cfmerge.align.permuting import Permutations, permute_tensor, started
from cfmerge.align.trees import built, flat
from cfmerge.align.weight_matching import search
from cfmerge.core.random import check_seed
from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Spaces


class Many(NamedTuple):
    """Several models, permuted to be near their mean.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
    >>> a = {"up": np.eye(2), "down": np.array([[1.0, 2.0]])}
    >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([1, 0])})
    >>> many = cfmerge.align.merge_many(spaces, {"a": a, "b": b})
    >>> many.mean["down"].tolist(), many.history[-1]
    ([[1.0, 2.0]], 0.0)

    Attributes:
        permutations: `{model: {space: permutation}}`.
        mean: of the permuted models, as the first model was given and in its dtype.
        distances: `{model: its distance from the mean}`, the root of the sum of squares over all tensors.
        history: the sum of squared distances where the search started, and after each sweep over the models.
    """

    permutations: dict[str, dict[str, np.ndarray]]
    mean: Any
    distances: dict[str, float]
    history: tuple[float, ...]


def merge_many(
    spaces: Spaces,
    models: Mapping[str, Tensors],
    *,
    seed: int = 0,
    sweeps: int = 100,
    start: Mapping[str, Permutations] | None = None,
    keep_mean: bool = True,
) -> Many:
    """The permutations of several models that bring them near their mean, and this mean: Git Re-Basin's MergeMany.

    Args:
        spaces: of all models.
        models: `{name: {tensor: array}}`, two or more, or trees of arrays. A mapping may read a tensor when it is
            asked for.
        seed: of the order of the models, and of the spaces.
        sweeps: over the models, at most.
        start: permutations of each model to start from; by default each is matched to the first model.
        keep_mean: the result has the mean, in memory; otherwise `{}` in its place.

    Raises:
        CfmergeError: fewer than two models; models that do not fit the spaces; a NaN or an infinity; a tensor of
            integers that differs between models.

    Example:
        >>> table = {"up": "h, in -", "down": "-, in h"}
        >>> a = {"up": np.eye(3), "down": np.array([[1.0, 2.0, 3.0]])}
        >>> spaces = cfmerge.align.parse_spaces(table, {name: array.shape for name, array in a.items()})
        >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([2, 0, 1])})
        >>> many = cfmerge.align.merge_many(spaces, {"a": a, "b": b})
        >>> many.mean["down"].tolist(), many.distances
        ([[1.0, 2.0, 3.0]], {'a': 0.0, 'b': 0.0})
    """
    check_named(models)
    if len(models) < 2:
        raise CfmergeError(f"merge_many: takes two or more models, found {len(models)}")
    structure = flat(spaces, next(iter(models.values())))[1]
    models = {name: flat(spaces, model)[0] for name, model in models.items()}
    for name, model in models.items():
        check_model(spaces, model, name)
    check_seed(seed)
    first, *others = models
    permutations = started(spaces, models, start)
    if start is None:
        for name in others:
            permutations[name] = search(spaces, models[first], models[name], seed=seed).permutations
    generator, gains = np.random.default_rng(seed), list[float]()
    while len(gains) < sweeps and (not gains or gains[-1] > 0):
        gains.append(0.0)
        for name in generator.permutation(list(models)):
            rest = _Mean(spaces, {other: model for other, model in models.items() if other != name}, permutations)
            number = int(generator.integers(2**31))
            found = search(spaces, rest, models[name], seed=number, start=permutations[name])
            permutations[name] = found.permutations
            gains[-1] += found.objective - found.history[0]
    mean, squares = _mean_of(spaces, models, permutations, keep_mean)
    share = 2 * (len(models) - 1) / len(models)
    history = sum(squares.values()) + share * np.cumsum([0.0, *reversed(gains)])[::-1]
    return Many(
        permutations,
        built(structure, mean) if keep_mean else {},
        {name: s**0.5 for name, s in squares.items()},
        tuple(history.tolist()),
    )


class _Mean(Mapping[str, Any]):
    """The mean of permuted models, each tensor formed when it is asked for, in float32 or float64."""

    def __init__(self, spaces: Spaces, models: Mapping[str, Tensors], permutations: Mapping[str, Permutations]):
        self.spaces, self.models, self.permutations = spaces, models, permutations

    def __iter__(self) -> Iterator[str]:
        return iter(self.spaces.axes)

    def __len__(self) -> int:
        return len(self.spaces.axes)

    def __getitem__(self, name: str) -> Any:
        total = np.float32(0)
        for who, model in self.models.items():
            tensor = read(self.spaces, name, model, who)
            if tensor is None:
                return model[name]
            with jax.enable_x64(True):
                tensor = tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)
                tensor = permute_tensor(self.spaces, name, tensor, self.permutations[who])
                total = total + tensor
        return total / np.float32(len(self.models))


def _mean_of(
    spaces: Spaces, models: Mapping[str, Tensors], permutations: Mapping[str, Permutations], keep: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """The mean of all permuted models, and `{model: its squared distance from it}`."""
    every, mean, squares = _Mean(spaces, models, permutations), {}, dict.fromkeys(models, 0.0)
    first = next(iter(models.values()))
    for name in spaces.axes:
        values = every[name]
        for who, model in models.items():
            tensor = model[name]
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                if not np.array_equal(tensor, values):
                    raise CfmergeError(f"tensor {name!r}: differs between models, and {tensor.dtype} is not averaged")
                continue
            with jax.enable_x64(True):
                apart = permute_tensor(spaces, name, tensor, permutations[who]).astype(values.dtype) - values
                squares[who] += float((apart.astype(np.float64) ** 2).sum())
        if keep:
            mean[name] = values.astype(first[name].dtype)
    return mean, squares
