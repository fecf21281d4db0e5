"""The stream of `time_study.py`: tasks in their orders, bases of three sizes, training on a task, and scores.

Eight adaptation tasks come one after another; four held-out tasks are never trained on. Every task has a frozen head,
class embeddings of the base, so that a task that has not come yet has a score. A replicate is a seed (of data, base and
training) with an order of its own.

    mnist, optdigits         handwritten digits; the second ones enlarged from 8 x 8
    animals                  silhouettes
    upper, lower             Latin letters, and
    glyph_digits             digits, in some 460 faces; test letters come from families of faces of their own
    greek, cyrillic          letters in the faces that matplotlib ships, distorted; test letters in faces of their own
    armenian, georgian       likewise, and
    signs                    mathematical signs
    clothes                  Fashion-MNIST's test images; the base has learnt from its training images
"""

import functools
import gzip
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))

from cfmerge.demo import archives, glyphs
from cfmerge.demo import data as demo_data
from cfmerge.demo.data import Split, Task
from cfmerge_accuracy import debian
from cfmerge_accuracy.cache import cached, digest
from cfmerge_accuracy.images import data, heads
from cfmerge_accuracy.images.heads import Head, Heads
from cfmerge_accuracy.vision import model
from cfmerge_accuracy.vision.model import Vit
from cfmerge_accuracy.zoo import Params
from cfmerge_accuracy.zoo import Split as SplitName

ADAPTATION = ("mnist", "animals", "upper", "greek", "glyph_digits", "cyrillic", "armenian", "signs")
HELD_OUT = ("clothes", "optdigits", "lower", "georgian")
ORDERS = {  # by replicate; drawn once, by numpy.random.default_rng(replicate).permutation(ADAPTATION)
    0: ("upper", "glyph_digits", "greek", "armenian", "cyrillic", "mnist", "animals", "signs"),
    1: ("cyrillic", "mnist", "animals", "glyph_digits", "upper", "armenian", "greek", "signs"),
    2: ("armenian", "cyrillic", "signs", "upper", "greek", "glyph_digits", "mnist", "animals"),
}
SIZES = {"small": Vit(dim=32, depth=2, heads=2), "medium": Vit(dim=64, depth=3), "large": Vit(dim=96, depth=4)}
BUDGETS = (100, 300, 900)  # steps of one task
IMAGES = (4000, 150, 300)  # of a task's train, validation and test, at most
PRETRAINING, BATCH, RATE = 3000, 32, {"base": 1.5e-3, "expert": 1e-3}
REPLAY, SHARE = 200, 0.5  # images kept of each task that has been; share of a batch that is drawn from them
CHUNK = 100  # steps in one compiled call
VERSION = 1  # raised when what is trained changes by a line of this file that no setting shows
CODE = (archives, glyphs, demo_data, debian, data, heads, model)  # with VERSION and settings, all that decides it

DRAWN = {
    "armenian": "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՍՎՏՐՑՓՔՕՖ",
    "georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "signs": "←↑→↓↔∀∂∃∅∆∇∈∋∏∑√∞∧∨∩∪∫≈≠≡≤≥⊂⊃⊕⊗⊥",  # noqa: RUF001
}
FACES = {split: [face for face in faces if face.startswith("DejaVu")] for split, faces in data.FACES.items()}


class Stream(NamedTuple):
    """A base of one size and the tasks of one replicate."""

    seed: int
    net: Vit
    base: Params
    tasks: Mapping[str, Task]
    heads: Mapping[str, Head]
    order: tuple[str, ...]  # adaptation tasks
    held_out: tuple[str, ...]
    digest: str


def stream(seed: int, size: str) -> Stream:
    """The replicate's tasks and the base of a size, out of the cache where they are there."""
    base_data = data.pretraining(archives.cache_directory(), seed)
    return build(seed, SIZES[size], load_tasks(seed), base_data, ORDERS[seed], HELD_OUT, PRETRAINING)


