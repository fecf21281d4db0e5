"""Spaces tried on the model: its neurons are permuted, and its outputs compared."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.align.permuting import Permutations, identity_of, permute
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.pytree import flatten, named_leaves, unflatten
from cfmerge.models.spaces import Spaces, Use


def check_spaces(
    spaces: Spaces, f: Callable[..., Any], params: Any, *inputs: Any, tolerance: float = 1e-4, seed: int = 0
) -> None:
    """Nothing, if the model computes the same whatever the order of the neurons of each space.

        >>> def model(params, x):
        ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
        >>> key = jax.random.key(0)
        >>> params = {"up": jax.random.normal(key, (3, 8)), "down": jax.random.normal(key, (8, 2))}
        >>> spaces = cfmerge.align.trace_spaces(model, params, jnp.ones((1, 3)))
        >>> cfmerge.align.check_spaces(spaces, model, params, jnp.ones((1, 3)))

    Each space is permuted at random by itself, then all at once. Tensors whose entries are all equal, as new biases and
    norms are, get some noise first: permuted, they would show nothing. The model is compiled once, and runs once for
    each space.

    Args:
        spaces: by hand, by `parse_spaces`, or by `trace_spaces`.
        f: a pure function, such as `model.apply` of linen.
        params: a tree or a flat mapping of arrays.
        inputs: of the model, such as a batch of random numbers; of one that is all zeros nothing may be seen.
        tolerance: what an output may differ by, as a share of its largest entry: rounding. 1e-4 is for float32.
        seed: of the permutations.

    Raises:
        CfmergeError: a space whose permutation changes the outputs; tensors that are not the table's; an output that is
            not finite.
    """
    named, tree = flatten(params)
    _check_tensors(spaces, named)
    generator = np.random.default_rng(seed)
    tensors = {name: _noisy(tensor, generator) for name, tensor in named.items()}
    run = jax.jit(lambda tensors: f(unflatten(tree, tensors), *inputs))
    before = _outputs(run(tensors))
    for name, output in before.items():
        if not np.isfinite(output).all():
            raise CfmergeError(f"spaces: output {name!r} of the model is not finite, so that nothing can be compared")
    everything = {name: _shuffled(spaces, name, generator) for name in spaces.sizes}
    for name, permutation in everything.items():
        _compare(spaces, run, tensors, {name: permutation}, before, tolerance)
    _compare(spaces, run, tensors, everything, before, tolerance)


def _check_tensors(spaces: Spaces, named: Mapping[str, Any]) -> None:
    for name, tensor in named.items():
        if name not in spaces.axes:
            raise CfmergeError(f"spaces: no line for tensor {name!r} of the model")
        expected = tuple(axis.size for axis in spaces.axes[name])
        if np.shape(tensor) != expected:
            raise CfmergeError(f"spaces: tensor {name!r}: expected shape {expected}, found {np.shape(tensor)}")
    if unknown := [name for name in spaces.axes if name not in named]:
        raise CfmergeError(f"spaces: the model has no tensor {and_more(unknown)}")


def _noisy(tensor: Any, generator: np.random.Generator) -> Any:
    """A tensor in which the order of entries is to be seen; variances remain positive."""
    if not jnp.issubdtype(tensor.dtype, np.number):
        return tensor  # keys of random numbers
    array = np.asarray(tensor)
    if not array.size:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating) or (array != array.reshape(-1)[:1]).any():
        return array
    return (array + generator.uniform(0.1, 0.5, array.shape)).astype(array.dtype)


def _shuffled(spaces: Spaces, name: str, generator: np.random.Generator) -> np.ndarray:
    """A random permutation that moves something."""
    order = identity_of(spaces, name)
    shuffled = generator.permuted(order, axis=-1)
    return shuffled if (shuffled != order).any() else order[..., ::-1]


def _outputs(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree)[0].items()}


def _compare(
    spaces: Spaces,
    run: Callable[[Any], Any],
    tensors: Mapping[str, Any],
    permutations: Permutations,
    before: Mapping[str, np.ndarray],
    tolerance: float,
) -> None:
    """Raises `CfmergeError` if the permuted model's outputs differ."""
    after = _outputs(run(permute(spaces, tensors, permutations)))
    everywhere = max(np.abs(output).max(initial=0) for output in before.values())
    for name, output in before.items():
        largest = np.abs(output).max(initial=0)
        allowed = tolerance * max(largest, tolerance * everywhere)
        difference = np.abs(after[name] - output).max(initial=0)
        if not difference <= allowed:
            only = next(iter(permutations)) if len(permutations) == 1 else ""
            who = f"a permutation of {only!r}" if only else "a permutation of all spaces together"
            raise CfmergeError(
                f"spaces: {who} changes output {name or 'of the model'!r} by up to {difference:.3g}, where its largest "
                f"entry is {largest:.3g}, and rounding may be {allowed:.3g}"
                + (f"; it is on {and_more([_told(use) for use in spaces.uses(only)])}. " if only else ". ")
                + "Write `-` for an axis that does not permute; `cfmerge.align.trace_spaces` finds the spaces itself"
            )


def _told(use: Use) -> str:
    return f"{use.tensor} (axis {use.axis})"
