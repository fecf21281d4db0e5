"""Texts as token ids, drawn, without copies, and split: disjoint by what the model sees of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cfmerge_accuracy.text.corpora import Corpus, Labelled
from cfmerge_accuracy.zoo import Split

CHARACTERS_PER_TOKEN = 12  # texts are cut there before they are tokenised, which takes time


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of a task is used: numbers of texts, and tokens of each with its two marks [CLS] and [SEP]."""

    train: int = 4000
    validation: int = 80
    test: int = 200
    length: int = 24


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids `(N, length)` int32, zeros behind the end; lengths `(N,)`; classes `(N,)`."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Any) -> Texts:
        return Texts(self.ids[rows], self.lengths[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: what an expert learns, is watched on and is judged on; a phrase for each of its classes."""

    name: str
    classes: tuple[str, ...]
    splits: dict[Split, Texts]

    @property
    def train(self) -> Texts:
        return self.splits["train"]


def load_task(name: str, read: Callable[[], Corpus], tokenizer: Any, sizes: Sizes, seed: int) -> Task:
    """Reads a corpus, and draws and splits with the seed."""
    return split_corpus(name, read(), tokenizer, sizes, np.random.default_rng([seed, *name.encode()]))


def split_corpus(name: str, corpus: Corpus, tokenizer: Any, sizes: Sizes, generator: np.random.Generator) -> Task:
    """Test texts come from the official test part where there is one; validation texts never do.

    A text whose tokens were drawn before is left out, whatever its label: no split holds what another one holds.
    """
    rest = Pool(corpus.train, tokenizer, sizes.length, generator)
    first = Pool(corpus.test, tokenizer, sizes.length, generator) if corpus.test else rest
    seen: set[bytes] = set()
    splits: dict[Split, Texts] = {
        "test": first.draw(sizes.test, seen),
        "validation": rest.draw(sizes.validation, seen),
        "train": rest.draw(sizes.train, seen),
    }
    return Task(name, corpus.classes, splits)


class Pool:
    """Labelled texts in random order, tokenised as they are drawn."""

    def __init__(self, texts: Labelled, tokenizer: Any, length: int, generator: np.random.Generator) -> None:
        self.texts, self.tokenizer, self.length = texts, tokenizer, length
        self.order = iter(generator.permutation(len(texts)))

    def draw(self, count: int, seen: set[bytes]) -> Texts:
        """The next `count` texts that are not in `seen`, to which they are added; fewer if there are no more."""
        found: list[tuple[np.ndarray, int, int]] = []
        while len(found) < count and (drawn := self._next(count - len(found))):
            ids, lengths = tokenise(self.tokenizer, [text for text, _ in drawn], self.length)
            for row, length, (_, label) in zip(ids, lengths, drawn, strict=True):
                if (key := row.tobytes()) not in seen:
                    seen.add(key)
                    found.append((row, int(length), label))
        rows, sizes, labels = zip(*found, strict=True)
        return Texts(np.stack(rows), np.array(sizes, np.int32), np.array(labels, np.int32))

    def _next(self, count: int) -> Labelled:
        return [self.texts[index] for _, index in zip(range(count), self.order, strict=False)]


def tokenise(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids `(N, length)` and lengths `(N,)`; longer texts are cut."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch([text[: CHARACTERS_PER_TOKEN * length] for text in texts])
    ids = np.zeros((len(encoded), length), np.int32)
    for row, one in zip(ids, encoded, strict=True):
        row[: len(one.ids)] = one.ids
    return ids, np.array([len(one.ids) for one in encoded], np.int32)


def buckets(lengths: np.ndarray, batch: int, multiple: int = 8) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of batches, shorter texts first, with the number of tokens that each batch is cut to."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        yield rows, int(-(-lengths[rows].max() // multiple) * multiple)


def drawn_batches(
    lengths: np.ndarray, batch: int, steps: int, generator: np.random.Generator, together: int = 16
) -> Iterator[np.ndarray]:
    """Rows of `steps` training batches, epoch by epoch: of every `together` batches, texts of like length meet."""
    done = 0
    while True:
        order = generator.permutation(len(lengths))
        order = order[: max(len(order) // batch, 1) * batch]
        for start in range(0, len(order), together * batch):
            some = order[start : start + together * batch]
            some = some[np.argsort(lengths[some], kind="stable")]
            cut = np.split(some, range(batch, len(some), batch))
            for index in generator.permutation(len(cut)):
                if done == steps:
                    return
                yield cut[index]
                done += 1
