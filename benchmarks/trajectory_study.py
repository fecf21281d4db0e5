"""Checkpoints along a run of constant learning rate, merged, beside the same run with a decay of the rate.

    python benchmarks/trajectory_study.py -o docs/results --seeds 0 1 2        # trains what the rows lack, then tells

A network like the demo's (230 thousand parameters) learns the demo's four tasks together from scratch, under frozen
heads: 4000 steps of 64 images, AdamW, 100 steps of warm-up, then a constant rate; a checkpoint every 40 steps. For a
window of the last L steps

    decayed   the run leaves its path L steps before the end, and the rate falls to 0 by a shape, with the same batches
    merged    `temporal.along` over the checkpoints in the window, all or some of them, by the same shape

so that all have taken as many steps, and `cosine from the start` is the usual schedule. Judged on test images: the
mean over tasks of accuracy and of cross-entropy. What is called best is chosen by the loss on validation images. Rows
are one JSON object a line: the seed, the rate, the kind, the window in steps, how many checkpoints, the shape.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trajectory_told

import cfmerge
from cfmerge.demo import archives, data, model, train
from cfmerge.temporal.trajectory import along

TRUNK, STEPS, EVERY, BATCH, WARMUP = model.Trunk(128, 256, 2), 4000, 40, 64, 100
RATES = (1e-3, 3e-3)
WINDOWS = (200, 400, 800, 1600, 2400)
COUNTS = (2, 3, 6, 11, 21, 41, 61)  # checkpoints in a window; the first lies at its beginning
SHAPES = ("linear", "cosine", "inverse-sqrt")
DECAYED = ("linear", "inverse-sqrt")
EMAS = ("ema=0.9", "ema=0.97")
OTHERS = ("ties(density=0.2)", "ace", "model_stock")  # over the window that is 800 long, of 11 checkpoints
State = tuple[Any, Any]


class Setting:
    """The tasks and heads of a seed, and the compiled steps."""

    def __init__(self, seed: int) -> None:
        self.tasks = data.load_tasks(archives.cache_directory(), seed)
        start, drawn, self.order = jax.random.split(jax.random.key(seed), 3)
        self.heads = [
            model.init_head(jax.random.fold_in(drawn, n), t.classes, TRUNK.dim) for n, t in enumerate(self.tasks)
        ]
        self.start = model.init_trunk(TRUNK, start)
        firsts = np.cumsum([0, *(task.classes for task in self.tasks)])
        self.images = jnp.concatenate([jnp.asarray(task.train.images) for task in self.tasks])
        labels = [task.train.labels + first for task, first in zip(self.tasks, firsts, strict=False)]
        self.labels = jnp.asarray(np.concatenate(labels))
        self.rows = jnp.concatenate([jnp.asarray(head) for head in self.heads])
        self.group = jnp.repeat(jnp.arange(len(self.heads)), jnp.asarray([len(head) for head in self.heads]))

    def begun(self) -> State:
        return self.start, OPTIMIZER.init(self.start)

    def trained(self, state: State, first: int, rates: Sequence[float]) -> State:
        """The state after EVERY steps from step `first` on; a step's batch hangs on its number alone."""
        keys = jax.vmap(partial(jax.random.fold_in, self.order))(jnp.arange(first, first + EVERY))
        return _trained(state, keys, jnp.asarray(rates, jnp.float32), self.images, self.labels, self.rows, self.group)

    def judged(self, params: Any) -> dict[str, float]:
        """Means over tasks of accuracy and cross-entropy, on test and on validation images."""
        found: dict[str, float] = {}
        for name in ("test", "validation"):
            splits = [getattr(task, name) for task in self.tasks]
            told = [_judged(params, s.images, s.labels, head) for s, head in zip(splits, self.heads, strict=True)]
            found |= {f"{name}_accuracy": float(np.mean([a for a, _ in told]))}
            found |= {f"{name}_loss": float(np.mean([b for _, b in told]))}
        return found


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(1e-4))


@jax.jit
def _trained(state: State, keys: Any, rates: Any, images: Any, labels: Any, rows: Any, group: Any) -> State:
    def step(state: State, own: Any) -> tuple[State, None]:
        (params, moments), (key, rate) = state, own
        draw, shift = jax.random.split(key)
        drawn = jax.random.randint(draw, (BATCH,), 0, len(labels))
        batch = train.shift(shift, train.scale_pixels(images[drawn]))
        gradient = jax.grad(partial(train.loss, TRUNK))(params, batch, labels[drawn], rows, group)
        updates, moments = OPTIMIZER.update(gradient, moments, params)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), None

    return jax.lax.scan(step, state, (keys, rates))[0]


