"""Mean and variance of each channel of what a layer is given, or makes, over all other axes and over batches."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cfmerge.activations.inputs import wide
from cfmerge.activations.looking import Forward
from cfmerge.errors import CfmergeError


class Channels(NamedTuple):
    """Of so many tokens; layers that are stacked have an axis in front of all three."""

    tokens: Any
    mean: Any
    variance: Any


def channels_of(values: Any, axes: tuple[int, ...], mask: Any = None) -> Channels:
    """Those of one batch: `axes` are the channels', and `mask` says which entries count."""
    kept = {axis % values.ndim for axis in axes}
    others = tuple(axis for axis in range(values.ndim) if axis not in kept)
    values = wide(values)
    where = None if mask is None else jnp.broadcast_to(mask, values.shape)
    mean = jnp.mean(values, axis=others, where=where)
    variance = jnp.mean(jnp.square(values - jnp.expand_dims(mean, others)), axis=others, where=where)
    tokens = values.size / mean.size if where is None else jnp.sum(where) / mean.size
    return Channels(jnp.asarray(tokens, values.dtype), mean, variance)


def together(one: Channels, two: Channels) -> Channels:
    """Those of the tokens of both."""
    tokens = one.tokens + two.tokens
    share = (two.tokens / tokens).reshape(np.shape(tokens) + (1,) * (np.ndim(one.mean) - np.ndim(tokens)))
    apart = two.mean - one.mean
    variance = (1 - share) * one.variance + share * two.variance + share * (1 - share) * apart * apart
    return Channels(tokens, one.mean + share * apart, variance)


def over_batches(forward: Forward, variables: Any, batches: Iterable[Any], *more: Any) -> dict[str, Channels]:
    """Those of every layer over all batches, in float64.

    Raises:
        CfmergeError: no batches; a layer whose mean or variance is not finite.
    """
    total: dict[str, Channels] = {}
    count = 0
    for count, batch in enumerate(batches, 1):
        for name, found in forward(variables, batch, *more).items():
            own = Channels(*(np.asarray(array, np.float64) for array in found))
            if not (np.isfinite(own.mean).all() and np.isfinite(own.variance).all()):
                raise CfmergeError(
                    f"batch {count}: at layer {name!r} the mean or the variance is NaN or infinite; does the model run "
                    "on this batch, and does a mask leave something of it?"
                )
            total[name] = together(total[name], own) if name in total else own
    if count == 0:
        raise CfmergeError("no batches: statistics need at least one")
    return total
