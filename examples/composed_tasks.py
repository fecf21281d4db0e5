"""One result for three tasks that is not one checkpoint: EMR, TALL masks and TSV-Compress of trees and of files.

    python examples/composed_tasks.py

Each keeps a shared vector and masks, or a few directions of each task; the model of a task is made from the base when
it is wanted. Prints how far each task's model is from its expert, and the size beside keeping all experts.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cfmerge
from cfmerge import compose

SHAPES = {"dense_0": (16, 64), "dense_1": (64, 10)}


def network(params, x):
    hidden = jax.nn.relu(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
    return hidden @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]


def fine_tuned(base, seed):
    """The base with a delta of low rank and some noise, as fine-tuning leaves it."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        noise = 0.01 * rng.standard_normal(leaf.shape)
        low = rng.standard_normal((leaf.shape[0], 2)) @ rng.standard_normal((2, leaf.shape[-1])) if leaf.ndim > 1 else 0
        return (leaf + noise + 0.05 * low).astype(np.float32)

    return jax.tree.map(moved, base)


def main():
    rng = np.random.default_rng(0)
    base = {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32), "bias": np.zeros(shape[1], np.float32)}
        for name, shape in SHAPES.items()
    }
    experts = {task: fine_tuned(base, seed) for seed, task in enumerate(("birds", "fish", "cars"), 1)}
    x = rng.standard_normal((32, 16)).astype(np.float32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))

    def distance(found, expert):
        return float(jnp.linalg.norm(network(found, x) - network(expert, x)) / jnp.linalg.norm(network(expert, x)))

    average = cfmerge.merge_params(base, experts, "average")
    errors = {task: distance(average, expert) for task, expert in experts.items()}
    print(f"{'average':10} size 1.00  errors {', '.join(f'{task} {error:.3f}' for task, error in errors.items())}")
    for system in ("emr", "emr(rescale='l2')", "tall(threshold=0.4)", "tsv_c"):
        made = compose.build(base, experts, system)
        errors = {task: distance(made.materialise(task, base), expert) for task, expert in experts.items()}
        told = ", ".join(f"{task} {error:.3f}" for task, error in errors.items())
        print(f"{made.system:10} size {1 + made.nbytes / size:.2f}  errors {told}")

    # One compiled function answers for every task, and the result goes to disk and back.
    answer = jax.jit(lambda made, base, x: {task: made.apply(network, base, task, x) for task in made.tasks})
    outputs = answer(compose.build(base, experts, "tsv_c"), base, x)
    print({task: output.shape for task, output in outputs.items()})
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in {"base": base, **experts}.items():
            cfmerge.save(tree, Path(folder) / name)
        paths = {task: Path(folder) / task for task in experts}
        compose.build(Path(folder) / "base", paths, "emr", output=Path(folder) / "composed")
        done = compose.materialise(Path(folder) / "composed", "fish", Path(folder) / "fish.npz")
        print(done.output.name, list(cfmerge.open(done.output)))


if __name__ == "__main__":
    main()
