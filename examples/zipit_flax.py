"""Zips two Flax networks of different initialisation that know different classes: ZipIt!, all through and in part.

Both networks see the same unlabelled inputs once, and the joint moments of their features say which features, of both
or of one, are alike. Up to a layer these become one trunk; behind it each network keeps its own head, so that both are
run by one pass through the trunk. The zip needs no labels and no training.

    python examples/zipit_flax.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cfmerge import align
from cfmerge.activations import collect_joint_linen
from cfmerge.activations.spaces import spaces_of_linen

INPUTS, HIDDEN, CLASSES, MODES = 32, 96, 5, 3  # each network knows 5 classes, each class is 3 clusters
STEPS, BATCH = 400, 256


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(3):
            x = nn.gelu(nn.Dense(HIDDEN, name=f"layer_{layer}")(x))
        return nn.Dense(CLASSES, name="classes")(x)


network = Network()


def apply(params: dict, inputs: jax.Array) -> jax.Array:
    return network.apply({"params": params}, inputs)


def draw(key: jax.Array, centres: jax.Array, count: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Inputs `(count, inputs)` and classes of a task."""
    of_mode, of_class, noise = jax.random.split(key, 3)
    labels = jax.random.randint(of_class, (count,), 0, CLASSES)
    modes = jax.random.randint(of_mode, (count,), 0, MODES)
    return centres[labels, modes] + 1.1 * jax.random.normal(noise, (count, INPUTS)), labels


@jax.jit
def train(key: jax.Array, centres: jax.Array) -> dict:
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
    of_start, of_data = jax.random.split(key)
    params = network.init(of_start, jnp.zeros((1, INPUTS)))["params"]

    def loss(params, inputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, inputs), labels).mean()

    def step(state, key):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, *draw(key, centres)), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(of_data, STEPS))[0][0]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    centres = dict(zip("AB", jax.random.normal(keys[0], (2, CLASSES, MODES, INPUTS)), strict=True))
    models = {task: train(key, centres[task]) for task, key in zip("AB", keys[1:3], strict=True)}  # two seeds

    # the unlabelled inputs are of both tasks
    both = [draw(key, centres[task])[0] for task in "AB" for key in jax.random.split(keys[3], 8)]
    spaces = spaces_of_linen(network, models["A"], both[0])
    moments = collect_joint_linen(network, [{"params": p} for p in models.values()], both, spaces, names=["A", "B"])
    first, second = (spaces.axes[f"layer_{layer}/bias"][0].spaces[0] for layer in range(2))  # what these layers write

    tests = {task: draw(keys[4], centres[task], 2000) for task in "AB"}

    def show(name: str, zipped: align.Zipped | None) -> list[float]:
        """Accuracy of each network on its own task, by one trunk or apart."""
        found = []
        for task, (inputs, labels) in tests.items():
            outputs = apply(models[task], inputs) if zipped is None else zipped.apply(apply, inputs)[task]
            found.append(float((outputs.argmax(-1) == labels).mean()))
        size = sum(leaf.size for p in models.values() for leaf in jax.tree.leaves(p))
        kept = size if zipped is None else sum(leaf.size for leaf in jax.tree.leaves([zipped.trunk, zipped.heads]))
        print(f"{name:28s} {found[0]:6.3f}   {found[1]:6.3f}   {kept / size:6.2f}")
        return found

    print("accuracy                     task A   task B   parameters")
    show("two networks", None)
    show("average", align.zip_models(spaces, models, None, method="identity"))
    show("permuted, then averaged", align.zip_models(spaces, models, moments, method="permute"))
    show("zipped all through", align.zip_models(spaces, models, moments))
    partial = align.zip_models(spaces, models, moments, stop_at=second)
    before = show("zipped, two layers of three", partial)
    show("zipped, the first layer", align.zip_models(spaces, models, moments, stop_at=first))

    with tempfile.TemporaryDirectory() as folder:
        loaded = align.load_zipped(partial.save(Path(folder) / "zip"))
        assert show("two layers, saved and loaded", loaded) == before
    program = jax.jit(lambda inputs: partial.apply(apply, inputs)).lower(both[0]).compile()
    apart = jax.jit(lambda inputs: [apply(params, inputs) for params in models.values()]).lower(both[0]).compile()
    share = program.cost_analysis()["flops"] / apart.cost_analysis()["flops"]
    print(f"\noperations from one trunk of two layers, of those of two networks  {share:.2f}")


if __name__ == "__main__":
    main()
