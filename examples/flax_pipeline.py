"""Fine-tunes two experts from one base with Flax and Optax, and merges them in memory with the jitted solver.

The network learns to transform signals. The base knows a common transformation; each expert learns one that differs
from it, on signals that live in its own half of the frequencies (two of them are shared). The average loses half of
what each expert has learnt. ACE estimates from the deltas which inputs each expert has seen, and keeps it there.

    python examples/flax_pipeline.py

The model is an `nnx.Module`; with linen, merge `variables["params"]` in the same way.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cfmerge

FREQUENCIES, HIDDEN, OUTPUTS = 32, 128, 16
USED = {"A": jnp.arange(FREQUENCIES) < 17, "B": jnp.arange(FREQUENCIES) >= 15}
STEPS, BATCH = 400, 256


class Network(nnx.Module):
    """Two normed layers under a fixed read-out, which experts do not train (as with CLIP's text side)."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FREQUENCIES, HIDDEN, rngs=rngs)
        self.norm_first = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.norm_second = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.read_out = nnx.Variable(jax.random.normal(rngs.params(), (HIDDEN, OUTPUTS)) / HIDDEN**0.5)

    def __call__(self, signals: jax.Array) -> jax.Array:
        hidden = self.norm_first(jnp.tanh(self.first(signals)))
        hidden = self.norm_second(jnp.tanh(self.second(hidden)))
        return hidden @ self.read_out


graph, start, frozen = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)


def draw(key: jax.Array, teacher: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch of signals `(batch, frequencies)` and what they should become, `(batch, outputs)`."""
    signals = jax.random.normal(key, (BATCH, FREQUENCIES)) * used
    return signals, jnp.tanh(signals @ teacher)


def error(params: nnx.State, signals: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((nnx.merge(graph, params, frozen)(signals) - targets) ** 2)


@jax.jit
def train(params: nnx.State, key: jax.Array, teacher: jax.Array, used: jax.Array, rate: float) -> nnx.State:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def step(state, key):
        params, moments = state
        gradient = jax.grad(error)(params, *draw(key, teacher, used))
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, STEPS))
    return params


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    common, *changes = jax.random.normal(keys[0], (3, FREQUENCIES, OUTPUTS)) / FREQUENCIES**0.5
    teachers = {"A": common + 1.4 * changes[0], "B": common + 1.4 * changes[1]}
    base = train(start, keys[1], common, jnp.ones(FREQUENCIES), 1e-2)
    experts = {task: train(base, keys[2], teachers[task], USED[task], 3e-3) for task in "AB"}

    merge = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, cfmerge.methods.ace()))
    mean = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, cfmerge.methods.average()))
    models = {
        "base": base,
        "expert A": experts["A"],
        "expert B": experts["B"],
        "average": mean(base, list(experts.values())),
        "ACE": merge(base, list(experts.values())),
    }
    print("mean squared error   task A   task B")
    for name, params in models.items():
        errors = [float(error(params, *draw(keys[3], teachers[task], USED[task]))) for task in "AB"]
        print(f"{name:18s} {errors[0]:8.4f} {errors[1]:8.4f}")


if __name__ == "__main__":
    main()