@jax.jit
def _judged(params: Any, images: Any, labels: Any, head: Any) -> tuple[Any, Any]:
    logits = train.features(TRUNK, params, train.scale_pixels(images)) @ head.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (logits.argmax(-1) == labels).mean(), losses.mean()


# --- the rows of a seed and a rate --------------------------------------------------------------------------------


def falling(shape: str, length: int) -> np.ndarray:
    """The factors of the rate over so many steps, from 1 to about 0."""
    x = np.arange(1, length + 1) / (length + 1)
    return {"linear": 1 - x, "cosine": (1 + np.cos(np.pi * x)) / 2, "inverse-sqrt": 1 - np.sqrt(x)}[shape]


def continued(setting: Setting, state: State, first: int, rates: np.ndarray) -> Iterator[tuple[int, State]]:
    """`(step, state)` after every EVERY steps, from step `first` on."""
    for at in range(0, len(rates), EVERY):
        state = setting.trained(state, first + at, rates[at : at + EVERY])
        yield first + at + EVERY, state


def rows_of(setting: Setting, rate: float, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one rate."""
    warm = np.minimum(1.0, np.arange(1, STEPS + 1) / WARMUP)
    kept: dict[int, State] = {}
    for step, state in continued(setting, setting.begun(), 0, rate * warm):
        cfmerge.save(model.flatten(state[0]), folder / f"checkpoint-{step}" / "model.safetensors")
        kept |= {step: state} if STEPS - step in WINDOWS else {}
    yield {"kind": "last", **setting.judged(state[0])}
    whole = np.where(warm < 1, warm, (1 + np.cos(np.pi * np.arange(1, STEPS + 1) / STEPS)) / 2)
    *_, (_, state) = continued(setting, setting.begun(), 0, rate * whole)
    yield {"kind": "decayed", "window": STEPS, "shape": "cosine", **setting.judged(state[0])}
    for window in WINDOWS:
        for shape in DECAYED:
            *_, (_, state) = continued(setting, kept[STEPS - window], STEPS - window, rate * falling(shape, window))
            yield {"kind": "decayed", "window": window, "shape": shape, **setting.judged(state[0])}
        for count in (count for count in COUNTS if window % (count - 1) == 0 and window // (count - 1) % EVERY == 0):
            every = window // (count - 1) // EVERY
            full = window // EVERY == count - 1
            for shape in (*SHAPES, *(EMAS if full else ())):
                made = merged(folder, STEPS - window, every, decay=shape)
                yield {"kind": "merged", "window": window, "count": count, "shape": shape, **setting.judged(made)}
    for method in OTHERS:
        made = merged(folder, STEPS - 800, 2, method=method)
        yield {"kind": "merged", "window": 800, "count": 11, "shape": "", "method": method, **setting.judged(made)}


class Kept:
    """A sink that keeps the tensors."""

    def __init__(self, headers: Mapping[str, Any]) -> None:
        self.tensors = {name: np.empty(shape, dtype) for name, (shape, dtype) in headers.items()}

    def write(self, name: str, values: Any, first: int = 0) -> None:
        flat = np.asarray(values).reshape(-1)
        self.tensors[name].reshape(-1)[first : first + flat.size] = flat


def merged(folder: Path, start: int, every: int, **how: Any) -> Any:
    """The parameters that a window is merged into."""
    plan = cfmerge.make_plan(along(folder, start=start, every=every, **how).recipe)
    sink = Kept(plan.output)
    plan.run(sink)
    return model.unflatten(sink.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--tell", action="store_true", help="only the section and the picture, from the rows")
    args = parser.parse_args()
    file = args.output / "trajectory.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["seed"], row["rate"]) for row in rows}
    for seed in [] if args.tell else args.seeds:
        for rate in (rate for rate in args.rates if (seed, rate) not in done):
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                own = [{"seed": seed, "rate": rate, **row} for row in rows_of(Setting(seed), rate, Path(folder))]
            with file.open("a") as opened:
                opened.writelines(json.dumps(row) + "\n" for row in own)
            rows += own
            print(f"seed {seed}, rate {rate}: {time.monotonic() - started:.0f} s", flush=True)
    trajectory_told.write(args.output, rows)


if __name__ == "__main__":
    main()
