"""Small tokenizers, built by the tokenizers library, and models with a row for each of their tokens."""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def bpe(extra=(), merges=(("a", "b"), ("ab", "c"))):
    """A BPE tokenizer of letters and merges, with added tokens."""
    words = [*LETTERS, "".join(merges[0]), *("".join(pair) for pair in merges[1:])]
    vocab = {token: number for number, token in enumerate(["<unk>", *words])}
    return _with(Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>")), extra)


def wordpiece(extra=()):
    words = ["[UNK]", "[CLS]", "[SEP]", "ab", "##c", "a", "b", "c", "##b"]
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return _with(made, extra)


def unigram(extra=(), score=-1.0):
    pieces = [("<unk>", 0.0), ("ab", score), ("a", -2.0), ("b", -2.5), ("c", -3.0)]
    return _with(Tokenizer(models.Unigram(pieces, 0)), extra)


def _with(tokenizer, extra):
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    return tokenizer


def content(tokenizer):
    return json.loads(tokenizer.to_str())


def turned(made):
    """The content of a BPE tokenizer whose model's tokens have ids in reverse order."""
    told = content(made)
    told["model"]["vocab"] = {token: number for number, token in enumerate(reversed(told["model"]["vocab"]))}
    return told


class Models:
    """Writes models: `tied` ones have no output layer; a token's row tells the token and the model."""

    def __init__(self, make_model, directory, config):
        self.make, self.directory, self.config = make_model, directory, config

    def __call__(self, name, tokenizer=None, rows=None, number=0, ids=None, tensors=None, **more):
        """A model's directory; `tokenizer` is a `Tokenizer`, or the content of its file."""
        told = content(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
        ids = ids or (Tokenizer.from_str(json.dumps(told)).get_vocab() if told else {})
        rows = rows or len(ids)
        table = np.full((rows, 3), -7.0, np.float32)
        for token, row in ids.items():
            if row < rows:
                table[row] = row_of(token, number)
        own = {
            "model.embed_tokens.weight": table, "lm_head.weight": 2 * table, "lm_head.bias": table[:, 0].copy(),
            "model.layers.0.mlp.up_proj.weight": np.full((4, 3), number, np.float32),
        }  # fmt: skip
        path = self.make(self.directory / name, {**own, **(tensors or {})}, {**self.config, "vocab_size": rows, **more})
        if told:
            (path / "tokenizer.json").write_text(json.dumps(told))
        return path


def row_of(token, number):
    """The row of a token in a model: the base's, and a bit for each model."""
    return np.array([sum(map(ord, token)), len(token), 1]) + 0.25 * number


def loaded(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))
