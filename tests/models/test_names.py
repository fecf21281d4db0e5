"""Known renames, wrapping prefixes, heads, buffers, embeddings, packed experts, and names told as patterns."""

import numpy as np
import pytest

from cfmerge.models import Kind, classify, is_buffer
from cfmerge.models.heads import is_head, is_output_layer, may_be_head
from cfmerge.models.mixtures import other_form
from cfmerge.models.patterns import patterns, tell
from cfmerge.models.renames import canonical, pair

SAME = [  # the same tensor in two versions of a library, or as a framework wraps it
    ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ("encoder.layer.0.attention.output.LayerNorm.beta", "encoder.layer.0.attention.output.LayerNorm.bias"),
    ("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
    ("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
    ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("vision_tower.vision_model.encoder.layers.0.fc.weight", "model.vision_tower.encoder.layers.0.fc.weight"),
    ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ("image_newline", "model.image_newline"),
    ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
    ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
    ("vision_model.patch_embedding.weight", "model.vision_model.patch_embedding.weight"),
    ("text_model.model.norm.weight", "model.text_model.norm.weight"),
    ("model.layers.0.block_sparse_moe.experts.3.w3.weight", "model.layers.0.mlp.experts.3.up_proj.weight"),
    ("model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.block_sparse_moe.experts.gate_up_proj"),
    ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    ("vit.encoder.layer.2.attention.attention.query.weight", "vit.layers.2.attention.q_proj.weight"),
    ("vit.encoder.layer.2.output.dense.bias", "vit.layers.2.mlp.fc2.bias"),
    ("module._orig_mod.layers.0.weight", "layers.0.weight"),
    ("model.module.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
    ("base_model.model.model.norm.weight", "model.norm.weight"),
    ("base_model.model.layers.0.q_proj.base_layer.weight", "layers.0.q_proj.weight"),
    ("backbone.embedding.weight", "backbone.embeddings.weight"),
    ("0.auto_model.encoder.layer.0.x.weight", "layers.0.x.weight"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_a_tensor_are_one(one, other):
    assert canonical(one) == canonical(other)


def test_names_that_no_library_renamed_stay():
    for name in ("stages.0.blocks.1.gamma", "model.layers.0.mlp.gate_proj.weight", "text_model.decoder.layers.0.w"):
        assert canonical(name) == name


def shapes(*names, size=4):
    return dict.fromkeys(names, (size, size))


LAYERS = [f"layers.{n}.{x}.weight" for n in range(2) for x in ("q", "k", "up")]


@pytest.mark.parametrize("base", ["", "model.", "encoder.inner."])
@pytest.mark.parametrize("expert", ["", "module.", "0.auto_model.", "base_model.model.", "a.b.c.", "module._orig_mod."])
def test_wrappers_are_seen_through_at_any_depth(base, expert):
    """As many as there are, around the expert's names or the base's."""
    ours, theirs = shapes(*(base + n for n in LAYERS)), shapes(*(expert + base + n for n in LAYERS))
    wanted = {base + n: expert + base + n for n in LAYERS}
    assert pair(ours, theirs).sources == wanted
    assert pair(theirs, ours).sources == {b: a for a, b in wanted.items()}


def test_parts_may_have_prefixes_of_their_own():
    ours = shapes(*(f"a.{n}" for n in LAYERS)) | shapes(*(f"b.{n}.x" for n in LAYERS))
    theirs = shapes(*(f"one.a.{n}" for n in LAYERS)) | shapes(*(f"two.b.{n}.x" for n in LAYERS))
    found = pair(ours, theirs)
    assert found.sources == {name: ("one." if name[0] == "a" else "two.") + name for name in ours}
    assert len(found.told) == 2


def test_two_parts_that_fit_alike_are_not_guessed():
    """Layers without a prefix, and two towers that they could belong to."""
    ours = shapes(*(f"{tower}.{n}" for tower in ("text", "vision") for n in LAYERS))
    found = pair(ours, shapes(*LAYERS))
    assert found.sources == {}
    assert len(found.ambiguous) == 2
    ours |= dict.fromkeys([f"text.{n}" for n in LAYERS], (9, 9))  # of another shape: one is left
    assert found.sources != pair(ours, shapes(*LAYERS)).sources == {f"vision.{n}": n for n in LAYERS}


def test_one_name_that_ends_as_another_is_no_prefix():
    """What an expert lacks and what it has besides are not paired for a single name's sake."""
    ours, theirs = shapes(*LAYERS, "one.a.w", "u.v.w", "x.y.w"), shapes(*LAYERS, "a.w", "c.w", "d.e.w")
    assert set(pair(ours, theirs).sources) == set(LAYERS)


def test_renames_do_not_join_two_tensors_of_one_model():
    both = shapes("x.LayerNorm.gamma", "x.LayerNorm.weight")
    assert pair(both, both).sources == {name: name for name in both}
    assert pair(both, shapes("x.LayerNorm.weight")).sources == {"x.LayerNorm.weight": "x.LayerNorm.weight"}


# --- kinds --------------------------------------------------------------------------------------------------------


def kinds(rows, config=None):
    found = classify({name: (shape, "float32") for name, shape in rows.items()}, config)
    return {name: (p.kind, p.layout) for name, p in found.items()}


def test_a_wrapper_called_embedder_holds_matrices():
    dense = [
        "conditioner.embedders.0.transformer.layers.0.mlp.fc1.weight", "embedding_model.layers.0.q_proj.weight",
        "time_embed.0.weight", "time_embedding.linear_1.weight", "add_embedding.linear_2.weight", "x_embedder.weight",
        "context_embedder.weight", "embed_proj.weight", "embeddings_project.weight", "patch_embed.proj.weight",
        "time_text_embed.timestep_embedder.linear_1.weight", "encoder.embedding_hidden_mapping_in.weight",
        "params/embedding/kernel", "label_embed.weight",
    ]  # fmt: skip
    found = kinds(dict.fromkeys(dense, (24, 16)) | {"label_embed.bias": (24,)})
    assert {name for name in dense if found[name][0] is not Kind.MATRIX} == set()


def test_tables_are_embeddings_wherever_they_lie():
    tables = [
        "embedder.embeddings.word_embeddings.weight", "model.embed_tokens_per_layer.weight", "wte.weight",
        "decoder.embed_tokens.0.weight", "params/embedder/input_embedding", "x.relative_attention_bias.weight",
        "relative_position_bias_table", "transformer.output_layer.weight", "lm_head.decoder.weight", "tok_emb.weight",
    ]  # fmt: skip
    found = kinds(dict.fromkeys(tables, (24, 16)))
    assert {name for name in tables if found[name][0] is not Kind.EMBEDDING} == set()


@pytest.mark.parametrize(
    "name",
    ["fc.weight", "module.fc.bias", "resnet.fc.weight", "_fc.weight", "head.fc.weight", "last_linear.weight",
     "head_dist.weight", "heads.head.weight", "classif.weight", "logits.weight", "AuxLogits.fc.weight"],
)  # fmt: skip
def test_heads_of_timm_and_torchvision(name):
    assert is_head(name)
    assert kinds({name: (10, 8)})[name][0] is Kind.HEAD


@pytest.mark.parametrize(
    "name",
    ["layers.0.mlp.fc.weight", "mlp.fc1.weight", "layer1.0.se.fc.weight", "fc1.weight", "head.norm.weight",
     "head.pre_logits.fc.weight", "text_model.head.weight"],
)  # fmt: skip
def test_fc_inside_a_network_is_no_head(name):
    assert not may_be_head(name)
    assert kinds({name: (10, 8)})[name] == (Kind.MATRIX, "oi")


def test_only_the_last_layer_of_a_sequence_is_a_head():
    """VGG's classifier: two large dense layers of the trunk, and the classes."""
    names = [f"classifier.{n}.weight" for n in (0, 3, 6)]
    assert [is_head(name, names) for name in names] == [False, False, True]
    assert all(may_be_head(name) for name in names)  # where the models do not share them


def test_a_last_layer_is_known_by_its_outputs():
    assert is_output_layer("proj_out.weight", (10, 8), (3, 8))
    assert is_output_layer("out.bias", (10,), (3,))
    assert not is_output_layer("proj_out.weight", (10, 8), (10, 4))
    assert not is_output_layer("layers.0.up.weight", (10, 8), (3, 8))
    assert not is_output_layer("norm.weight", (10,), (3,))
    assert not is_output_layer("shared.weight", (10, 8), (11, 8))


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached", "text_model.embeddings.position_ids",
    "layers.0.attn.relative_position_index", "layers.1.blocks.1.attn_mask", "h.0.attn.causal_mask",
    "bn1.num_batches_tracked", "embeddings.token_type_ids", "feature.mel_filters", "stft.window", "alibi",
    "decoder.embed_positions.weights", "betas", "sqrt_one_minus_alphas_cumprod", "pos_encoder.pe",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    "drop/rngs/key/value", "rngs/default/count/value", "attention.rngs.dropout.key",
]  # fmt: skip


def test_buffers_are_known_whatever_their_dtype():
    for dtype in ("float32", "float16", "int64"):
        found = classify(dict.fromkeys(BUFFERS, ((4, 4), dtype)))
        assert {p.kind for p in found.values()} == {Kind.OTHER}
    for name in ("mask_token", "layers.0.beta", "text_mask_proj.weight", "logit_scale", "layers.0.attn.bias"):
        assert not is_buffer(name, (4, 4))


# --- mixtures -----------------------------------------------------------------------------------------------------

E, F, D = 3, 5, 8
AT = "model.layers.0.mlp.experts."


@pytest.mark.parametrize("first", ["in", "out"])
@pytest.mark.parametrize(("f", "config"), [(F, {}), (D, {}), (D // 2, {}), (F, {"text_config": {"hidden_size": D}})])
def test_packed_experts_have_the_layout_that_their_partner_shows(first, f, config):
    """Also where a matrix is square."""
    up, down = ((E, D, 2 * f), (E, f, D)) if first == "in" else ((E, 2 * f, D), (E, D, f))
    layout = "bio" if first == "in" else "boi"
    found = kinds({f"{AT}gate_up_proj": up, f"{AT}down_proj": down, f"{AT}gate_up_proj_bias": (E, 2 * f)}, config)
    assert found[f"{AT}gate_up_proj"] == (Kind.MATRIX, layout)
    assert found[f"{AT}down_proj"] == (Kind.MATRIX, layout)
    assert found[f"{AT}gate_up_proj_bias"] == (Kind.VECTOR, "")


def test_a_packed_array_alone_goes_by_the_config():
    alone = {f"{AT}down_proj": (E, F, D)}
    assert kinds(alone, {"hidden_size": D})[f"{AT}down_proj"][1] == "bio"
    assert kinds(alone, {"hidden_size": F})[f"{AT}down_proj"][1] == "boi"
    assert kinds(alone, {"model_type": "gpt_oss"})[f"{AT}down_proj"][1] == "bio"
    assert kinds(alone)[f"{AT}down_proj"] == (Kind.VECTOR, "")


def split(rng):
    sizes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return {f"{AT}{e}.{w}.weight": rng.standard_normal(s) for e in range(E) for w, s in sizes.items()}


def pack(tensors, layout, by_turns):
    def both(e):
        gate, up = (tensors[f"{AT}{e}.{w}_proj.weight"] for w in ("gate", "up"))
        return np.stack([gate, up], 1).reshape(2 * F, D) if by_turns else np.concatenate([gate, up])

    up = np.stack([both(e) for e in range(E)])
    down = np.stack([tensors[f"{AT}{e}.down_proj.weight"] for e in range(E)])
    turned = [a if layout == "boi" else a.transpose(0, 2, 1) for a in (up, down)]
    return {f"{AT}gate_up_proj": turned[0], f"{AT}down_proj": turned[1]}


def headers(tensors):
    return {name: (tensor.shape, "float64") for name, tensor in tensors.items()}


@pytest.mark.parametrize(("layout", "family"), [("boi", "qwen3_moe"), ("bio", "llama4"), ("bio", "gpt_oss")])
def test_packed_and_split_experts_are_views_of_one_another(layout, family):
    config = {"model_type": family}
    loose = split(np.random.default_rng(0))
    packed = pack(loose, layout, family == "gpt_oss")
    assert other_form(headers(loose), headers(loose), config, config) == {}
    for base, expert in ((loose, packed), (packed, loose)):
        views = other_form(headers(base), headers(expert), config, config)
        assert set(views) == set(base)
        for name, view in views.items():
            made = view.make(expert.__getitem__)
            assert made.shape == view.shape
            np.testing.assert_array_equal(made, base[name])
            piece = view.flat(expert.__getitem__, 3, made.size // 2)  # across two experts
            np.testing.assert_array_equal(piece, base[name].reshape(-1)[3 : 3 + made.size // 2])


# --- patterns -----------------------------------------------------------------------------------------------------


def test_names_are_told_as_patterns():
    layers = [f"model.layers.{n}.mlp.up.weight" for n in range(32)]
    (one,) = patterns(layers, ["model.norm.weight", "model.layers.0.q.weight"])
    assert str(one) == "model.layers.{0..31}.mlp.up.weight (32 tensors)"
    assert one.glob == "model.layers.*.mlp.up.weight"
    part = [f"first_stage_model.{a}.{n}.weight" for a in "xyz" for n in range(9)]
    (two,) = patterns(part, ["model.a.weight"])
    assert (two.glob, len(two.names)) == ("first_stage_model.*", 27)
    assert tell([*layers, *part], ["model.layers.0.q.weight"]) == f"{one}, {two}"


def test_a_pattern_takes_no_other_tensor():
    """The glob of layers 1 and 3 would take layer 2."""
    found = patterns(["a.1.w", "a.3.w"], ["a.2.w"])
    assert [pattern.glob for pattern in found] == ["a.1.w", "a.3.w"]
    layers = [f"h.{n}.{x}.w" for n in range(8) for x in "qkv"]
    found = patterns(layers[18:], layers[:18])
    assert [(pattern.glob, len(pattern.names)) for pattern in found] == [("h.6.*", 3), ("h.7.*", 3)]
    (one,) = patterns(layers[:3], layers[3:])
    assert one.glob == "h.0.*"
    assert patterns(["a[0].w"], [])[0].glob == "a[[]0].w"
