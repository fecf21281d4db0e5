"""Pre-training, and fine-tuning in full or by LoRA: all steps in one jitted loop, deterministic given the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cfmerge_accuracy.decoder.model import Decoder, logits
from cfmerge_accuracy.zoo import Params

LORA_SCALE = 2.0  # alpha / rank


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over the first tenth and a cosine decay to zero.

    With a rank, each kernel `W` `(in, out)` stays and gets `2 A B` added: `A` `(in, rank)` is drawn and `B`
    `(rank, out)` starts at zero; embeddings and norms stay as they are.
    """

    steps: int
    batch: int
    learning_rate: float
    rank: int | None = None
    weight_decay: float = 0.01

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, self.steps // 10), self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=self.weight_decay))


def low_rank(params: Params, rank: int, key: jax.Array) -> Params:
    """`{name of a kernel: {"a": (in, rank), "b": (rank, out)}}`."""
    kernels = {"/".join(path): leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}
    keys = jax.random.split(key, len(kernels))
    return {
        name: {
            "a": jax.random.normal(own, (kernel.shape[0], rank)) / kernel.shape[0] ** 0.5,
            "b": jnp.zeros((rank, kernel.shape[1])),
        }
        for own, (name, kernel) in zip(keys, kernels.items(), strict=True)
    }


def added(params: Params, factors: Params) -> Params:
    """The parameters with the products of their factors."""
    flat = flatten_dict(params)
    for name, one in factors.items():
        path = tuple(name.split("/"))
        flat[path] = flat[path] + LORA_SCALE * one["a"] @ one["b"]
    return unflatten_dict(flat)


def loss(model: Decoder, params: Params, windows: jax.Array) -> jax.Array:
    """The mean negative log likelihood of every token but the first."""
    found = logits(model, params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(found, windows[:, 1:]).mean()


@partial(jax.jit, static_argnames=("model", "recipe"))
def _fit(model: Decoder, recipe: Recipe, params: Params, windows: jax.Array, key: jax.Array) -> tuple[Params, Any]:
    """One step for each of `windows (steps, batch, length + 1)`; the losses beside."""
    optimizer = recipe.optimizer()
    start = low_rank(params, recipe.rank, key) if recipe.rank else params

    def whole(trained: Params) -> Params:
        return added(params, trained) if recipe.rank else trained

    def step(state: tuple[Params, optax.OptState], batch: jax.Array) -> Any:
        trained, moments = state
        value, gradient = jax.value_and_grad(lambda trained: loss(model, whole(trained), batch))(trained)
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    (trained, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), windows)
    return whole(trained), losses


def fit(
    model: Decoder, recipe: Recipe, params: Params, seed: Sequence[int], windows: np.ndarray
) -> tuple[Params, np.ndarray]:
    """The parameters after training, and the loss of every step.

    Args:
        model: the network.
        recipe: steps, rates and rank.
        params: what is trained.
        seed: of the order of the windows, and of the low-rank additions.
        windows: `(N, length + 1)`, drawn epoch by epoch.
    """
    generator = np.random.default_rng(seed)
    epochs = -(-recipe.steps * recipe.batch // len(windows))
    rows = np.concatenate([generator.permutation(len(windows)) for _ in range(epochs)])
    drawn = windows[rows[: recipe.steps * recipe.batch]].reshape(recipe.steps, recipe.batch, -1)
    key = jax.random.key(int(generator.integers(1 << 31)))
    found: tuple[Params, np.ndarray] = jax.device_get(_fit(model, recipe, params, drawn, key))
    return found
