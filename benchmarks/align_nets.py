"""The models of `align_study.py`: networks of several widths, trained from several seeds on Fashion-MNIST.

    mlp-W       three hidden layers of W; ReLU
    conv-W      four convolutions of W, W, 2W and 2W channels, each with a LayerNorm and ReLU; mean over places; head
    batch-W     the same with BatchNorm
    vit-W       tokens of 7 x 7 pixels, two pre-LN blocks of four heads, W numbers wide; mean over tokens; head

A pair has the same ten classes and other seeds, or five classes each, drawn by the replicate's number. Rates were
chosen by the accuracy of single models on the last 5,000 test images of Fashion-MNIST, which nothing else here sees.
"""

import functools
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))

from cfmerge.demo import archives
from cfmerge.demo.data import Split
from cfmerge_accuracy import debian
from cfmerge_accuracy.cache import cached

CLASSES, TEST, BATCH = 10, 5000, 128
VERSION = 1  # raised when what is trained changes by a line of this file that no setting shows
STEPS = {"mlp": 3000, "conv": 1000, "batch": 1000, "vit": 1500}  # on ten classes; on five half of them
RATE = {"mlp": 1e-3, "conv": 1e-2, "batch": 5e-3, "vit": 2e-3}
Variables = dict[str, Any]
Flat = dict[str, np.ndarray]


class Mlp(nn.Module):
    """Images `(N, 28, 28)` to logits."""

    width: int
    classes: int
    depth: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        for number in range(self.depth):
            x = nn.relu(nn.Dense(self.width, name=f"dense_{number}")(x))
        return nn.Dense(self.classes, name="head")(x)


