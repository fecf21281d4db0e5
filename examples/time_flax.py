"""Merging over time with a Flax training loop: tasks come one after another, each starts from the merged model.

    python examples/time_flax.py [DIRECTORY]

A network learns one function region by region: four regions are tasks, a fifth is never trained. The base knows its
coarse form everywhere. The loop trains on each task in turn, three times over: from the last model (sequential), from
the running mean of all so far (best in time), and so with a replay buffer. It can be stopped and started again with the
same DIRECTORY: what is done is in the stores.
"""

import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfmerge import temporal

TASKS, HELD_OUT = ["north", "east", "south", "west"], ["up"]
STEPS, BATCH, WEIGHT = 300, 64, 0.5
COARSE, FINE = np.array([0.8, -0.4, 0.3, 0.2]), np.array([1.0, 1.4, -0.7, 0.9])


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))[:, 0]


def data(task, count, seed):
    """Inputs of the task's own region, and the function; for no task, inputs of all regions and its coarse form."""
    number = (*TASKS, *HELD_OUT, None).index(task)
    centre = np.random.default_rng(number).standard_normal(4) if task else 0
    x = centre + (0.5 if task else 1.2) * np.random.default_rng([seed, number]).standard_normal((count, 4))
    y = np.tanh(x @ COARSE) + (0.7 * np.sin(x @ FINE) if task else 0)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def score(params, task):
    """1 - error / variance, at least 0."""
    test = data(task, 512, seed=1)
    error = np.mean((np.asarray(Network().apply({"params": params}, test["x"])) - test["y"]) ** 2)
    return float(max(0.0, 1 - error / np.var(test["y"])))


@jax.jit
def update(params, state, x, y):
    def loss(params):
        return jnp.mean((Network().apply({"params": params}, x) - y) ** 2)

    changes, state = optax.adam(3e-3).update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, changes), state


def train(params, examples, replay, seed):
    """The expert; with a buffer half of each batch is drawn from it."""
    state, rng = optax.adam(3e-3).init(params), np.random.default_rng(seed)
    for _ in range(STEPS):
        old = replay.draw(BATCH // 2, rng) if replay is not None and len(replay) else None
        rows = rng.integers(len(examples["y"]), size=BATCH if old is None else BATCH - BATCH // 2)
        batch = {key: values[rows] for key, values in examples.items()}
        if old is not None:
            batch = {key: np.concatenate([values, old[key]]) for key, values in batch.items()}
        params, state = update(params, state, batch["x"], batch["y"])
    return params


def run(directory, base, protocol, with_replay):
    """Trains all tasks that are not in the store yet; returns its report."""
    time = temporal.Time(directory, base, protocol=protocol, technique="average", weight=WEIGHT, tasks=TASKS,
                         held_out=HELD_OUT)  # fmt: skip
    replay = None
    if with_replay:
        saved = time.replay_file
        replay = temporal.Reservoir.load(saved) if saved.exists() else temporal.Reservoir(200, seed=0)
    for task in time.left:
        start = time.init(like=base)
        expert = train(start, examples := data(task, 1024, seed=0), replay, seed=time.step)
        time.store(expert, task)
        served = time.deploy(like=base)
        time.evaluate({name: score(served, name) for name in (*TASKS, *HELD_OUT)})
        if replay is not None:
            replay.add(examples, task)
            replay.save(time.replay_file)
    return time.report()


def main(directory):
    start = Network().init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    base = train(start, data(None, 4096, seed=0), None, seed=0)
    print(f"{'the base':22}  {np.mean([score(base, task) for task in TASKS]):.3f}")
    for name, protocol, with_replay in (
        ("sequential", "sequential", False),
        ("best in time", "best-in-time", False),
        ("best in time, replay", "best-in-time", True),
    ):
        report = run(directory / name.replace(", ", "-").replace(" ", "-"), base, protocol, with_replay)
        steps = " ".join(f"{row.knowledge_accumulation:.3f}" for row in report.rows[1:])
        print(f"{name:22}  {steps}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