def build(
    seed: int,
    net: Vit,
    tasks: Mapping[str, Task],
    start: Split,
    order: tuple[str, ...],
    held_out: tuple[str, ...],
    steps: int,
) -> Stream:
    """Pre-trains the base on the images of `start`, and places the tasks' classes where the base sees them."""
    below, above = jax.random.split(jax.random.key(seed))
    width, classes = net.dim, int(start.labels.max()) + 1
    head = heads.random_head(above, classes, max(width, classes))
    head = Head(head.embeddings[:, :width], head.offsets)
    of = {"version": VERSION, "seed": seed, "net": [net.dim, net.depth, net.heads]}
    of |= {"steps": steps, "batch": BATCH, "rates": RATE}

    def pretrained() -> Params:
        rows = np.random.default_rng([seed, 99]).integers(0, len(start), (steps, BATCH))
        drawn = start.images[rows], start.labels[rows]
        return fit(net, model.init(net, below), *drawn, heads.stacked([head]), RATE["base"])

    base = cached(f"time-{seed}-{net.dim}-base", pretrained, of=of, code=CODE, data=[start.images, start.labels])
    own = {task.name: embedded(net, base, task) for task in tasks.values()}
    arrays = [*jax.tree.leaves((base, own)), *(s for t in tasks.values() for s in (t.train.images, t.train.labels))]
    return Stream(seed, net, base, tasks, own, order, held_out, digest(of, CODE, arrays))


def embedded(net: Vit, base: Params, task: Task) -> Head:
    """The task's head: where the base itself puts its classes."""
    features = np.concatenate([np.asarray(model.features(net, base, part)) for part in parts(task.train.images)])
    return heads.class_embeddings(features, task.train.labels, task.classes)


def parts(images: np.ndarray) -> list[np.ndarray]:
    return [images[first : first + IMAGES[2]] for first in range(0, len(images), IMAGES[2])]


# --- tasks --------------------------------------------------------------------------------------------------------


def load_tasks(seed: int) -> dict[str, Task]:
    """All tasks of a replicate by name; drawing letters takes a while, so they are kept."""
    names = (*ADAPTATION, *HELD_OUT)

    def make() -> Params:
        cache = archives.cache_directory()
        found = {task.name: task for task in data.load_tasks(cache, seed, images=IMAGES)}
        found |= {name: drawn(name, seed) for name in DRAWN} | {"clothes": clothes(seed)}
        return {
            name: {"classes": np.array(found[name].classes)}
            | {split: dict(vars(getattr(found[name], split))) for split in get_args(SplitName)}
            for name in names
        }

    kept = cached(f"time-{seed}-images", make, of={"version": VERSION, "seed": seed, "images": IMAGES}, code=CODE)
    return {
        name: Task(name, kept[name]["classes"].item(), *(Split(**kept[name][s]) for s in get_args(SplitName)))
        for name in names
    }


def drawn(name: str, seed: int) -> Task:
    """Characters in DejaVu's faces; other faces for validation and for test."""
    generator = np.random.default_rng([seed, 7, [*DRAWN].index(name)])
    splits = {}
    for (split, faces), count in zip(FACES.items(), IMAGES, strict=True):
        copies = -(-count // (len(faces) * len(DRAWN[name]))) + 1
        splits[split] = Split(*glyphs.render(DRAWN[name], faces, copies, generator))
    return data.limited(Task(name, len(DRAWN[name]), **splits), IMAGES, generator)


def clothes(seed: int) -> Task:
    """Fashion-MNIST's ten kinds; its 10,000 test images are split, since the base knows the others."""
    files = debian.read(debian.FASHION_MNIST, archives.cache_directory())
    pixels = np.frombuffer(gzip.decompress(files["t10k-images-idx3-ubyte.gz"]), np.uint8, offset=16)
    kinds = np.frombuffer(gzip.decompress(files["t10k-labels-idx1-ubyte.gz"]), np.uint8, offset=8)
    generator = np.random.default_rng([seed, 8])
    found = demo_data.unique(pixels.reshape(-1, 28, 28), kinds.astype(np.int32))
    return data.limited(demo_data.split_task("clothes", found, IMAGES[1], IMAGES[2], generator), IMAGES, generator)


# --- training -----------------------------------------------------------------------------------------------------


def trained(of: Stream, start: Params, task: str, steps: int, before: Sequence[str] = ()) -> Params:
    """The expert of a task, out of the cache where it is there.

    Args:
        before: tasks that have been, of which replay is drawn; none: no replay.
    """
    pools = {task: of.tasks[task].train}
    shares = {task: 1 - SHARE if before else 1.0}
    for name in before:
        train = of.tasks[name].train
        pools[name], shares[name] = Split(train.images[:REPLAY], train.labels[:REPLAY]), SHARE / len(before)
    return kept_fit(of, start, task, steps, pools, shares)


def multitask(of: Stream, tasks: Sequence[str], steps: int) -> Params:
    """The base trained on all these tasks at once, for as many steps as they have together."""
    pools = {name: of.tasks[name].train for name in tasks}
    return kept_fit(of, of.base, "multitask", steps * len(tasks), pools, dict.fromkeys(tasks, 1 / len(tasks)))


def kept_fit(
    of: Stream, start: Params, name: str, steps: int, pools: Mapping[str, Split], shares: Mapping[str, float]
) -> Params:
    def make() -> Params:
        images, labels = draws(of, name, steps, pools, shares)
        return fit(of.net, start, images, labels, heads.stacked([*of.heads.values()]), RATE["expert"])

    settings = {"stream": of.digest, "steps": steps, "shares": [*shares.items()], "replay": REPLAY}
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(start)]
    return cached(f"time-{of.seed}-{of.net.dim}-{name}", make, of=settings, code=CODE, data=leaves)


