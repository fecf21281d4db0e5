"""Configs that differ in what changes the meaning of weights are told; all else is silent."""

import pytest
from laid import laid, ones

import cfmerge
from cfmerge.formats import open_checkpoint
from cfmerge.planning.configs import config_notes, differences

TOLD = {
    "rope_theta": ({"rope_theta": 10000.0}, {"rope_theta": 1e6}),
    "rope_theta that only one states": ({}, {"rope_theta": 1e6}),
    "rope_theta in another place": (
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
    "rope scaling": ({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "a nested key": ({"text_config": {"rms_norm_eps": 1e-5}}, {"text_config": {"rms_norm_eps": 1e-6}}),
    "an activation": ({"hidden_act": "gelu"}, {"hidden_act": "silu"}),
    "heads": ({"num_attention_heads": 8, "hidden_size": 64}, {"num_attention_heads": 16, "hidden_size": 64}),
    "key heads": ({"num_attention_heads": 8}, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "a window": ({"sliding_window": 4096}, {"sliding_window": None}),
    "ties": ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    "a key of a new library": ({"warp_factor": 1}, {"warp_factor": 2}),
    "experts at work that one of them does not state": ({"num_experts_per_tok": 2}, {}),
    "a scale that one of them does not state": ({}, {"routed_scaling_factor": 2.5}),
    "a multiplier": ({"embedding_multiplier": 12.0}, {"embedding_multiplier": 1.0}),
}
SILENT = {
    "names": ({"_name_or_path": "a", "architectures": ["A"]}, {"_name_or_path": "b", "architectures": ["B"]}),
    "versions": ({"transformers_version": "4.1", "torch_dtype": "float32"}, {"transformers_version": "5"}),
    "training": ({"hidden_dropout_prob": 0.1, "use_cache": True}, {"hidden_dropout_prob": 0, "use_cache": False}),
    "labels": ({"id2label": {"0": "a"}}, {"id2label": {"0": "b", "1": "c"}, "num_labels": 2}),
    "tokens": ({"eos_token_id": 2}, {"eos_token_id": [2, 3], "pad_token_id": 0}),
    "generation": ({"max_length": 20}, {"max_length": 30, "do_sample": True}),
    "defaults that one of them states": (
        {"num_attention_heads": 8, "hidden_size": 64},
        {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 8, "head_dim": 8, "rope_theta": 10000.0},
    ),
    "rope in another place": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
    ),
    "a key of a new library that one of them lacks": ({}, {"warp_factor": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_told(case):
    base, expert = TOLD[case]
    assert differences(base, {"e": expert})
    assert differences(expert, {"e": base})
    assert differences(base, {"e": base}) == {}


@pytest.mark.parametrize("case", SILENT)
def test_silent(case):
    base, expert = SILENT[case]
    assert differences(base, {"e": expert}) == {}
    assert differences(expert, {"e": base}) == {}


def test_the_values_and_the_experts_that_differ_are_named(family, make_model, tmp_path, llama, llama_config):
    long = make_model(tmp_path / "long", llama(5), llama_config | {"rope_theta": 1e6})
    (tmp_path / "long/preprocessor_config.json").write_text('{"size": 224}')
    (family.base / "preprocessor_config.json").write_text('{"size": 384}')
    plan = cfmerge.make_plan(cfmerge.Recipe(str(family.base), [str(family.experts[0]), str(long)], "average"))
    told, other = (note for note in plan.notes if "differs in what may change" in note)
    assert "rope_theta not stated in the base, 1000000.0 in 'long'" in told
    assert "'m1'" not in told
    assert other.startswith("preprocessor_config.json")


def test_a_config_is_found_wherever_the_transformer_lies(tmp_path):
    """The old layout of sentence-transformers and the new; an expert without a config is not compared."""
    flat = {"model.safetensors": ones("encoder.weight"), "config.json": {"model_type": "bert", "hidden_act": "gelu"}}
    old = {
        "0_Transformer/model.safetensors": ones("encoder.weight", value=2),
        "0_Transformer/config.json": {"model_type": "bert", "hidden_act": "relu"},
        "modules.json": [{"idx": 0, "path": "0_Transformer"}],
    }
    base, expert = open_checkpoint(laid(tmp_path / "a", old)), open_checkpoint(laid(tmp_path / "b", flat))
    bare = open_checkpoint(tmp_path / "b/model.safetensors")
    (note,) = config_notes(base, {"b": expert, "bare": bare})
    assert 'hidden_act "relu" in the base, "gelu" in \'b\'' in note
    assert "bare" not in note
