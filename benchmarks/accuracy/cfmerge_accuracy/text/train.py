"""Fine-tuning in PyTorch, all weights of the encoder or low-rank additions to its kernels, under frozen heads.

PyTorch is asked for by the functions only: whoever has trained experts in the cache needs none.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge_accuracy import processes
from cfmerge_accuracy.text.bert import EMBEDDINGS, MiniLM, from_torch, to_torch
from cfmerge_accuracy.text.data import Texts, drawn_batches
from cfmerge_accuracy.zoo import Params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over the first tenth and a cosine decay to zero.

    With a rank, each kernel `W` `(out, in)` of the encoder stays and gets `2 B A` added: `A` `(rank, in)` is drawn
    and `B` `(out, rank)` starts at zero; biases and norms stay as they are.
    """

    steps: int = 120
    batch: int = 32
    learning_rate: float = 1e-4
    rank: int | None = None
    weight_decay: float = 0.01


LORA_SCALE = 2.0  # alpha / rank


def fine_tune(minilm: MiniLM, texts: Sequence[Texts], heads: Sequence[np.ndarray], recipe: Recipe, seed: int) -> Params:
    """Trains the base on one task or on several together, each text among the classes of its own task's head.

    Args:
        minilm: the base.
        texts: of each task.
        heads: of each task, `(classes, width)`.
        recipe: steps, rates and rank.
        seed: draws the batches and the low-rank additions.

    Returns:
        A tree like the base's.
    """
    torch = pytorch()

    torch.manual_seed(seed)
    model = build(minilm, minilm.encoder)
    trained = add_low_rank(model, recipe.rank) if recipe.rank else unfreeze(model)
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe.steps))
    rows = torch.from_numpy(np.concatenate(heads))
    for ids, lengths, labels, admitted in batches(texts, heads, recipe, seed):
        logits = features(model, ids, lengths) @ rows.T
        loss = torch.nn.functional.cross_entropy(logits.masked_fill(~torch.from_numpy(admitted), -math.inf), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return extract(model, minilm)


def rate(step: int, steps: int) -> float:
    """The share of the learning rate: up within the first tenth, then a quarter wave of a cosine down to zero."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batches(
    texts: Sequence[Texts], heads: Sequence[np.ndarray], recipe: Recipe, seed: int
) -> Iterator[tuple[Any, Any, Any, np.ndarray]]:
    """Ids, lengths, labels that count through the heads' rows, and which of the rows each text may choose from."""
    torch = pytorch()

    group = np.repeat(np.arange(len(heads)), [len(head) for head in heads])
    first = np.concatenate([[0], np.cumsum([len(head) for head in heads])])
    ids = np.concatenate([one.ids for one in texts])
    lengths = np.concatenate([one.lengths for one in texts])
    labels = np.concatenate([one.labels + start for one, start in zip(texts, first, strict=False)]).astype(np.int64)
    for drawn in drawn_batches(lengths, recipe.batch, recipe.steps, np.random.default_rng(seed)):
        cut = ids[drawn, : lengths[drawn].max()].astype(np.int64)
        admitted = group[None, :] == group[labels[drawn]][:, None]
        yield torch.from_numpy(cut), torch.from_numpy(lengths[drawn]), torch.from_numpy(labels[drawn]), admitted


def pytorch() -> Any:
    """PyTorch, with two threads, so that sums are added up alike everywhere, that sleep while they wait.

    Where other work runs beside it, threads that spin while they wait make it five times as slow.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError as error:
        raise CfmergeError("the text suite trains in PyTorch: pip install torch transformers") from error
    torch.set_num_threads(2)
    return torch


# --- the model in PyTorch -----------------------------------------------------------------------------------------


def build(minilm: MiniLM, params: Params) -> Any:
    """Transformers' BertModel with the base's embeddings and these parameters: no dropout, everything frozen."""
    pytorch()
    from transformers import BertConfig, BertModel

    shape, (words, positions, types) = minilm.shape, (len(minilm.embeddings[name]) for name in EMBEDDINGS)
    config = BertConfig(
        vocab_size=words,
        max_position_embeddings=positions,
        type_vocab_size=types,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        layer_norm_eps=shape.epsilon,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    put(model, {f"embeddings.{name}": array for name, array in minilm.embeddings.items()})
    put(model, to_torch(params, shape))
    return model


def put(model: Any, state: dict[str, np.ndarray]) -> None:
    """Copies arrays into the model's parameters of these names."""
    torch = pytorch()

    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in state.items():
            own[name].copy_(torch.tensor(array))


def features(model: Any, ids: Any, lengths: Any, half: bool | None = None) -> Any:
    """Unit features `(batch, width)` of token ids `(batch, tokens)`, with bfloat16 products where they are fast."""
    torch = pytorch()

    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16() if half is None else half):
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    kept = mask[..., None].float()
    mean = (hidden.float() * kept).sum(1) / kept.sum(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def has_bfloat16() -> bool:
    """Whether this processor has products of bfloat16: in tiles four times as fast as float32, in vectors twice."""
    return processes.vectors() in ("amx_bf16", "avx512_bf16")


def unfreeze(model: Any) -> list[Any]:
    """The encoder's parameters, to be trained; the embeddings stay frozen."""
    return list(model.encoder.requires_grad_(True).parameters())


def add_low_rank(model: Any, rank: int) -> list[Any]:
    """Gives each dense layer of the encoder a product of two thin matrices beside its kernel; returns these."""
    torch = pytorch()

    def beside(layer: Any, inputs: Any, output: Any) -> Any:
        return output + LORA_SCALE * (inputs[0] @ layer.lora_a.T) @ layer.lora_b.T

    made = []
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Linear):
            drawn = torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features)
            layer.lora_a = torch.nn.Parameter(drawn)
            layer.lora_b = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(beside)
            made += [layer.lora_a, layer.lora_b]
    return made


def extract(model: Any, minilm: MiniLM) -> Params:
    """The encoder's tree, with low-rank products added to the kernels in float32."""
    state = {}
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        layer = layers[name.rpartition(".")[0]]
        value = parameter.detach()
        if name.endswith("weight") and hasattr(layer, "lora_a"):
            value = value + LORA_SCALE * (layer.lora_b @ layer.lora_a).detach()
        state[name] = value.numpy()
    return from_torch(state, minilm.shape)