def draws(
    of: Stream, name: str, steps: int, pools: Mapping[str, Split], shares: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Images `(steps, BATCH, 28, 28)`, and labels that count through all heads' classes."""
    names = [*of.heads]
    first = dict(zip(names, np.cumsum([0, *(len(head.offsets) for head in of.heads.values())]), strict=False))
    number = names.index(name) if name in names else len(names)
    generator = np.random.default_rng([of.seed, number, steps])
    source = generator.choice(len(pools), (steps, BATCH), p=[*shares.values()])
    images, labels = np.empty((steps, BATCH, 28, 28), np.uint8), np.empty((steps, BATCH), np.int32)
    for index, (task, pool) in enumerate(pools.items()):
        here = source == index
        rows = generator.integers(0, len(pool), int(here.sum()))
        images[here], labels[here] = pool.images[rows], pool.labels[rows] + first[task]
    return images, labels


OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(1e-4))


def fit(net: Vit, params: Params, images: np.ndarray, labels: np.ndarray, above: Heads, peak: float) -> Params:
    """Trains by AdamW, with a linear warm-up over the first tenth and a cosine decay to zero."""
    total, state = len(images), (params, OPTIMISER.init(params))
    counts = np.arange(total, dtype=np.float32)
    for first in range(0, total, CHUNK):
        chunk = slice(first, first + CHUNK)
        state = _steps(net, state, images[chunk], labels[chunk], counts[chunk], np.float32(total), above, peak)
    found: Params = jax.device_get(state[0])
    return found


@functools.partial(jax.jit, static_argnames=("net",))
def _steps(
    net: Vit,
    state: tuple[Params, optax.OptState],
    images: jax.Array,
    labels: jax.Array,
    counts: jax.Array,
    total: jax.Array,
    above: Heads,
    peak: jax.Array,
) -> tuple[Params, optax.OptState]:
    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return heads.cross_entropy(model.features(net, params, images), labels, above)

    def step(state: tuple[Params, optax.OptState], drawn: tuple[jax.Array, ...]) -> Any:
        (params, moments), (images, labels, count) = state, drawn
        updates, moments = OPTIMISER.update(jax.grad(loss)(params, images, labels), moments, params)
        rate = -peak * at(count, total)
        return (jax.tree.map(lambda leaf, change: leaf + rate * change, params, updates), moments), None

    return jax.lax.scan(step, state, (images, labels, counts))[0]


def at(count: jax.Array, total: jax.Array) -> jax.Array:
    """The share of the peak rate at a step."""
    warm = jnp.maximum(1.0, total // 10)
    return jnp.where(count < warm, count / warm, 0.5 * (1 + jnp.cos(jnp.pi * (count - warm) / (total - warm))))


# --- scores -------------------------------------------------------------------------------------------------------


def scores(of: Stream, params: Params, split: SplitName = "test") -> dict[str, float]:
    """Each task's share of images whose best-scoring class is the right one."""
    found = {}
    for name, task in of.tasks.items():
        judged: Split = getattr(task, split)
        features = np.concatenate([np.asarray(model.features(of.net, params, part)) for part in parts(judged.images)])
        found[name] = float(np.mean(np.argmax(of.heads[name].logits(features), axis=-1) == judged.labels))
    return found
