"""Stacks of layers, loaded by transformers: as the model whose modules stand in that order."""

import copy

import pytest
import torch
import transformers

import cfmerge
from cfmerge import Layers, Recipe

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))


def gpt2():
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def qwen2():
    """With a window in some layers alone, which `layer_types` says."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, layer_types=types)
    )


def modules(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("make", [llama, gpt2, qwen2], ids=lambda make: make.__name__)
def test_a_stack_is_the_model_with_its_modules_in_that_order(make, tmp_path):
    torch.manual_seed(0)
    models = {name: make().eval() for name in "ab"}
    if make is llama:  # the head is the embedding: both of the first model, or both of the last
        models["b"].model.embed_tokens.weight.data.copy_(models["a"].model.embed_tokens.weight.data)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    runs = [Layers((1, 3)), Layers((0, 2), base=str(tmp_path / "b")), Layers((1, 2))]
    cfmerge.merge_recipe(Recipe(str(tmp_path / "a"), layers=runs), tmp_path / "out")
    expected = copy.deepcopy(models["a"])
    order = [("a", 1), ("a", 2), ("b", 0), ("b", 1), ("a", 1)]
    stack = torch.nn.ModuleList(copy.deepcopy(modules(models[name])[number]) for name, number in order)
    if make is gpt2:
        expected.transformer.h = stack
    else:
        expected.model.layers = stack
    expected.config.num_hidden_layers = len(order)
    if make is qwen2:
        expected.config.layer_types = [models["a"].config.layer_types[number] for _, number in order]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == len(order)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found, wanted = (one.eval()(tokens, use_cache=False).logits for one in (loaded, expected))
    assert torch.equal(found, wanted)
