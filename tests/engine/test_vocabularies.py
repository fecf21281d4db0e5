"""Models of several vocabularies, merged token by token; their tokenizers written, loaded, and compared."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokens import Models, bpe, content, loaded, row_of, turned, unigram, wordpiece

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats.vocabularies import OfVocabulary, Rows
from cfmerge.models.deltas import Dense, Factors

EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
TURNED = turned(bpe())
MADE = {"bpe": bpe, "wordpiece": wordpiece, "unigram": unigram}


@pytest.fixture
def model(make_model, tmp_path, llama_config):
    config = {key: value for key, value in llama_config.items() if key != "vocab_size"}
    return Models(make_model, tmp_path, config)


def row(tensors, tokenizer, token):
    return tensors[EMBED][tokenizer.token_to_id(token)]


def check(tensors, expected):
    """All three tensors of tokens, against `{row: values}`."""
    for number, values in expected.items():
        np.testing.assert_allclose(tensors[EMBED][number], values, rtol=1e-6)
        np.testing.assert_allclose(tensors[HEAD][number], 2 * np.asarray(values), rtol=1e-6)
        np.testing.assert_allclose(tensors[BIAS][number], values[0], rtol=1e-6)


def merged(base, experts, out, method="average", **options):
    return cfmerge.merge(base, experts, method, output=out, **options)


def test_models_of_one_tokenizer_stay_as_they_are(model, tmp_path):
    base, *experts = [model(f"m{n}", bpe(), number=n) for n in range(3)]
    plan = cfmerge.plan(base, experts, "average")
    assert not any(isinstance(source, OfVocabulary) for source in (plan.base, *plan.experts))
    assert not plan.edits
    for vocabulary in ("base", "union"):
        assert not cfmerge.plan(base, experts, "average", vocabulary=vocabulary).edits


def test_the_same_tokens_under_other_ids_are_merged_by_token(model, tmp_path, load):
    base, one, two = model("base", bpe()), model("one", TURNED, number=1), model("two", bpe(), number=2)
    result = merged(base, [one, two], tmp_path / "out")
    check(load(tmp_path / "out"), {n: row_of(token, 1.5) for token, n in bpe().get_vocab().items()})
    assert any("28 tokens have other ids than in the base" in note for note in result.notes)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_pieces_of_permuted_tensors(model, tmp_path, load, monkeypatch):
    """The rows come in pieces that begin and end within one."""
    from cfmerge.engine import cutting

    base, experts = model("base", bpe()), [model("one", TURNED, number=1), model("two", bpe(), number=2)]
    merged(base, experts, tmp_path / "whole")
    monkeypatch.setattr(cutting, "ENTRIES", 4)
    merged(base, experts, tmp_path / "cut")
    for name, tensor in load(tmp_path / "whole").items():
        np.testing.assert_array_equal(tensor, load(tmp_path / "cut")[name])


@pytest.mark.parametrize("kind", MADE)
def test_a_union_has_every_token_and_encodes_as_the_donors_do(model, tmp_path, load, kind):
    make = MADE[kind]
    count = make().get_vocab_size()
    base = model("base", make(), rows=count + 5)
    one = model("one", make(["<x>", "<y>"]), rows=count + 7, number=1)
    two = model("two", make(["<y>", "<z>"]), rows=count + 6, number=2)
    result = merged(base, [one, two], tmp_path / "out", vocabulary="union")
    found, made = load(tmp_path / "out"), loaded(tmp_path / "out")
    assert [made.token_to_id(token) for token in ("<x>", "<y>", "<z>")] == [count, count + 1, count + 2]
    assert len(found[EMBED]) == count + 5  # padding took the new tokens
    expected = {number: row_of(token, 1.5) for token, number in make().get_vocab().items()}
    expected |= {count: row_of("<x>", 1), count + 1: row_of("<y>", 1.5), count + 2: row_of("<z>", 2)}
    check(found, expected)
    text = "abc ab <x> c<y>a"
    assert made.encode(text).tokens == make(["<x>", "<y>"]).encode(text).tokens
    assert made.encode("ab <z> c").tokens == make(["<y>", "<z>"]).encode("ab <z> c").tokens
    assert any("the output has 3 tokens more than the base" in note for note in result.notes)
    assert not any("vocab_size" in note for note in result.notes)  # the output's is no model's of these


def test_a_union_beyond_the_padding_has_more_rows(model, tmp_path, load):
    base, one = model("base", bpe()), model("one", bpe(["<x>", "<y>"]), number=1)
    merged(base, [one, model("two", bpe(), number=3)], tmp_path / "out", vocabulary="union")
    found = load(tmp_path / "out")
    assert [len(found[name]) for name in (EMBED, HEAD, BIAS)] == [31, 31, 31]
    check(found, {29: row_of("<x>", 1), 30: row_of("<y>", 1), 1: row_of("a", 2)})
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 31


def test_files_of_tokens_are_kept_in_step(model, tmp_path):
    base, one = model("base", bpe(["<s>"])), model("one", bpe(["<s>", "<x>"]), number=1)
    (base / "added_tokens.json").write_text(json.dumps({"<s>": 29}))
    decoder = {"29": {"content": "<s>", **dict.fromkeys(["lstrip", "rstrip", "single_word", "normalized"], False),
                     "special": True}}  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "model_max_length": 9}))
    merged(base, [one, model("two", bpe(["<s>"]), number=2)], tmp_path / "out", vocabulary="union")
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == {"<s>": 29, "<x>": 30}
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["model_max_length"] == 9
    assert told["added_tokens_decoder"] == {**decoder, "30": {**decoder["29"], "content": "<x>"}}


def test_transformers_loads_the_union(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, one = model("base", bpe(["<s>"])), model("one", bpe(["<s>", "<x>"]), number=1)
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    merged(base, [one, model("two", bpe(["<s>"]), number=2)], tmp_path / "out", vocabulary="union")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.convert_tokens_to_ids(["<s>", "<x>"]) == [29, 30]
    assert made("abc <x> a")["input_ids"] == bpe(["<s>", "<x>"]).encode("abc <x> a").ids


def test_an_expert_s_vocabulary(model, tmp_path, load):
    """Its ids, its tokenizer; the configs' ids follow, and rows are never fewer than the base's."""
    base = model("base", bpe(["<pad>"]), rows=32, pad_token_id=29, bos_token_id=1)
    (base / "merges.txt").write_text("a b")
    one = model("one", turned(bpe(["<x>"])), number=1)
    result = merged(base, [one, model("two", bpe(["<pad>"]), number=2)], tmp_path / "out", vocabulary="one")
    found, made = load(tmp_path / "out"), loaded(tmp_path / "out")
    assert len(found[EMBED]) == 32
    check(found, {made.token_to_id(token): row_of(token, 1.5) for token in ("a", "abc", "<unk>")})
    check(found, {made.token_to_id("<x>"): row_of("<x>", 1)})
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/merges.txt").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["vocab_size"]) == (27, 29, 32)
    assert any("the output lacks 1 tokens of the base, '<pad>'" in note for note in result.notes)


def test_extra_tokens_are_not_dropped_in_silence(model, tmp_path, load):
    base, one = model("base", bpe()), model("one", bpe(["<x>"]), number=1)
    two = model("two", bpe(), number=3)
    with pytest.raises(CfmergeError, match=r"expert 'one' .* has 1 tokens that the base lacks, '<x>', and 30 rows of "
                       r"embeddings, the base 29\. .*--vocabulary union; .*--vocabulary base"):  # fmt: skip
        cfmerge.plan(base, [one, two], "average")
    merged(base, [one, two], tmp_path / "out", vocabulary="base")
    check(load(tmp_path / "out"), {n: row_of(token, 2) for token, n in bpe().get_vocab().items()})
    assert len(load(tmp_path / "out")[EMBED]) == 29


def test_extra_tokens_in_padding_are_left_out_with_a_note(model, tmp_path, load):
    base, one = model("base", bpe(), rows=31), model("one", bpe(["<x>"]), rows=31, number=1)
    result = merged(base, [one, model("two", bpe(), rows=31, number=3)], tmp_path / "out")
    assert any("1 tokens that the base lacks are left out" in note and "--vocabulary union" in note
               for note in result.notes)  # fmt: skip
    np.testing.assert_array_equal(load(tmp_path / "out")[EMBED][29], [-7, -7, -7])


def test_padding_of_another_length(model, tmp_path, load):
    """The same tokens, other numbers of rows: the base's stays."""
    base = model("base", bpe(), rows=31)
    result = merged(base, [model("one", bpe(), rows=34, number=1), model("two", bpe(), rows=30, number=2)],
                    tmp_path / "out")  # fmt: skip
    found = load(tmp_path / "out")
    assert len(found[EMBED]) == 31
    check(found, {1: row_of("a", 1.5)})
    np.testing.assert_array_equal(found[EMBED][29:], np.full((2, 3), -7))
    assert sum("they differ in padding" in note for note in result.notes) == 2


