"""Merges two SentenceTransformer models in memory, and loads the result back into one.

    python examples/sentence_transformers_merge.py                          makes tiny models and merges those
    python examples/sentence_transformers_merge.py BASE MODEL MODEL -o OUT  merges yours

The tiny models are one random network, which one expert teaches the German names of animals and the other those of
numbers. The figures are the share of words whose translation is nearest to them.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

import cfmerge

WORDS = {
    "animals": {
        "dog": "hund", "cat": "katze", "horse": "pferd", "bird": "vogel", "fish": "fisch", "mouse": "maus",
        "bear": "baer", "cow": "kuh", "sheep": "schaf", "pig": "schwein", "goat": "ziege", "frog": "frosch",
    },
    "numbers": {
        "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fuenf", "six": "sechs",
        "seven": "sieben", "eight": "acht", "nine": "neun", "ten": "zehn", "twelve": "zwoelf", "hundred": "hundert",
    },
}  # fmt: skip


def make_base(folder):
    """A SentenceTransformer with random weights that knows the words above."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only wait for each other
    words = [word for pairs in WORDS.values() for pair in pairs.items() for word in pair]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=5 + len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
    ).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(64)], device="cpu")


def similarities(model, pairs):
    """The cosines of every word with every translation."""
    ours, theirs = (
        model(model.preprocess(list(words)))["sentence_embedding"] for words in (pairs.keys(), pairs.values())
    )
    return torch.nn.functional.normalize(ours, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T


def trained(base, pairs, steps=30):
    """A copy of the base that has learned the pairs: each translation shall be the nearest to its word."""
    model = copy.deepcopy(base).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(20 * similarities(model, pairs), torch.arange(len(pairs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def found(model, pairs):
    return (similarities(model, pairs).argmax(1) == torch.arange(len(pairs))).float().mean().item()


def merged_of(base, experts):
    """The base with the merged weights in it."""
    weights = cfmerge.merge_state_dicts(base, experts, "ties")
    model = copy.deepcopy(base).eval()
    model.load_state_dict(weights)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="base, then experts")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.models:
        if not arguments.output:
            parser.error("say where the merged model goes: -o OUT")
        base, *experts = (SentenceTransformer(path, device="cpu") for path in arguments.models)
        merged_of(base, experts).save(str(arguments.output))
        return

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        experts = {topic: trained(base, pairs) for topic, pairs in WORDS.items()}
        merged = merged_of(base, experts)
        print(f"{'':10s}{''.join(f'{topic:>10s}' for topic in WORDS)}")
        for name, model in {"base": base.eval(), **experts, "merged": merged}.items():
            print(f"{name:10s}{''.join(f'{found(model, pairs):10.2f}' for pairs in WORDS.values())}")
        if arguments.output:
            merged.save(str(arguments.output))


if __name__ == "__main__":
    main()
