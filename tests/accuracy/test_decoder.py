"""The decoder domain on a tiny network and made-up texts: no network, no real corpus."""

import dataclasses

import jax
import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten
from cfmerge_accuracy import compare, decoder
from cfmerge_accuracy.decoder import data, model, suite, train
from cfmerge_accuracy.methods import Entry
from cfmerge_accuracy.zoo import perplexity

NET = model.Decoder(words=32, dim=16, depth=1, heads=2, hidden=24)
SIZES = data.Sizes(train=32, validation=8, test=8, length=12, context=2)
FULL = train.Recipe(steps=30, batch=8, learning_rate=2e-2)
LORA = dataclasses.replace(FULL, rank=2, weight_decay=0.0)


class Letters:
    """A tokenizer: every letter is a number from 1."""

    def encode_batch(self, texts):
        @dataclasses.dataclass
        class Encoded:
            ids: list

        return [Encoded([ord(letter) - 96 for letter in text]) for text in texts]


def counting(steps, seed):
    """Windows in which every token is the one before and `steps`."""
    start = np.random.default_rng(seed).integers(0, 32, (48, 1))
    return ((start + steps * np.arange(SIZES.length + 1)) % 32).astype(np.int32)


def domain(name, steps):
    rows = counting(steps, steps)
    return data.Domain(name, {"train": rows[:32], "validation": rows[32:40], "test": rows[40:]})


@pytest.fixture(scope="module")
def made():
    plan = suite.Plan(NET, FULL, {"full": FULL, "lora": LORA}, SIZES, domains=("one", "two"))
    begin = model.init(NET, jax.random.key(0))
    domains = {"one": domain("one", 1), "two": domain("two", 3)}

    def fitted(recipe, begin, number, windows):
        params, losses = train.fit(NET, recipe, begin, [number], windows)
        return suite.Fitted(params, 1.0, losses)

    base = fitted(FULL, begin, 9, np.concatenate([one.train for one in domains.values()]))
    experts = {name: fitted(LORA, base.params, k, one.train) for k, (name, one) in enumerate(domains.items())}
    return suite.Made(plan, "lora", 0, domains, base, experts, counting(1, 7)[:8])


def test_documents_come_once_in_lower_case():
    seen = {"of the base"}
    assert data.documents(lambda: ["Of the base", "One", "one", "two"], seen) == ["one", "two"]
    assert data.documents(lambda: ["two", "three"], seen) == ["three"]


def test_no_document_is_in_two_splits():
    texts = [chr(97 + number) * (3 + number) for number in range(26)]
    splits = data.split("x", texts, Letters(), data.Sizes(4, 2, 3, 10), seed=0).splits
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [4, 2, 3]
    letters = [set(rows.ravel()) - {0} for rows in splits.values()]
    assert not letters[0] & letters[1]
    assert not letters[0] & letters[2]
    assert not letters[1] & letters[2]


def test_splits_are_those_of_the_seed():
    texts = [chr(97 + number) * 9 for number in range(26)]
    one, same, other = (data.split("x", texts, Letters(), data.Sizes(4, 2, 3, 10), seed).train for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_corpus_that_is_too_small_gives_fewer_windows():
    found = data.windows(iter([[1, 2, 0], [3, 4, 5, 0]]), 9, 2)
    assert found.tolist() == [[1, 2, 0], [3, 4, 5]]


def test_the_tokenizer_spells_what_it_never_saw():
    pytest.importorskip("tokenizers")
    tokenizer = data.trained_tokenizer(["the cat sat on the mat"] * 5, 270)
    assert tokenizer.token_to_id(data.END) == 0
    (ids,) = data.encoded(tokenizer, ["the zebra, é"])
    assert ids[-1] == 0
    assert tokenizer.decode(ids[:-1]).strip() == "the zebra, é"


def test_a_token_sees_those_before_it_alone(made):
    ids = counting(1, 0)[:1, :8]
    other = ids.copy()
    other[0, 5] = 30
    one, two = (np.asarray(model.logits(NET, made.base.params, x)) for x in (ids, other))
    np.testing.assert_allclose(one[0, :5], two[0, :5], atol=1e-5)
    assert np.abs(one[0, 5:] - two[0, 5:]).max() > 1e-3


def test_attention_depends_on_how_far_apart_tokens_are_and_not_on_where():
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8)).repeat(6, axis=1).astype(np.float32)
    turned = np.asarray(model.rotated(x))[0, :, 0]
    scores = turned @ turned.T
    np.testing.assert_allclose(np.diagonal(scores, 2), scores[0, 2], rtol=1e-4)
    assert abs(scores[0, 1] - scores[0, 2]) > 1e-3


def test_experts_learn_their_domain_and_training_repeats(made):
    again, losses = train.fit(NET, LORA, made.base.params, [1], made.domains["two"].train)
    ours, same = flatten(made.experts["two"].params)[0], flatten(again)[0]
    assert all(np.array_equal(ours[name], same[name]) for name in ours)
    assert losses[-1] < losses[0]
    zoo = made.zoo()
    before, after = (zoo.perplexities(p, "validation", ["two"])["two"] for p in (zoo.base, zoo.experts["two"]))
    assert after < before


def test_low_rank_experts_change_kernels_by_their_rank_and_nothing_else(made):
    base, expert = flatten(made.base.params)[0], flatten(made.experts["one"].params)[0]
    for name, leaf in base.items():
        delta = expert[name] - leaf
        ranked = np.linalg.matrix_rank(delta, tol=1e-4) if delta.ndim == 2 else int(np.any(delta))
        assert ranked == (2 if name.endswith("kernel") else 0)


def test_tokens_are_scored_that_have_enough_before_them(made):
    zoo, windows = made.zoo(), made.domains["one"].splits["test"]
    assert zoo.labels("one", "test").tolist() == windows[:, 3:].ravel().tolist()
    whole = np.asarray(model.logits(NET, zoo.base, windows[:, :-1]))[:, 2:].reshape(-1, 32)
    np.testing.assert_allclose(zoo.logits(zoo.base, "one", "test"), whole, atol=1e-5)


def test_perplexity_counts_the_words_that_a_model_is_torn_between():
    assert perplexity(np.zeros((5, 8)), np.arange(5)) == pytest.approx(8)
    assert perplexity(np.log([[0.5, 0.25, 0.25]]), np.array([1])) == pytest.approx(4)


def test_merges_are_told_with_their_perplexities(made):
    entries = [Entry("average", "average", "sums")]
    found = compare.compare(made.zoo(), entries, (), lambda _: None)
    assert "multitask" not in found["references"]
    (row,) = found["methods"]
    assert row.get("scaled") is None
    assert row["perplexities"].keys() == {"one", "two"}
    assert found["perplexities"]["experts"]["one"] < found["perplexities"]["base"]["one"]
    assert row["excess"] is None
    assert found["covariances"] == []


def test_true_covariances_are_those_of_the_layers(made):
    grams = made.grams("one")
    kernels = {name: leaf for name, leaf in flatten(made.base.params)[0].items() if name.endswith("kernel")}
    assert grams.keys() == kernels.keys()
    assert all(gram.shape == (len(kernels[name]),) * 2 for name, gram in grams.items())


def test_an_unknown_variant_is_named():
    with pytest.raises(CfmergeError, match="no variant 'half'"):
        decoder.load(0, variant="half")
