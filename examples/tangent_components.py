"""Tangent components: train one for each task, compose them by request, forget one, and put them together by files.

    python examples/tangent_components.py

A network answers three questions about a point of the plane. Each component learns one of them, by linearised
fine-tuning from the same base, and knows nothing of the others. They are composed by one jvp, whatever their number.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge.compose import tangent_files
from cfmerge.compose.tangent_training import fit
from cfmerge.compose.tangents import Tangents

TASKS = ("left", "high", "far")  # one output for each: is the point left of the axis, above it, far from the origin
KAPPA = 2.0


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.gelu(nn.Dense(64)(x))
        return nn.Dense(len(TASKS))(x)


def truth(points):
    """`(N, 3)`: 1 where the answer is yes, -1 where it is no."""
    answers = [points[:, 0] < 0, points[:, 1] > 0, np.linalg.norm(points, axis=1) > 1.2]
    return np.where(np.stack(answers, axis=1), 1.0, -1.0).astype(np.float32)


def batches(task, rng, steps=300):
    """Points with the answers to one question; the targets of the others are 0."""
    for _ in range(steps):
        points = rng.standard_normal((64, 2)).astype(np.float32)
        yield points, truth(points) * np.eye(len(TASKS), dtype=np.float32)[task]


def main():
    network = Network()
    apply = network.apply  # the same object in every call, so that training compiles once
    base = network.init(jax.random.key(0), jnp.zeros((1, 2)))
    base["params"]["Dense_2"] = jax.tree.map(lambda leaf: 0.3 * leaf, base["params"]["Dense_2"])
    rng = np.random.default_rng(0)
    points = rng.standard_normal((2000, 2)).astype(np.float32)
    right = truth(points) > 0

    # 1. One component for each task, each from the base alone: they could be trained on three machines.
    trained = [fit(apply, base, batches(task, rng), optax.adamw(3e-3), kappa=KAPPA) for task in range(len(TASKS))]
    components = Tangents(base)
    for name, tangent in zip(TASKS, trained, strict=True):
        components = components.add(name, tangent)
    answer = jax.jit(lambda tangents, x, c: tangents.apply(apply, x, coefficients=c))

    def tell(name, coefficients):
        accuracy = np.mean((np.asarray(answer(components, points, jnp.asarray(coefficients))) > 0) == right, axis=0)
        print(f"  {name:<22}" + "  ".join(f"{share:.3f}" for share in accuracy))

    # 2. Coefficients come with the request: one compiled program serves them all, at the cost of two forward passes.
    print(f"accuracy on               {'   '.join(f'{task:<4}' for task in TASKS)}")
    tell("base", [0.0, 0.0, 0.0])
    for index, task in enumerate(TASKS):
        tell(f"{task} alone", np.eye(3)[index])
    tell("composed", [1.0, 1.0, 1.0])
    tell("without high", [1.0, 0.0, 1.0])

    # 3. Forgotten is as never seen, bit for bit: what remains is summed anew.
    never = Tangents(base).add("left", trained[0]).add("far", trained[2])
    left = components.remove("high")
    same = np.array_equal(left.apply(apply, points), never.apply(apply, points))
    print(f"forgotten as never seen   {same}")

    # 4. Each component is a file; one more is written beside the others, and the base is not stored.
    with tempfile.TemporaryDirectory() as folder:
        place = tangent_files.save(left, Path(folder) / "components")
        tangent_files.append(place, Tangents(base).add("high", trained[1]))
        loaded = tangent_files.load(place, base)
        print(f"files                     {', '.join(sorted(path.name for path in place.iterdir()))}")
    print(loaded)


if __name__ == "__main__":
    main()
