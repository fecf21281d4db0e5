"""Merges two Flax experts with a few of each one's inputs: RegMean, and RegMean++.

Two tasks look at the same network's inputs in different directions. RegMean needs no labels and no training: each
expert is run once on a few batches of its own task, and keeps of each layer only the Gram `X^T X / tokens` of its
inputs, which can be saved and handed on in place of the data.

    python examples/flax_regmean.py

The model is linen; with nnx, use `collect_nnx(model, batches)` in the same way.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import cfmerge
from cfmerge.activations import collect_linen, load, regmean_pp, save

INPUTS, HIDDEN, OUTPUTS = 24, 64, 8
STEPS, BATCH = 400, 256


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(HIDDEN, name="layer_0")(x))
        x = jnp.tanh(nn.Dense(HIDDEN, name="layer_1")(x))
        return nn.Dense(OUTPUTS, name="layer_2")(x)


network = Network()


def draw(key: jax.Array, directions: jax.Array) -> jax.Array:
    """A batch of inputs `(batch, inputs)` of a task."""
    return jax.random.normal(key, (BATCH, len(directions))) @ directions


def error(params: dict, inputs: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((network.apply({"params": params}, inputs) - jnp.tanh(inputs @ teacher)) ** 2)


@jax.jit
def train(params: dict, key: jax.Array, teacher: jax.Array, directions: jax.Array, rate: float) -> dict:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def step(state, key):
        params, moments = state
        gradient = jax.grad(error)(params, draw(key, directions), teacher)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, STEPS))
    return params


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    turned = jnp.linalg.qr(jax.random.normal(keys[0], (INPUTS, INPUTS)))[0]
    directions = {"A": turned[: INPUTS // 2], "B": turned[INPUTS // 2 :]}
    common, *changes = jax.random.normal(keys[1], (3, INPUTS, OUTPUTS)) / INPUTS**0.5
    teachers = {"A": common + changes[0], "B": common + changes[1]}

    start = network.init(keys[2], jnp.zeros((1, INPUTS)))["params"]
    base = train(start, keys[3], common, turned, 1e-2)
    experts = {task: train(base, keys[4], teachers[task], directions[task], 3e-3) for task in "AB"}
    batches = {task: [draw(key, directions[task]) for key in jax.random.split(keys[5], 4)] for task in "AB"}

    with tempfile.TemporaryDirectory() as folder:
        for task in "AB":  # where each expert's data are
            save(collect_linen(network, {"params": experts[task]}, batches[task]), Path(folder) / f"{task}.safetensors")
        grams = [load(Path(folder) / f"{task}.safetensors") for task in "AB"]  # where the experts are merged

    trees = list(experts.values())
    models = {
        "base": base,
        "expert A": experts["A"],
        "expert B": experts["B"],
        "average": cfmerge.merge_params(base, trees, cfmerge.methods.average()),
        "RegMean": cfmerge.merge_params(base, trees, cfmerge.methods.regmean(), moments=grams),
        "RegMean++": regmean_pp(network, base, trees, list(batches.values())),
    }
    print("mean squared error   task A   task B")
    for name, params in models.items():
        errors = [float(error(params, draw(keys[0], directions[task]), teachers[task])) for task in "AB"]
        print(f"{name:18s} {errors[0]:8.4f} {errors[1]:8.4f}")


if __name__ == "__main__":
    main()