class ConvNet(nn.Module):
    """Images `(N, 28, 28)` to logits."""

    width: int
    classes: int
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x[..., None]
        for number, (side, stride, times) in enumerate(((5, 2, 1), (3, 1, 1), (3, 2, 2), (3, 1, 2))):
            x = nn.Conv(times * self.width, (side, side), (stride, stride), name=f"conv_{number}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm_{number}")(x)
            else:
                x = nn.LayerNorm(name=f"norm_{number}")(x)
            x = nn.relu(x)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Images `(N, 28, 28)` to logits."""

    width: int
    classes: int
    depth: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)
        x = nn.Dense(self.width, name="patches")(x)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for number in range(self.depth):
            normed = nn.LayerNorm(name=f"norm_{number}")(x)
            q, k, v = (nn.Dense(self.width, name=f"{name}_{number}")(normed) for name in "qkv")
            x = x + nn.Dense(self.width, name=f"out_{number}")(self.mixed(q, k, v))
            normed = nn.LayerNorm(name=f"norm_mlp_{number}")(x)
            x = x + nn.Dense(self.width, name=f"down_{number}")(
                nn.gelu(nn.Dense(4 * self.width, name=f"up_{number}")(normed))
            )
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))

    def mixed(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (each.reshape(*each.shape[:2], self.heads, -1) for each in (q, k, v))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*v.shape[:2], -1)


def network(name: str, classes: int = CLASSES) -> Any:
    """The network of a name such as "conv-16"."""
    kind, width = name.split("-")
    if kind in ("conv", "batch"):
        return ConvNet(int(width), classes, kind == "batch")
    return {"mlp": Mlp, "vit": Transformer}[kind](int(width), classes)


# --- data ---------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """What models learn from, and are judged on."""

    train: Split
    test: Split


@functools.cache
def fashion() -> Images:
    """Fashion-MNIST: its 60,000 training images, and the first 5,000 of its test images."""
    files = debian.read(debian.FASHION_MNIST, archives.cache_directory())

    def split(name: str) -> Split:
        pixels = np.frombuffer(gzip.decompress(files[f"{name}-images-idx3-ubyte.gz"]), np.uint8, offset=16)
        kinds = np.frombuffer(gzip.decompress(files[f"{name}-labels-idx1-ubyte.gz"]), np.uint8, offset=8)
        return Split(pixels.reshape(-1, 28, 28), kinds.astype(np.int32))

    test = split("t10k")
    return Images(split("train"), Split(test.images[:TEST], test.labels[:TEST]))


def classes_of(replicate: int, which: int) -> tuple[int, ...]:
    """The classes of one of the two models that have five each."""
    drawn = np.random.default_rng([replicate, 5]).permutation(CLASSES)
    return tuple(int(one) for one in sorted(np.split(drawn, 2)[which]))


def of_classes(split: Split, classes: Sequence[int]) -> Split:
    """The images of these classes; labels are places in `classes`."""
    rows = np.isin(split.labels, classes)
    return Split(split.images[rows], np.searchsorted(classes, split.labels[rows]).astype(np.int32))


def inputs(images: np.ndarray) -> np.ndarray:
    """Grey levels as the networks take them, float32."""
    return (images.astype(np.float32) - 73) / 90


def unlabelled(images: Images, count: int, replicate: int) -> np.ndarray:
    """Training images of all classes, drawn at random, as the networks take them."""
    rows = np.random.default_rng([replicate, 6]).permutation(len(images.train))[:count]
    return inputs(images.train.images[rows])


# --- training -----------------------------------------------------------------------------------------------------


def trained(name: str, seed: int, images: Images, classes: Sequence[int] = range(CLASSES)) -> Variables:
    """The variables of a network trained from a seed, out of the cache where it is there."""
    train = images.train if len(classes) == CLASSES else of_classes(images.train, classes)
    kind = name.split("-")[0]
    steps = STEPS[kind] * len(classes) // CLASSES
    of = {"version": VERSION, "net": name, "seed": seed, "classes": [*classes]}
    of |= {"steps": steps, "batch": BATCH, "rate": RATE[kind]}

    def make() -> Variables:
        net = network(name, len(classes))
        return fit(net, seed, draws(train, seed, steps), steps, RATE[kind])

    label = f"align-{name}-{seed}-{''.join(map(str, classes))}"
    found: Variables = cached(label, make, of=of, code=[], data=[train.images[:100], train.labels])
    return found


def draws(train: Split, seed: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches: every image once in some order, then again in another."""
    generator, order = np.random.default_rng([seed, 7]), np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = generator.permutation(len(train))
        rows, order = order[:BATCH], order[BATCH:]
        yield inputs(train.images[rows]), train.labels[rows]


def fit(net: Any, seed: int, batches: Iterator[tuple[np.ndarray, np.ndarray]], steps: int, peak: float) -> Variables:
    """Trains by AdamW, with a linear warm-up over the first tenth and a cosine decay to zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-3))
    variables = jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, 28, 28)))
    params, rest = variables["params"], {key: value for key, value in variables.items() if key != "params"}
    state = optimiser.init(params)

    @jax.jit
    def step(params: Any, rest: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, changed = net.apply({"params": params, **rest}, images, train=True, mutable=[*rest])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), changed, state

    for images, labels in batches:  # a step a call: in a loop of XLA's, convolutions are ten times slower on a CPU
        params, rest, state = step(params, rest, state, images, labels)
    found: Variables = jax.device_get({"params": params, **rest})
    return found


# --- judging ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("net",))
def _logits(net: Any, variables: Any, images: jax.Array) -> jax.Array:
    found: jax.Array = net.apply(variables, images)
    return found


def logits(net: Any, variables: Any, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """Of images as the networks take them: `(N, classes)`."""
    parts = [_logits(net, variables, images[first : first + batch]) for first in range(0, len(images), batch)]
    return np.concatenate([np.asarray(part) for part in parts])


def judged(found: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy of logits, and accuracy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(found, labels)
    return float(losses.mean()), float(np.mean(found.argmax(axis=-1) == labels))


def flat(variables: Variables) -> Flat:
    """Variables as `{"params/head/kernel": array}`."""
    found: Flat = flatten_dict(variables, sep="/")
    return found
