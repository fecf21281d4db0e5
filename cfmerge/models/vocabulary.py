"""Vocabularies: tokens as rows of embeddings, and one vocabulary for models that have several.

    tokens of a model       {token: id}, as its tokenizer's files declare them; an id is a row of every embedding
    rows for an output      for each row of the output the model's own row of the same token, or none
    rows without a token    padding; tokens that an output adds take the first of them

Everything here is a function of plain values: the content of JSON files in, index arrays out.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.models.families import POSITIONS
from cfmerge.models.kinds import Kind, Parameter

AGREE = 0.95  # of the tokens of the smaller vocabulary: below it is that of another tokenizer
ABSENT = -1  # a row that a model does not have
BIAS = re.compile(r"(^|[./])(lm_head|embed_out|predictions|logits\w*|final_logits|decoder)[./_]?bias$")
TABLES = re.compile(
    r"(embed_tokens|word_embeddings?|wte|shared|embed_in|tok_embeddings|token_embedding|input_embedding|token_embedder"
    r"|lm_head)[./]?"
)
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        ids: `{token: id}`, those of the tokenizer's own model and added ones.
        added: `{token: its declaration}` of the added ones, as in `tokenizer.json` without the id.
        kind: of the tokenizer's model: BPE, WordPiece, Unigram; empty where its files do not say.
        rules: what it does with text, besides its tokens: merges in order, or scores by token.
        file: where it was read.
        own: how many tokens the tokenizer's model has, without those that are added alone.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    kind: str = ""
    rules: tuple[Any, ...] = ()
    file: str = ""
    own: int = 0

    @functools.cached_property
    def tokens(self) -> dict[int, str]:
        """`{id: token}`."""
        return {number: token for token, number in self.ids.items()}

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


# --- from files -------------------------------------------------------------------------------------------------------


def of_tokenizer(content: Mapping[str, Any], file: str) -> Vocabulary | None:
    """The vocabulary in a `tokenizer.json`; None if it holds none.

    Raises:
        CfmergeError: added tokens whose ids the tokenizers library would change.
    """
    model = content.get("model")
    entries = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(entries, Mapping | list) or not entries:
        return None
    if isinstance(entries, list):
        own = {str(token): number for number, (token, _) in enumerate(entries)}
        rules: tuple[Any, ...] = tuple((str(token), float(score)) for token, score in entries)
    else:
        own = {str(token): int(number) for token, number in entries.items()}
        merges = model.get("merges") or ()
        rules = tuple(tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges)
    declared = [entry for entry in content.get("added_tokens") or () if isinstance(entry, Mapping)]
    check_added(own, [(str(entry["content"]), int(entry["id"])) for entry in declared], file)
    ids = own | {str(entry["content"]): int(entry["id"]) for entry in declared}
    added = {str(e["content"]): {k: v for k, v in e.items() if k not in {"id", "content"}} for e in declared}
    return Vocabulary(ids, added, str(model.get("type") or ""), rules, file, len(own))


def of_parts(tokens: Mapping[str, int], added: Mapping[str, int], merges: Sequence[str], file: str) -> Vocabulary:
    """The vocabulary of a tokenizer in the files of its own kind: `vocab.txt`, or `vocab.json` with `merges.txt`."""
    check_added(tokens, sorted(added.items(), key=lambda item: item[1]), file)
    rules = tuple(tuple(line.split(" ", 1)) for line in merges if line and not line.startswith("#version"))
    return Vocabulary(
        {**tokens, **added}, dict.fromkeys(added, PLAIN), "BPE" if rules else "", rules, file, len(tokens)
    )


def check_added(own: Mapping[str, int], added: Sequence[tuple[str, int]], file: str) -> None:
    """Raises `CfmergeError` where the tokenizers library would give an added token another id than is declared.

    It takes the id of the model's own token of that name; else the number after the last added token's, and at least
    that of the model's tokens: so a hole is closed, and a token may get the id of another.
    """
    taken, last = {number: token for token, number in own.items()}, -1
    for token, declared in added:
        given = own.get(token, max(len(own), last + 1))
        last = max(last, given)
        other = taken.setdefault(given, token)
        if given != declared or other != token:
            found = f"it would have id {given}" if given != declared else f"{other!r} has that id"
            raise CfmergeError(
                f"{file}: the added token {token!r} is declared with id {declared}, but {found} when the file is "
                "loaded: ids leave a hole or collide. Save the tokenizer anew, "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), and check that its ids are the model's"
            )


# --- compared ---------------------------------------------------------------------------------------------------------


def another_tokenizer(base: Vocabulary, expert: Vocabulary) -> str:
    """Why an expert's tokenizer is another than the base's; empty if it is the same but for some tokens."""
    shared = base.ids.keys() & expert.ids.keys()
    fewer = min(len(base.ids), len(expert.ids))
    if len(shared) < AGREE * fewer:
        return f"{len(shared)} of {fewer} tokens agree, fewer than {AGREE:.0%}"
    if not base.kind or not expert.kind:
        return ""
    if base.kind != expert.kind:
        return f"it is a {expert.kind} tokenizer, the base's {base.kind}"
    ours, theirs = (_shared_rules(one, shared) for one in (base, expert))
    if ours == theirs:
        return ""
    first = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
    what = "scores" if base.kind == "Unigram" else "merges"
    told = f"such as {_rule(first[1])}, in the base {_rule(first[0])}" if first else f"{len(theirs)} and {len(ours)}"
    return f"{what} of shared tokens differ, {told}"


def _shared_rules(vocabulary: Vocabulary, shared: Iterable[str]) -> list[Any]:
    """The rules that are about shared tokens alone."""
    if vocabulary.kind == "Unigram":
        return sorted(rule for rule in vocabulary.rules if rule[0] in shared)
    return [rule for rule in vocabulary.rules if len(rule) == 2 and {"".join(rule), *rule} <= set(shared)]


def _rule(rule: Any) -> str:
    return " ".join(map(str, rule))


def moved(base: Vocabulary, expert: Vocabulary) -> list[str]:
    """Tokens that both have, under other ids."""
    return [token for token, number in expert.ids.items() if base.ids.get(token, number) != number]


def extra(base: Vocabulary, expert: Vocabulary) -> list[str]:
    """Tokens of the expert that the base lacks, by id."""
    return sorted((token for token in expert.ids if token not in base.ids), key=lambda token: expert.ids[token])


# --- joined -----------------------------------------------------------------------------------------------------------


def union(base: Vocabulary, experts: Mapping[str, Vocabulary]) -> Vocabulary:
    """The base's vocabulary with its ids, and behind it each expert's added tokens that it lacks, in order.

    Raises:
        CfmergeError: a token is no added one: as an added token it would stand for another text; or there is no id
            for it that the tokenizers library would give it.
    """
    ids, added = dict(base.ids), dict(base.added)
    for name, expert in experts.items():
        for token in (token for token in extra(base, expert) if token not in ids):
            if token not in expert.added:
                raise CfmergeError(
                    f"vocabulary: union: expert {name!r} has the token {token!r} in the model of its tokenizer "
                    f"({expert.file}), where it stands for what the base's tokenizer splits otherwise; it cannot be "
                    f"added to the base's. Take that tokenizer (--vocabulary {name}), or leave its tokens out "
                    "(--vocabulary base)"
                )
            ids[token] = max(base.own, max((ids[one] for one in added), default=-1) + 1)
            if ids[token] in base.tokens:
                raise CfmergeError(
                    f"vocabulary: union: {base.file} leaves no id for another token: {ids[token]} is that of "
                    f"{base.tokens[ids[token]]!r}; save the base's tokenizer anew"
                )
            added[token] = expert.added[token]
    return dataclasses.replace(base, ids=ids, added=added)


def rows_for(output: Vocabulary, own: Vocabulary, rows: int, count: int) -> np.ndarray:
    """For each of `count` rows of the output the row of the same token in a model of so many rows, or `ABSENT`."""
    found = np.full(count, ABSENT, np.int64)
    for token, number in output.ids.items():
        theirs = own.ids.get(token)
        if theirs is not None and theirs < rows and number < count:
            found[number] = theirs
    return found


# --- tensors ----------------------------------------------------------------------------------------------------------


def vocabulary_axes(parameters: Mapping[str, Parameter], rows: int) -> dict[str, int]:
    """`{name: axis}` of the tensors with a row for each token: embeddings, output layers, and these layers' biases.

    Args:
        rows: how many rows they have.
    """
    found = {}
    for name, parameter in parameters.items():
        axis = _axis(parameter)
        if axis is not None and parameter.shape[axis] == rows:
            found[name] = axis
    return found


def token_rows(parameters: Mapping[str, Parameter], config: Mapping[str, Any]) -> int:
    """How many rows a model's embeddings of tokens have; 0 where none is found."""
    text = config.get("text_config")
    stated = [one.get("vocab_size") for one in (config, text if isinstance(text, Mapping) else {})]
    for rows in (one for one in stated if isinstance(one, int)):
        if vocabulary_axes(parameters, rows):
            return rows
    tables = (p for name, p in parameters.items() if TABLES.search(name) and _axis(p) is not None and len(p.shape) == 2)
    return max((table.shape[_axis(table) or 0] for table in tables), default=0)


def _axis(parameter: Parameter) -> int | None:
    name, shape = parameter.name, parameter.shape
    if BIAS.search(name) and len(shape) in {1, 2} and sum(size > 1 for size in shape) <= 1:
        return len(shape) - 1
    is_table = parameter.kind is Kind.EMBEDDING or (parameter.kind is Kind.HEAD and "decoder" in name)
    if not is_table or len(shape) != 2 or not parameter.layout:
        return None
    module = re.sub(r"[./](weight|kernel|embedding|value)$", "", name)
    return None if POSITIONS.search(module) or module.endswith("wpe") else parameter.layout.index("o")
