"""Three Flax networks of different seeds in one universe: C2M3, whose permutations agree round every cycle.

Matched in pairs, a to b to c and back to a, few neurons arrive where they set out. In the universe all do, and the mean
of the three networks is a network that works.

    python examples/c2m3_flax.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cfmerge import align
from cfmerge.activations import spaces_of_linen

INPUTS, HIDDEN, CLASSES, MODES, STEPS, BATCH = 24, 192, 6, 3, 400, 256
CENTRES = jax.random.normal(jax.random.key(9), (CLASSES, MODES, INPUTS))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(2):
            x = nn.relu(nn.Dense(HIDDEN, name=f"layer_{layer}")(x))
        return nn.Dense(CLASSES, name="classes")(x)


network = Network()


def draw(key: jax.Array, count: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Inputs `(count, inputs)` and classes, each of which is a few clusters."""
    of_mode, of_class, noise = jax.random.split(key, 3)
    labels = jax.random.randint(of_class, (count,), 0, CLASSES)
    modes = jax.random.randint(of_mode, (count,), 0, MODES)
    return CENTRES[labels, modes] + jax.random.normal(noise, (count, INPUTS)), labels


@jax.jit
def train(key: jax.Array) -> dict:
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-2)
    of_start, of_data = jax.random.split(key)
    params = network.init(of_start, jnp.zeros((1, INPUTS)))["params"]

    def loss(params, inputs, labels):
        logits = network.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, key):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, *draw(key)), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(of_data, STEPS))[0][0]


def mean(models: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *models)


def main() -> None:
    models = {name: train(jax.random.key(seed)) for seed, name in enumerate("abc")}
    inputs, labels = draw(jax.random.key(100), 4000)
    spaces = spaces_of_linen(network, models["a"], inputs[:1])

    def accuracy(params: dict) -> float:
        return float((network.apply({"params": params}, inputs).argmax(-1) == labels).mean())

    pairs = {
        (one, other): align.weight_matching(spaces, models[one], models[other]).permutations
        for one, other in ("ab", "bc", "ca")
    }
    round_trip = align.compose(spaces, align.compose(spaces, pairs["a", "b"], pairs["c", "a"]), pairs["b", "c"])
    found = align.universe(spaces, models)
    own = {name: found.permutations[name] for name in models}
    steps = [align.between(spaces, own[one], own[other]) for one, other in ("ba", "ac", "cb")]
    consistent = align.compose(spaces, align.compose(spaces, *steps[:2]), steps[2])

    def kept(permutations: dict) -> float:
        """The share of neurons that arrive where they set out."""
        return float(np.mean([np.mean(order == np.arange(len(order))) for order in permutations.values()]))

    print(f"neurons back after a round, in pairs     {kept(round_trip):6.3f}")
    print(f"neurons back after a round, universe     {kept(consistent):6.3f}\n")
    print("                                       accuracy")
    for name, params in models.items():
        print(f"network {name}                               {accuracy(params):6.3f}")
    print(f"mean as they are                         {accuracy(mean(list(models.values()))):6.3f}")
    universal = [align.permute(spaces, params, own[name]) for name, params in models.items()]
    print(f"mean in the universe                     {accuracy(mean(universal)):6.3f}")


if __name__ == "__main__":
    main()
