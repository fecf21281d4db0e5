"""Accuracy of a GPT-2 trunk under an expert's head, as fusion_bench and ACE's code evaluate it.

Pairs are joined without a separator, cut at 512 tokens (the longer of the two first) and padded on the right by the
end-of-text token. Causal attention looks at no padding behind, so a batch is padded to its longest text alone; the head
reads the last token that is no padding.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.models.buffers import is_buffer
from cfmerge_accuracy.published.glue import SETS, Examples
from cfmerge_accuracy.published.tensors import finite

LENGTH = 512
PREFIX = "transformer."
HEAD = "score.weight"


class Counted(NamedTuple):
    """Right answers of a number of examples, and the seconds that they took."""

    correct: int
    examples: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples


def trunk_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a model but for its heads and buffers, without the prefix that not all models have.

    Raises:
        CfmergeError: one holds NaN or infinity.
    """
    opened = cfmerge.open(path)
    return {bare: finite(path, name, opened[name]) for bare, name in _trunk(opened.tensors).items()}


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `trunk_of` reads."""
    tensors = cfmerge.open_checkpoint(path).tensors
    return {bare: tuple(tensors[name].shape) for bare, name in _trunk(tensors).items()}


def _trunk(tensors: Mapping[str, Any]) -> dict[str, str]:
    """`{name without the prefix: name}` of a trunk."""
    stored = {name.removeprefix(PREFIX): name for name in tensors}
    return {
        bare: name
        for bare, name in stored.items()
        if bare not in (HEAD, "lm_head.weight") and not is_buffer(bare, tensors[name].shape)
    }


def tokenizer_of(base: Path) -> Any:
    """The base's tokenizer; its padding is its unknown token, which is GPT-2's end of text.

    Raises:
        CfmergeError: the folder has none, or none that can be read.
    """
    import transformers

    if not any((base / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CfmergeError(f"{base}: no tokenizer.json and no vocab.json; fetch the whole repository again")
    try:
        made = transformers.AutoTokenizer.from_pretrained(base)
    except Exception as error:  # of the library's, and many kinds
        raise CfmergeError(
            f"{base}: its tokenizer cannot be read: {type(error).__name__}: {error}; fetch the whole repository again"
        ) from None
    made.model_max_length = LENGTH
    made.padding_side = made.truncation_side = "right"
    if made.pad_token is None:
        made.pad_token = made.unk_token or made.eos_token
    if made.pad_token is None:
        raise CfmergeError(f"{base}: its tokenizer has no token for padding, and none for the end of a text")
    return made


def order_of(config: Mapping[str, Any], task: str, path: Path) -> list[int]:
    """For each output of an expert's head the number of GLUE's label.

    Raises:
        CfmergeError: another number of labels, or names that are not the task's.
    """
    wanted = SETS[task].labels
    names = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    if not names:
        return list(range(config.get("num_labels", len(wanted))))
    if len(names) != len(wanted):
        raise CfmergeError(f"{path}: id2label has {len(names)} labels, and {task} has {len(wanted)}")
    plain = [str(names[number]).lower().replace(" ", "_") for number in sorted(names)]
    if all(name in (f"label_{number}", str(number)) for number, name in enumerate(plain)):
        return list(range(len(wanted)))
    if sorted(plain) != sorted(wanted):
        raise CfmergeError(f"{path}: id2label is {', '.join(plain)}; the labels of {task} are {', '.join(wanted)}")
    return [wanted.index(name) for name in plain]


def check_expert(path: Path, task: str, padding: int | None) -> None:
    """Raises `CfmergeError` if an expert's head or config does not fit its task; reads headers alone."""
    config = config_of(path)
    shape = cfmerge.open_checkpoint(path).tensors
    if HEAD not in shape:
        raise CfmergeError(f"{path}: has no {HEAD}: it is no GPT2ForSequenceClassification")
    order = order_of(config, task, path)
    found = shape[HEAD].shape
    if found[0] != len(SETS[task].labels) or len(order) != found[0]:
        raise CfmergeError(f"{path}: {HEAD} has {found[0]} outputs, and {task} has {len(SETS[task].labels)} labels")
    told = config.get("pad_token_id")
    if None not in (told, padding) and told != padding:
        raise CfmergeError(
            f"{path}: its config's pad_token_id is {told}, and the base's tokenizer pads by {padding}: the head would "
            "read another token than the last one"
        )


def config_of(path: Path) -> dict[str, Any]:
    """A model's config.

    Raises:
        CfmergeError: it has none, or none that can be read.
    """
    try:
        return dict(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise CfmergeError(f"{path}: its config.json cannot be read: {error}") from None


def classifier(trunk: Mapping[str, np.ndarray], expert: Path, padding: int) -> Any:
    """A trunk under an expert's head and config, in PyTorch.

    Raises:
        CfmergeError: the trunk's tensors are not those of the config's model.
    """
    import torch
    import transformers

    state = {PREFIX + name: torch.tensor(value) for name, value in trunk.items()}
    state[HEAD] = torch.tensor(finite(expert, HEAD, cfmerge.open(expert)[HEAD]))
    try:
        config = transformers.GPT2Config.from_pretrained(expert)
        config.num_labels = state[HEAD].shape[0]
        config.pad_token_id = padding
        model = transformers.GPT2ForSequenceClassification(config).eval()
        found = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CfmergeError(f"{expert}: its config.json does not fit its tensors: {error}") from None
    if found.missing_keys or found.unexpected_keys:
        raise CfmergeError(
            f"{expert}: its config does not fit the merged tensors; missing: "
            f"{', '.join(found.missing_keys) or 'none'}; more: {', '.join(found.unexpected_keys) or 'none'}"
        )
    return model


def count(
    model: Any, tokenizer: Any, examples: Examples, order: Sequence[int], batch: int = 32, device: str = "cpu"
) -> Counted:
    """Right answers of a classifier; `order` has the label of each of its outputs."""
    started = time.monotonic()
    predicted = predict(model, tokenizer, examples.texts, batch, device)
    correct = sum(order[found] == label for found, label in zip(predicted, examples.labels, strict=True))
    return Counted(correct, len(examples.labels), time.monotonic() - started)


def predict(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], batch: int, device: str) -> list[int]:
    """The largest output for each text, computed in batches of about one length."""
    import torch

    encoded = [tokenizer(*text, truncation=True)["input_ids"] for text in texts]
    by_length = sorted(range(len(encoded)), key=lambda number: -len(encoded[number]))
    found = [0] * len(encoded)
    model.to(device)
    with torch.inference_mode():
        for first in range(0, len(by_length), batch):
            numbers = by_length[first : first + batch]
            padded = tokenizer.pad({"input_ids": [encoded[n] for n in numbers]}, return_tensors="pt").to(device)
            logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
            for number, largest in zip(numbers, logits.argmax(-1).tolist(), strict=True):
                found[number] = largest
    return found
