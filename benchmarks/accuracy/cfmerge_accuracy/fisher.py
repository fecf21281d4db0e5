"""Diagonal Fisher information: `E[g^2]`, `g` the gradient of `log p(y)`, with `y` drawn from the model itself."""

from __future__ import annotations

from collections.abc import Callable

import jax

from cfmerge_accuracy.zoo import Params


def drawn_square(log_likelihoods: Callable[[Params], jax.Array], params: Params, key: jax.Array) -> Params:
    """`g^2` of one example, a tree like `params`: `log_likelihoods(params)` is `(classes,)`, one of which is drawn."""
    label = jax.random.categorical(key, log_likelihoods(params))
    gradient = jax.grad(lambda params: log_likelihoods(params)[label])(params)
    return jax.tree.map(jax.numpy.square, gradient)
