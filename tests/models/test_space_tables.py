"""Permutation spaces by names: each table proven by transformers, on tiny models whose neurons change their order."""

import numpy as np
import pytest
from space_models import GROUPED, TEXT, config_of, headers_of, outputs, saved, tensors_of, with_tensors

from cfmerge.align import permute, permute_tensor, random_permutations
from cfmerge.models.space_tables import spaces_of

ENCODER = "hidden heads{l} heads{l}.qk heads{l}.v mlp{l}"
MIXTURE = "hidden kv{l} kv{l}.q kv{l}.v"
DECODER = f"{MIXTURE} mlp{{l}}"
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
BIASED = {**GROUPED, "attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
UNTIED = {**TEXT, "tie_word_embeddings": False}
MODELS = [  # (class, its config, the spaces)
    ("BertForSequenceClassification", TEXT, f"{ENCODER} pooler"),
    ("BertForMaskedLM", TEXT, ENCODER),
    ("BertForMaskedLM", UNTIED, ENCODER),
    ("BertForPreTraining", TEXT, f"{ENCODER} pooler"),
    ("BertForTokenClassification", TEXT, ENCODER),
    ("RobertaForSequenceClassification", TEXT, f"{ENCODER} classifier"),
    ("RobertaForMaskedLM", TEXT, ENCODER),
    ("XLMRobertaForQuestionAnswering", TEXT, ENCODER),
    ("ElectraForPreTraining", {**TEXT, "embedding_size": 8}, f"{ENCODER} embedding discriminator"),
    ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}, f"{ENCODER} classifier"),
    ("ElectraForMaskedLM", {**TEXT, "embedding_size": 8}, f"{ENCODER} embedding"),
    ("LlamaForCausalLM", GROUPED, DECODER),
    ("LlamaForCausalLM", {**BIASED, "tie_word_embeddings": True}, DECODER),
    ("LlamaForSequenceClassification", {**TEXT, "num_labels": 3}, DECODER),
    ("MistralForCausalLM", GROUPED, DECODER),
    ("Qwen2ForCausalLM", GROUPED, DECODER),
    ("Qwen3ForCausalLM", HEADS_OF_8, DECODER),
    ("GemmaForCausalLM", {**HEADS_OF_8, "tie_word_embeddings": True}, DECODER),
    ("Gemma2ForCausalLM", HEADS_OF_8, DECODER),
    ("Gemma3ForCausalLM", HEADS_OF_8, DECODER),
    ("Phi3ForCausalLM", GROUPED, DECODER),
    ("OlmoForCausalLM", GROUPED, DECODER),
    ("Olmo2ForCausalLM", GROUPED, DECODER),
    ("GraniteForCausalLM", BIASED, DECODER),
    ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}, f"{MIXTURE} mlp{{l}}:0 mlp{{l}}:1"),
    ("Qwen3MoeForCausalLM", {**HEADS_OF_8, **EXPERTS, "decoder_sparse_step": 2}, f"{MIXTURE} mlp0 mlp1:0 mlp1:1"),
    ("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 10},
     f"{MIXTURE} mlp{{l}}:0 mlp{{l}}:1 mlp{{l}}:shared"),
]  # fmt: skip
CONFIGS = {"Gemma3ForCausalLM": "Gemma3TextConfig"}


def moved(spaces, seed=0):
    """Random permutations, none of which keeps the order."""
    return {
        name: np.where(np.all(order == np.sort(order), axis=-1, keepdims=True), np.roll(order, 1, axis=-1), order)
        for name, order in random_permutations(spaces, seed).items()
    }


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("kind", "settings", "names"), MODELS)
def test_a_model_whose_spaces_are_permuted_computes_the_same(tmp_path, kind, settings, names):
    path = saved(tmp_path / "model", kind, CONFIGS.get(kind), **settings)
    tensors, spaces = tensors_of(path), spaces_of(headers_of(path), config_of(path))
    assert set(spaces.sizes) == {name.format(l=layer) for name in names.split() for layer in range(2)}
    expected = outputs(path, kind)
    permutations = moved(spaces)
    permuted = permute(spaces, tensors, permutations)
    for name, axes in spaces.axes.items():
        sizes = [spaces.sizes[space] for axis in axes for space in axis.spaces]
        assert np.array_equal(permuted[name], tensors[name]) == (max(sizes, default=1) == 1), name
    assert difference(outputs(with_tensors(path, tmp_path / "permuted", permuted), kind), expected) < 1e-5
    for name, order in permutations.items():  # a single matrix of a space is not enough
        if spaces.sizes[name] > 1:
            use = next(use.tensor for use in spaces.uses(name) if tensors[use.tensor].ndim > 1
                       and any(name in axis.spaces for axis in spaces.axes[use.tensor]))  # fmt: skip
            one = {**tensors, use: permute_tensor(spaces, use, tensors[use], {name: order})}
            assert difference(outputs(with_tensors(path, tmp_path / "one", one), kind), expected) > 1e-3, name
