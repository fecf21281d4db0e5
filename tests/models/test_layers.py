"""Layers by names, and what a config says of them."""

import pytest

from cfmerge import CfmergeError
from cfmerge.models.layers import comes_before, edited, layers_of, named, restacked


def names(*stems, count=4):
    return ["embed.weight", "norm.weight", *(f"{stem}{n}.w" for stem in stems for n in range(count))]


def test_a_name_is_its_stem_its_layer_and_the_rest():
    assert named("model.layers.12.mlp.experts.3.w1") == ("model.layers.", 12, ".mlp.experts.3.w1")
    assert named("layers_3/attn/kernel") == ("layers_", 3, "/attn/kernel")
    assert named("model.norm.weight") is None


def test_what_stands_before_the_layers():
    before = (
        "model.embed_tokens.weight", "transformer.wte.weight", "wpe", "shared.weight", "gpt_neox.embed_in.weight",
        "bert.embeddings.LayerNorm.bias", "visual.blocks.3.w", "visual.patch_embed.proj", "vision_model.ln_pre.weight",
    )  # fmt: skip
    behind = ("model.norm.weight", "lm_head.weight", "transformer.ln_f.bias", "embed_out.weight", "score.weight",
              "output.weight", "classifier.bias")  # fmt: skip
    assert [name for name in (*before, *behind) if comes_before(name)] == list(before)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"])
def test_layers_are_those_that_the_config_counts(key):
    assert layers_of(names("h."), {key: 4}, "it") == ("h.", 4, "")
    assert layers_of(names("h."), {"text_config": {key: 4}}, "it") == ("h.", 4, "text_config")


def test_a_tower_of_as_many_layers_is_not_meant():
    assert layers_of(names("visual.blocks.", "model.layers."), {"num_hidden_layers": 4}, "it").stem == "model.layers."


def test_layers_that_cannot_be_seen():
    def fails(words, found, config):
        with pytest.raises(CfmergeError, match=words):
            layers_of(found, config, "base x")

    fails("base x: its config.json does not say how many layers it has.*4 of 'h", names("h."), {})
    fails("does not say how many", names("h."), {"num_hidden_layers": 5})
    fails("none in the tensors' names", names(), {"num_hidden_layers": 4})
    fails("'encoder.*' and 'decoder.*' both are", names("encoder.", "decoder."), {"num_layers": 4})
    fails("both are as many", names("encoder.", "decoder."), {"encoder_layers": 4, "decoder_layers": 4})


def new(config, *layers, count=4):
    return restacked(config, layers_of(names("h.", count=count), config, "it"), layers)


def test_the_count_and_lists_with_an_entry_for_each_layer_follow():
    config = {
        "num_hidden_layers": 4, "layer_types": ["s", "s", "f", "s"], "max_window_layers": 4, "eos_token_id": [1, 2],
        "mlp_only_layers": [1], "sliding_window_pattern": 3, "vocab_size": 4,
    }  # fmt: skip
    other = {**config, "layer_types": ["a", "b", "c", "d"], "mlp_only_layers": []}
    changed = new(config, (config, 0), (config, 1), (other, 2), (config, 1), (other, 0))
    assert changed == {
        "num_hidden_layers": 5, "layer_types": ["s", "s", "c", "s", "a"], "max_window_layers": 5,
        "mlp_only_layers": [1, 3],
    }  # fmt: skip


def test_layers_that_stay_change_nothing():
    config = {"num_hidden_layers": 4, "layer_types": list("sfsf"), "first_k_dense_replace": 3}
    assert new(config, *((config, n) for n in range(4))) == {}
    assert new(config, (config, 0), (config, 1)) == {"num_hidden_layers": 2, "layer_types": ["s", "f"]}


def test_a_nested_section_is_changed_as_a_whole():
    config = {"model_type": "v", "text_config": {"num_hidden_layers": 4, "x": 1}}
    changed = new(config, (config, 0))
    assert edited(config, "text_config", changed) == {"text_config": {"num_hidden_layers": 1, "x": 1}}
    assert config["text_config"]["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("key", "value"), [("first_k_dense_replace", 3), ("hybrid_override_pattern", "M*M-"), ("sliding_window_pattern", 6)]
)
def test_a_rule_by_number_is_refused_where_layers_move(key, value):
    config = {"num_hidden_layers": 4, key: value}
    with pytest.raises(CfmergeError, match=f"'{key}'.*says by its number what a layer is"):
        new(config, (config, 1), (config, 2))
    config[key] = 0
    assert new(config, (config, 1), (config, 2)) == {"num_hidden_layers": 2}


def test_a_list_that_another_model_lacks():
    config = {"num_hidden_layers": 4, "layer_types": list("sfsf")}
    with pytest.raises(CfmergeError, match="'layer_types' has one entry a layer in the base, and no entry for layer 2"):
        new(config, (config, 0), ({"num_hidden_layers": 4}, 2))
