"""Fine-tunes three experts of one base, and runs all of them in one Flax NNX model whose tokens choose: SMILE.

The network learns to transform signals. The base knows a common transformation; each expert learns one of its own, on
signals that live in its own third of the frequencies. The average of the experts loses most of what each has learnt.
In the upscaled model every layer keeps a few directions of every expert, and a signal takes the expert whose leading
input directions hold most of it: nobody tells it the task.

    python examples/smile_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cfmerge
from cfmerge import compose
from cfmerge.compose import smile_flax, smile_layers

FREQUENCIES, HIDDEN, OUTPUTS = 24, 64, 8
BANDS = [jnp.arange(FREQUENCIES) // 8 == task for task in range(3)]
STEPS, BATCH = 300, 64


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FREQUENCIES, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs)

    def __call__(self, signals: jax.Array) -> jax.Array:
        hidden = jnp.tanh(self.first(signals))
        return self.last(hidden + jnp.tanh(self.second(hidden)))


graph, start = nnx.split(Network(nnx.Rngs(0)), nnx.Param)


def draw(key: jax.Array, teacher: jax.Array, band: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch of signals `(batch, frequencies)` and what they should become, `(batch, outputs)`."""
    signals = jax.random.normal(key, (BATCH, FREQUENCIES)) * band
    return signals, jnp.tanh(signals @ teacher)


def error(model: nnx.Module, signals: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((model(signals) - targets) ** 2)


@jax.jit
def train(params: nnx.State, key: jax.Array, teacher: jax.Array, band: jax.Array, rate: float) -> nnx.State:
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def step(state, key):
        params, moments = state
        gradient = jax.grad(lambda params: error(nnx.merge(graph, params), *draw(key, teacher, band)))(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, STEPS))
    return params


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    common, *changes = jax.random.normal(keys[0], (4, FREQUENCIES, OUTPUTS)) / 8**0.5
    tasks = [(common + change, band) for change, band in zip(changes, BANDS, strict=True)]
    base = train(start, keys[1], common, jnp.ones(FREQUENCIES, bool), 1e-2)
    experts = [train(base, keys[2], *task, 3e-3) for task in tasks]

    model = nnx.merge(graph, base)
    models = {"base": model, "average": nnx.merge(graph, cfmerge.merge_params(base, experts, "average"))}
    composed = compose.build(base, experts, "smile(rank=8, gate=8)")
    layers = smile_layers.layers_of(composed.parts)
    cost = smile_layers.cost(layers, base).parameters
    models["SMILE"] = smile_flax.upscale(model, layers)
    models |= {f"expert {name}": nnx.merge(graph, expert) for name, expert in zip("ABC", experts, strict=True)}

    print(f"SMILE, times the base's parameters  {cost.total / cost.base:.2f}")
    scored = nnx.jit(error)
    print("mean squared error   task A   task B   task C")
    for name, one in models.items():
        errors = [float(scored(one, *draw(keys[3], *task))) for task in tasks]
        print(f"{name:18s} " + " ".join(f"{number:8.4f}" for number in errors))


if __name__ == "__main__":
    main()
