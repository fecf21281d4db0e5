"""What methods that use data want to know of an expert: Fisher information here, Grams in `cfmerge.activations`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge_accuracy.vision.model import Head, Vit
from cfmerge_accuracy.vision.train import Heads, log_likelihoods, stacked
from cfmerge_accuracy.zoo import Params

TOGETHER = 16  # images whose gradients are held at once


@partial(jax.jit, static_argnames=("model",))
def _fisher(model: Vit, params: Params, key: jax.Array, images: jax.Array, task: jax.Array, heads: Heads) -> Params:
    def squared(image: jax.Array, key: jax.Array) -> Params:
        def scores(params: Params) -> jax.Array:
            return log_likelihoods(model, params, image[None], task[None], heads)[0]

        label = jax.random.categorical(key, scores(params))
        return jax.tree.map(jnp.square, jax.grad(lambda params: scores(params)[label])(params))

    def some(drawn: tuple[jax.Array, jax.Array]) -> Params:
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(squared)(*drawn))

    def add(total: Params, drawn: tuple[jax.Array, jax.Array]) -> Any:
        return jax.tree.map(jnp.add, total, some(drawn)), None

    count = len(images) // TOGETHER
    drawn = images.reshape(count, TOGETHER, *images.shape[1:]), jax.random.split(key, (count, TOGETHER))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), drawn)
    return jax.tree.map(lambda leaf: leaf / count, total)


def fisher(model: Vit, params: Params, seed: int, images: np.ndarray, task: int, heads: Sequence[Head]) -> Params:
    """Diagonal Fisher information, a tree like `params`: `E[g^2]`, `g` the gradient of one image's log-likelihood.

    Labels are drawn from the model, as the definition has it.

    Args:
        images: `(N, 28, 28)`; as many of them are used as make whole groups of 16.
        task: the position of its head in `heads`.
    """
    whole = images[: len(images) // TOGETHER * TOGETHER]
    found = _fisher(model, params, jax.random.key(seed), whole, jnp.asarray(task), stacked(heads))
    return jax.device_get(found)
