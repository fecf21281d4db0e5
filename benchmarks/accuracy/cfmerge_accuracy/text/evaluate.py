"""Logits of a merged model: in Flax in float32, or in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

from cfmerge_accuracy.text import train
from cfmerge_accuracy.text.data import Texts, buckets
from cfmerge_accuracy.text.setting import BATCH, Batch, Setting, embedded, flax_features
from cfmerge_accuracy.zoo import Params, Split

Engine = Literal["flax", "torch"]
Logits = Callable[[Params, str, Split], np.ndarray]


def torch_features(model: Any, texts: Texts, half: bool | None) -> np.ndarray:
    """`(N, width)`; products in bfloat16 or not; None: where that is fast."""
    torch = train.pytorch()

    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for rows, length in buckets(texts.lengths, BATCH, multiple=1):
            ids = torch.from_numpy(texts.ids[rows, :length].astype(np.int64))
            found[rows] = train.features(model, ids, torch.from_numpy(texts.lengths[rows]), half).numpy()
    return found


def flax_engine(setting: Setting) -> Logits:
    """Float32; a split's embeddings are computed when it is first asked for."""

    @cache
    def batches(task: str, split: Split) -> list[Batch]:
        return embedded(setting.minilm, setting.tasks[task].splits[split])

    return lambda params, task, split: (
        flax_features(setting.minilm.module, params, batches(task, split)) @ setting.heads[task].T
    )


def torch_engine(setting: Setting, half: bool | None = None) -> Logits:
    """Transformers' BertModel, into which parameters are put when they change.

    Args:
        setting: base, tasks and heads.
        half: products in bfloat16, or in float32; None: bfloat16 where the processor multiplies it.
    """
    model: Any = None
    last: Params = None

    def built(params: Params) -> Any:
        """With dense layers in bfloat16 if products are: rounded once, and not in every call."""
        made = train.build(setting.minilm, params)
        if train.has_bfloat16() if half is None else half:
            torch = train.pytorch()
            for layer in made.encoder.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.to(torch.bfloat16)
        return made

    def logits(params: Params, task: str, split: Split) -> np.ndarray:
        nonlocal model, last
        model = model or built(params)
        if params is not last:
            train.put(model, train.to_torch(params, setting.minilm.shape))
            last = params
        return torch_features(model, setting.tasks[task].splits[split], half) @ setting.heads[task].T

    return logits


def agree(setting: Setting, params: Params, split: Split = "validation") -> tuple[float, float]:
    """Flax against transformers in float32, over all tasks.

    Returns:
        The largest difference of unit features, and the share of texts for which both choose the same class.
    """
    model = train.build(setting.minilm, params)
    differences, equal = [], []
    for name, task in setting.tasks.items():
        one = flax_features(setting.minilm.module, params, embedded(setting.minilm, task.splits[split]))
        other = torch_features(model, task.splits[split], half=False)
        head = setting.heads[name].T
        differences.append(np.abs(one - other).max())
        equal.append(np.argmax(one @ head, axis=-1) == np.argmax(other @ head, axis=-1))
    return float(max(differences)), float(np.mean(np.concatenate(equal)))
