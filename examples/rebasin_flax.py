"""Two Flax MLPs of different seeds, merged: Git Re-Basin finds how their neurons correspond.

    python examples/rebasin_flax.py

Both learn the digits of a seven-segment display, drawn small, shifted and noisy. Half-way between the two there is a
barrier, for neuron 7 of one does not do what neuron 7 of the other does. `weight_matching` permutes the second
network's neurons, which leaves its outputs as they are, and most of the barrier is gone. `merge_many` does so for
three networks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge import align
from cfmerge.activations import spaces_of_linen

SIZE, WIDTH, STEPS, BATCH = 14, 256, 400, 128
SEGMENTS = {"top": (0, 0, 1, 6), "left": (0, 0, 6, 1), "right": (0, 5, 6, 1), "middle": (5, 0, 1, 6),
            "low left": (5, 0, 6, 1), "low right": (5, 5, 6, 1), "bottom": (10, 0, 1, 6)}  # fmt: skip
DARK = ["middle", "top left middle low_left bottom", "left low_right", "left low_left", "top low_left bottom",
        "right low_left", "right", "left middle low_left bottom", "", "low_left"]  # fmt: skip


def digits(count, seed):
    """Images `(count, SIZE * SIZE)` and labels: segments that are lit, of changing light, somewhere in the image."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(10, size=count)
    images = generator.normal(0.0, 0.3, size=(count, SIZE, SIZE))
    for image, label, (up, along) in zip(images, labels, generator.integers(0, 4, size=(count, 2)), strict=True):
        dark = [name.replace("_", " ") for name in DARK[label].split()]
        for name, (y, x, height, width) in SEGMENTS.items():
            if name not in dark:
                image[y + up : y + up + height, x + along : x + along + width] += generator.uniform(0.6, 1.4)
    return images.reshape(count, -1).astype(np.float32), labels


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(10)(x)


def loss(params, x, y):
    logits = Network().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


optimiser = optax.adam(1e-3)


@jax.jit
def update(params, state, x, y):
    changes, state = optimiser.update(jax.grad(loss)(params, x, y), state)
    return optax.apply_updates(params, changes), state


def train(seed, x, y):
    params = Network().init(jax.random.key(seed), x[:1])["params"]
    state, generator = optimiser.init(params), np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = generator.integers(len(y), size=BATCH)
        params, state = update(params, state, x[rows], y[rows])
    return params


def between(a, b, share=0.5):
    return jax.tree.map(lambda one, other: (1 - share) * one + share * other, a, b)


def main():
    x, y = digits(6000, seed=0)
    test = digits(2000, seed=1)

    def accuracy(params):
        return float(jnp.mean(Network().apply({"params": params}, test[0]).argmax(-1) == test[1]))

    a, b, c = (train(seed, x, y) for seed in range(3))
    spaces = spaces_of_linen(Network(), a, x[:1])
    print("spaces:", ", ".join(f"{name} of {size}" for name, size in spaces.sizes.items()))

    matching = align.weight_matching(spaces, a, b)
    matched = align.permute(spaces, b, matching.permutations)
    print(f"inner product of the weights: {matching.before:.1f} before, {matching.objective:.1f} after matching")
    assert abs(accuracy(matched) - accuracy(b)) < 1e-3  # the same function
    many = align.merge_many(spaces, {"a": a, "b": b, "c": c})

    print("\naccuracy                along the line from a to b")
    shares = np.linspace(0, 1, 6)
    for name, other in (("as it is", b), ("matched", matched)):
        print(f"  {name:20s}", *(f"{accuracy(between(a, other, share)):6.3f}" for share in shares))
    rows = {"a": a, "b": b, "c": c, "average of a and b": between(a, b), "re-basin of a and b": between(a, matched),
            "average of three": between(between(a, b), c, 1 / 3), "merge_many of three": many.mean}  # fmt: skip
    print()
    for name, params in rows.items():
        print(f"  {name:20s}  {accuracy(params):6.3f}")


if __name__ == "__main__":
    main()
