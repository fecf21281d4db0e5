"""Tensors that are one: the pairs that libraries tie. They say where to look; equal bytes decide.

A model may store a tied tensor once, under either name, or under all of them.
"""

from collections.abc import Collection, Mapping
from typing import Any

_TABLES = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "shared.weight",
    "model.decoder.embed_tokens.weight",
    "model.shared.weight",
    "transformer.word_embeddings.weight",
    "model.language_model.embed_tokens.weight",
)
# (alias, the tensor it is): output layers, tied where config.tie_word_embeddings holds
OUTPUTS = (
    *(("lm_head.weight", table) for table in _TABLES),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("proj_out.weight", "model.decoder.embed_tokens.weight"),  # Whisper
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
)
# Tied whatever the config says, and whatever is in front of both names.
ALWAYS = (
    ("lm_head.decoder.bias", "lm_head.bias"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("predictions.decoder.bias", "predictions.bias"),
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
)
UNTIED_BY_DEFAULT = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox"}


def likely_ties(stored: Collection[str], config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """`{alias: name}`: aliases, stored or not, of tensors that are stored, as metadata, config and family say."""
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = bool(config) and config.get("model_type") not in UNTIED_BY_DEFAULT
    ties = {alias: name for alias, name in metadata.items() if name in stored and alias != name}
    for alias, name in OUTPUTS if tied else ():
        if name in stored:
            ties.setdefault(alias, name)
    for alias, end in ALWAYS:
        for name in stored:
            if name == end or name.endswith("." + end):
                ties.setdefault(name.removesuffix(end) + alias, name)
    return ties


def stated(alias: str, config: Mapping[str, Any]) -> bool:
    """Whether the config itself, not a family's custom, says that an output layer is tied."""
    return config.get("tie_word_embeddings") is True and any(alias == output for output, _ in OUTPUTS)