def test_a_token_that_an_expert_lacks_has_the_base_s_row(model, tmp_path, load):
    base, one = model("base", bpe(["<s>"])), model("one", bpe(), number=1)
    merged(base, [one, model("two", bpe(["<s>"]), number=3)], tmp_path / "out", vocabulary="base")
    check(load(tmp_path / "out"), {29: row_of("<s>", 1.5), 1: row_of("a", 2)})


def test_a_tied_output_layer_follows(model, tmp_path, load, make_model, llama_config):
    """The base stores one table, an expert both."""
    config = {**llama_config, "tie_word_embeddings": True, "vocab_size": 29}
    ids = bpe().get_vocab()
    table = np.stack([row_of(token, 0) for token in sorted(ids, key=ids.get)]).astype("f")
    base = make_model(tmp_path / "base", {EMBED: table}, config)
    turned = Tokenizer.from_str(json.dumps(TURNED)).get_vocab()
    theirs = np.stack([row_of(token, 1) for token in sorted(turned, key=turned.get)]).astype("f")
    one = make_model(tmp_path / "one", {EMBED: theirs, HEAD: theirs.copy()}, config)
    two = make_model(tmp_path / "two", {EMBED: (table + 0.75).astype("f")}, config)
    for path, told in ((base, content(bpe())), (one, TURNED), (two, content(bpe()))):
        (path / "tokenizer.json").write_text(json.dumps(told))
    merged(base, [one, two], tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == {EMBED}
    np.testing.assert_allclose(found[EMBED], table + 0.5, rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(model):
    base, two = model("base", bpe(), rows=32), model("two", bpe(), rows=32)
    one = model("one", wordpiece(), rows=32, number=1)
    for vocabulary in (None, "union", "base", "one"):
        with pytest.raises(CfmergeError, match=r"expert 'one' .* is another than the base's: .* tokens agree"):
            cfmerge.plan(base, [one, two], "average", vocabulary=vocabulary)


def test_ids_with_a_hole_are_refused(model):
    told = content(bpe(["<x>"]))
    told["added_tokens"][0]["id"] = 40
    base, two = model("base", bpe()), model("two", bpe(), number=2)
    one = model("one", told, rows=41, number=1)
    with pytest.raises(
        CfmergeError, match=r"expert 'one': .*tokenizer.json: the added token '<x>' is declared with id 40"
    ):
        cfmerge.plan(base, [one, two], "average", vocabulary="union")


def test_sentencepiece_alone_is_refused_where_it_matters(model):
    paths = [model(f"m{n}", bpe(), number=n) for n in range(3)]
    for path in paths:
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(b"pieces")
    cfmerge.plan(paths[0], paths[1:], "average")
    (paths[1] / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(CfmergeError, match=r"tokenizer.model: its tokens cannot be read .*save a fast tokenizer"):
        cfmerge.plan(paths[0], paths[1:], "average")


def test_vocabularies_that_cannot_be(model, tmp_path):
    base, one, two = (model(name, bpe(more), number=n) for n, (name, more) in enumerate(
        [("base", []), ("one", ["<x>"]), ("two", [])]))  # fmt: skip
    with pytest.raises(
        CfmergeError, match=r"vocabulary: expected base, union or an expert's name, found 'unoin'.*union"
    ):
        cfmerge.plan(base, [one, two], "average", vocabulary="unoin")
    with pytest.raises(CfmergeError, match="statistics are kept in the base's vocabulary"):
        cfmerge.accumulate(base, [one, two], "average", output=tmp_path / "sums", vocabulary="union")
    with pytest.raises(CfmergeError, match="side_files names another tokenizer's place"):
        cfmerge.plan(base, [one, two], "average", vocabulary="union", side_files=str(base))
    (base / "tokenizer.json").unlink()
    with pytest.raises(CfmergeError, match=r"base .* has no tokenizer beside it"):
        cfmerge.plan(base, [one, two], "average", vocabulary="union")


# --- the source -----------------------------------------------------------------------------------------------------


class Inner:
    """A source of one table, and of one delta in factors."""

    path, config, files, metadata, side_files, folders, notes, left_out, ties = (None,) * 9

    def __init__(self, table, factors):
        from types import SimpleNamespace

        from cfmerge.formats.base import TensorInfo

        self.table, self.factors = table, factors
        self.tensors = {"t": TensorInfo(table.shape, table.dtype, None)}
        self.prepare = SimpleNamespace

    def read(self, name, first=0, count=None):
        return self.table if count is None else self.table.reshape(-1)[first : first + count]

    def delta(self, name, first=0, count=None):
        return self.factors or Dense(self.read(name, first, count))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_source_in_another_vocabulary(axis):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 2)), rng.standard_normal((2, 4))
    table, index = left @ right, np.array([3, -1, 0, 0, 2, -1])
    wanted = np.moveaxis(np.take(table, np.where(index < 0, 0, index), axis), axis, 0).copy()
    wanted[index < 0] = 9
    wanted = np.moveaxis(wanted, 0, axis)
    rest = table.shape[1 - axis]
    source = OfVocabulary(
        Inner(table, None), {"t": Rows(axis, index)}, lambda name, rows: np.full((len(rows), rest), 9.0)
    )
    assert source.tensors["t"].shape == wanted.shape
    np.testing.assert_array_equal(source.read("t"), wanted)
    for first, count in ((0, 3), (4, 9), (wanted.size - 2, 2)):
        np.testing.assert_array_equal(source.read("t", first, count), wanted.reshape(-1)[first : first + count])
        assert isinstance(source.delta("t", first, count), Dense)
    factored = OfVocabulary(Inner(table, Factors(left, right)), {"t": Rows(axis, index)}, None)
    delta = np.where(wanted == 9, 0, wanted)
    np.testing.assert_allclose(factored.delta("t").product, delta)
    np.testing.assert_allclose(factored.delta("t", 3, 7).product, delta.reshape(-1)[3:10])
