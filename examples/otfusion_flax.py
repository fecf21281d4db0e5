"""Two Flax networks of different widths fused: optimal transport sends each neuron of one to neurons of the other.

A wide network is transported onto a narrow one, and averaged with it. No permutation can do that: the transport plan
splits and joins neurons. The result has the narrow network's widths.

    python examples/otfusion_flax.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cfmerge import align
from cfmerge.activations import spaces_of_linen

INPUTS, CLASSES, MODES, STEPS, BATCH = 24, 6, 3, 400, 256
CENTRES = jax.random.normal(jax.random.key(9), (CLASSES, MODES, INPUTS))


class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(CLASSES, name="classes")(x)


def draw(key: jax.Array, count: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Inputs `(count, inputs)` and classes, each of which is a few clusters."""
    of_mode, of_class, noise = jax.random.split(key, 3)
    labels = jax.random.randint(of_class, (count,), 0, CLASSES)
    modes = jax.random.randint(of_mode, (count,), 0, MODES)
    return CENTRES[labels, modes] + jax.random.normal(noise, (count, INPUTS)), labels


def train(network: Network, seed: int) -> dict:
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-2)
    of_start, of_data = jax.random.split(jax.random.key(seed))
    params = network.init(of_start, jnp.zeros((1, INPUTS)))["params"]

    def loss(params, inputs, labels):
        logits = network.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, key):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, *draw(key)), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(of_data, STEPS)
    return jax.jit(lambda start: jax.lax.scan(step, start, keys)[0][0])((params, optimizer.init(params)))


def main() -> None:
    wide, narrow = Network(256), Network(64)
    a, b = train(wide, 0), train(narrow, 1)
    inputs, labels = draw(jax.random.key(100), 4000)

    def show(name: str, network: Network, params: dict) -> None:
        logits = network.apply({"params": params}, inputs)
        print(f"{name:34s} {float((logits.argmax(-1) == labels).mean()):6.3f}")

    spaces, spaces_a = spaces_of_linen(narrow, b, inputs[:1]), spaces_of_linen(wide, a, inputs[:1])
    transported = align.ot_fusion(spaces, a, b, spaces_a=spaces_a, share=0.0).tensors
    fused = align.ot_fusion(spaces, a, b, spaces_a=spaces_a).tensors
    cut = jax.tree.map(lambda one, other: one[tuple(slice(size) for size in other.shape)], a, b)
    print("                                accuracy")
    show("wide network", wide, a)
    show("narrow network", narrow, b)
    show("mean with a part of the wide", narrow, jax.tree.map(lambda one, other: (one + other) / 2, cut, b))
    show("wide transported onto narrow", narrow, transported)
    show("fused", narrow, fused)


if __name__ == "__main__":
    main()
