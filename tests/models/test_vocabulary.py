"""Vocabularies: read, compared, joined, and as rows. The tokenizers library is the judge of ids."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokens import bpe, content, turned, unigram, wordpiece

from cfmerge.errors import CfmergeError
from cfmerge.models import classify
from cfmerge.models.vocabulary import (
    ABSENT,
    another_tokenizer,
    extra,
    moved,
    of_parts,
    of_tokenizer,
    rows_for,
    token_rows,
    union,
    vocabulary_axes,
)

MADE = {"bpe": bpe, "wordpiece": wordpiece, "unigram": unigram}


def vocabulary(tokenizer):
    told = tokenizer if isinstance(tokenizer, dict) else content(tokenizer)
    return of_tokenizer(told, "tokenizer.json")


@pytest.mark.parametrize("kind", MADE)
def test_ids_are_those_of_the_library(kind):
    made = MADE[kind](["<s>", "</s>"])
    found = vocabulary(made)
    assert dict(found.ids) == made.get_vocab()
    assert set(found.added) == {"<s>", "</s>"}
    assert found.size == made.get_vocab_size()
    assert found.own == made.get_vocab_size() - 2


@pytest.mark.parametrize(("declared", "given"), [([20], [9]), ([8], [9]), ([9, 11], [9, 10])])
def test_added_tokens_that_the_library_would_renumber_are_refused(declared, given):
    told = content(wordpiece([f"<{n}>" for n in range(len(declared))]))
    for entry, number in zip(told["added_tokens"], declared, strict=True):
        entry["id"] = number
    loaded = Tokenizer.from_str(json.dumps(told))
    assert [loaded.token_to_id(entry["content"]) for entry in told["added_tokens"]] == given
    with pytest.raises(CfmergeError, match=r"declared with id \d+, but it would have id \d+ when the file is loaded"):
        vocabulary(told)


def test_an_added_token_may_be_one_of_the_model():
    made = wordpiece(["[CLS]", "<new>"])
    assert vocabulary(made).ids["[CLS]"] == 1
    assert vocabulary(made).ids["<new>"] == made.token_to_id("<new>") == 9


def test_what_is_no_tokenizer_has_no_vocabulary():
    assert of_tokenizer({}, "f") is None
    assert of_tokenizer({"model": {"type": "BPE", "vocab": {}}}, "f") is None


def test_vocabularies_of_a_slow_tokenizer():
    found = of_parts({"a": 0, "b": 1, "ab": 2}, {"<x>": 3}, ["#version: 0.2", "a b"], "vocab.json")
    assert dict(found.ids) == {"a": 0, "b": 1, "ab": 2, "<x>": 3}
    assert found.rules == (("a", "b"),)
    with pytest.raises(CfmergeError, match=r"vocab.json: the added token '<x>' is declared with id 7"):
        of_parts({"a": 0}, {"<x>": 7}, (), "vocab.json")


# --- compared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (bpe(), bpe(["<s>"]), ""),
        (bpe(["<s>"]), bpe(), ""),
        (bpe(), turned(bpe()), ""),
        (bpe(), wordpiece(), "tokens agree, fewer than 95%"),
        (unigram(), unigram(score=-1.5), "scores of shared tokens differ"),
        (bpe(merges=[("a", "b"), ("c", "d")]), bpe(merges=[("c", "d"), ("a", "b")]),
         "merges of shared tokens differ, such as c d, in the base a b"),
        (unigram(), {**content(unigram()), "model": {"type": "BPE", "vocab": {p: n for n, p in enumerate(
            ["<unk>", "ab", "a", "b", "c"])}, "merges": ["a b"]}}, "it is a BPE tokenizer, the base's Unigram"),
    ],
)  # fmt: skip
def test_other_tokenizers(ours, theirs, why):
    found = another_tokenizer(vocabulary(ours), vocabulary(theirs))
    assert bool(found) == bool(why)
    assert any(part in found for part in why.split("|"))


def test_an_expert_may_have_merges_of_its_own_tokens():
    theirs = vocabulary(bpe(merges=[("a", "b"), ("ab", "c"), ("c", "d")]))
    assert not another_tokenizer(vocabulary(bpe()), theirs)
    assert extra(vocabulary(bpe()), theirs) == ["cd"]
    with pytest.raises(CfmergeError, match=r"expert 'x' has the token 'cd' in the model .*--vocabulary x"):
        union(vocabulary(bpe()), {"x": theirs})


# --- joined -------------------------------------------------------------------------------------------------------


def test_a_union_keeps_the_base_s_ids_and_adds_in_order():
    base, one, two = (vocabulary(bpe(more)) for more in ([], ["<x>", "<y>"], ["<z>", "<x>"]))
    found = union(base, {"one": one, "two": two})
    assert {token: found.ids[token] for token in base.ids} == dict(base.ids)
    assert [found.ids[token] for token in ("<x>", "<y>", "<z>")] == [29, 30, 31]
    told = {**content(bpe()), "added_tokens": [
        {"id": found.ids[token], "content": token, **found.added[token]} for token in ("<x>", "<y>", "<z>")
    ]}  # fmt: skip
    assert Tokenizer.from_str(json.dumps(told)).get_vocab() == dict(found.ids)


def test_rows_of_the_same_tokens():
    base = vocabulary(bpe(["<x>"]))
    expert = vocabulary(turned(bpe()))
    assert len(moved(base, expert)) == 28  # of 29, one of which lies in the middle
    index = rows_for(base, expert, 29, 32)
    assert index.tolist() == [*reversed(range(29)), ABSENT, ABSENT, ABSENT]
    assert rows_for(base, base, 28, 32).tolist() == [*range(28), *[ABSENT] * 4]  # ids beyond the table


ROWS = {
    "model.embed_tokens.weight": ((11, 4), 0),
    "lm_head.weight": ((11, 4), 0),
    "lm_head.bias": ((11,), 0),
    "final_logits_bias": ((1, 11), 1),
    "cls.predictions.decoder.weight": ((11, 4), 0),
    "cls.predictions.bias": ((11,), 0),
    "lm_head/w": ((4, 11), 1),
    "decoder/logits_dense/kernel": ((4, 11), 1),
    "token_embedder/embedding": ((11, 4), 0),
    "embeddings.position_embeddings.weight": ((11, 4), None),
    "transformer.wpe.weight": ((11, 4), None),
    "model.layers.0.mlp.up_proj.weight": ((11, 4), None),
    "model.layers.0.mlp.up_proj.bias": ((11,), None),
    "embeddings.token_type_embeddings.weight": ((2, 4), None),
}


def test_tensors_with_a_row_for_each_token():
    parameters = classify({name: (shape, "float32") for name, (shape, _) in ROWS.items()})
    assert vocabulary_axes(parameters, 11) == {name: axis for name, (_, axis) in ROWS.items() if axis is not None}
    assert token_rows(parameters, {"vocab_size": 11}) == token_rows(parameters, {}) == 11
    assert token_rows(parameters, {"vocab_size": 9999}) == 11
    assert token_rows(classify({"w": ((3, 3), "float32")}), {}) == 0


def test_rows_are_plain_arrays():
    assert rows_for(vocabulary(bpe()), vocabulary(bpe()), 29, 29).dtype == np.int64
