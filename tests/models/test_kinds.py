"""Kinds and layouts from names, shapes and config; canonical views."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfmerge.errors import CfmergeError
from cfmerge.models import (
    Kind,
    Parameter,
    check_layout,
    classify,
    from_canonical,
    is_float,
    to_canonical,
)

# What a tensor is, in one word: its kind and layout. `table` is an embedding as a matrix, `loose` one without.
WORDS = {
    "linear": (Kind.MATRIX, "oi"),
    "kernel": (Kind.MATRIX, "io"),  # Flax, Conv1D and plain `x @ w`
    "conv": (Kind.CONVOLUTION, "oiii"),
    "table": (Kind.EMBEDDING, "oi"),
    "loose": (Kind.EMBEDDING, ""),
    "vector": (Kind.VECTOR, ""),
    "head": (Kind.HEAD, "oi"),
    "head bias": (Kind.HEAD, ""),
    "other": (Kind.OTHER, ""),
}
Row = tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], str]

BERT = {
    "embeddings.word_embeddings.weight": ("table", (12, 8)),
    "embeddings.position_embeddings.weight": ("table", (10, 8)),
    "embeddings.token_type_embeddings.weight": ("table", (2, 8)),
    "embeddings.position_ids": ("other", (1, 10), "int64"),
    "embeddings.LayerNorm.weight": ("vector", (8,)),
    "encoder.layer.0.attention.self.query.weight": ("linear", (8, 8)),
    "encoder.layer.0.attention.self.query.bias": ("vector", (8,)),
    "encoder.layer.0.attention.self.key.weight": ("linear", (8, 8)),
    "encoder.layer.0.attention.self.value.weight": ("linear", (8, 8)),
    "encoder.layer.0.attention.output.dense.weight": ("linear", (8, 8)),
    "encoder.layer.0.attention.output.LayerNorm.bias": ("vector", (8,)),
    "encoder.layer.0.intermediate.dense.weight": ("linear", (16, 8)),
    "encoder.layer.0.output.dense.weight": ("linear", (8, 16)),
    "pooler.dense.weight": ("linear", (8, 8)),
}
LLAMA = {
    "model.embed_tokens.weight": ("table", (12, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("linear", (8, 8)),
    "model.layers.0.self_attn.k_proj.weight": ("linear", (4, 8)),
    "model.layers.0.self_attn.o_proj.weight": ("linear", (8, 8)),
    "model.layers.0.mlp.gate_proj.weight": ("linear", (16, 8)),
    "model.layers.0.mlp.down_proj.weight": ("linear", (8, 16)),
    "model.layers.0.input_layernorm.weight": ("vector", (8,)),
    "model.norm.weight": ("vector", (8,)),
}


def gpt2(prefix: str, mask_dtype: str = "float32") -> dict[str, Row]:
    return {
        f"{prefix}wte.weight": ("table", (12, 8)),
        f"{prefix}wpe.weight": ("table", (10, 8)),
        f"{prefix}h.0.ln_1.weight": ("vector", (8,)),
        f"{prefix}h.0.attn.bias": ("other", (1, 1, 10, 10), mask_dtype),
        f"{prefix}h.0.attn.masked_bias": ("other", ()),
        f"{prefix}h.0.attn.c_attn.weight": ("kernel", (8, 24)),
        f"{prefix}h.0.attn.c_attn.bias": ("vector", (24,)),
        f"{prefix}h.0.attn.c_proj.weight": ("kernel", (8, 8)),
        f"{prefix}h.0.attn.c_proj.bias": ("vector", (8,)),
        f"{prefix}h.0.mlp.c_fc.weight": ("kernel", (8, 32)),
        f"{prefix}h.0.mlp.c_fc.bias": ("vector", (32,)),
        f"{prefix}h.0.mlp.c_proj.weight": ("kernel", (32, 8)),
        f"{prefix}h.0.mlp.c_proj.bias": ("vector", (8,)),
        f"{prefix}ln_f.bias": ("vector", (8,)),
    }


T5 = {
    "shared.weight": ("table", (12, 8)),
    "encoder.embed_tokens.weight": ("table", (12, 8)),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("linear", (8, 8)),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("table", (32, 2)),
    "encoder.block.0.layer.0.layer_norm.weight": ("vector", (8,)),
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": ("linear", (16, 8)),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": ("linear", (8, 16)),
    "decoder.block.0.layer.1.EncDecAttention.o.weight": ("linear", (8, 8)),
    "decoder.final_layer_norm.weight": ("vector", (8,)),
    "lm_head.weight": ("table", (12, 8)),
}
VIT = {
    "vit.embeddings.cls_token": ("loose", (1, 1, 8)),
    "vit.embeddings.position_embeddings": ("loose", (1, 5, 8)),
    "vit.embeddings.patch_embeddings.projection.weight": ("loose", (8, 3, 4, 4)),
    "vit.embeddings.patch_embeddings.projection.bias": ("vector", (8,)),
    "vit.encoder.layer.0.attention.attention.query.weight": ("linear", (8, 8)),
    "vit.encoder.layer.0.intermediate.dense.weight": ("linear", (16, 8)),
    "vit.layers.0.attention.q_proj.weight": ("linear", (8, 8)),
    "vit.layers.0.mlp.fc1.weight": ("linear", (16, 8)),
    "vit.layernorm.weight": ("vector", (8,)),
    "classifier.weight": ("head", (2, 8)),
    "classifier.bias": ("head bias", (2,)),
}
TIMM = {
    "cls_token": ("loose", (1, 1, 8)),
    "dist_token": ("loose", (1, 1, 8)),
    "pos_embed": ("loose", (1, 5, 8)),
    "patch_embed.proj.weight": ("loose", (8, 3, 4, 4)),
    "patch_embed.proj.bias": ("vector", (8,)),
    "blocks.0.norm1.weight": ("vector", (8,)),
    "blocks.0.attn.qkv.weight": ("linear", (24, 8)),
    "blocks.0.attn.qkv.bias": ("vector", (24,)),
    "blocks.0.attn.proj.weight": ("linear", (8, 8)),
    "blocks.0.mlp.fc1.weight": ("linear", (16, 8)),
    "blocks.0.mlp.fc2.weight": ("linear", (8, 16)),
    "fc_norm.weight": ("vector", (8,)),
    "head.weight": ("head", (2, 8)),
    "head.bias": ("head bias", (2,)),
}
CLIP = {
    "logit_scale": ("vector", ()),
    "text_model.embeddings.token_embedding.weight": ("table", (12, 8)),
    "text_model.embeddings.position_embedding.weight": ("table", (7, 8)),
    "text_model.embeddings.position_ids": ("other", (1, 7), "int64"),
    "text_model.encoder.layers.0.self_attn.k_proj.weight": ("linear", (8, 8)),
    "text_model.encoder.layers.0.mlp.fc1.weight": ("linear", (16, 8)),
    "vision_model.embeddings.class_embedding": ("vector", (8,)),
    "vision_model.embeddings.patch_embedding.weight": ("loose", (8, 3, 4, 4)),
    "vision_model.embeddings.position_embedding.weight": ("table", (5, 8)),
    "vision_model.pre_layrnorm.weight": ("vector", (8,)),
    "vision_model.encoder.layers.0.self_attn.out_proj.weight": ("linear", (8, 8)),
    "visual_projection.weight": ("linear", (6, 8)),
    "text_projection.weight": ("table", (6, 8)),  # averaged, as published
}
OPENCLIP = {
    "positional_embedding": ("table", (7, 8)),
    "token_embedding.weight": ("table", (12, 8)),
    "attn_mask": ("other", (7, 7)),
    "visual.class_embedding": ("vector", (8,)),
    "visual.positional_embedding": ("table", (5, 8)),
    "visual.conv1.weight": ("loose", (8, 3, 4, 4)),
    "visual.ln_pre.weight": ("vector", (8,)),
    "visual.proj": ("kernel", (8, 6)),  # x @ proj
    "visual.transformer.resblocks.0.attn.in_proj_weight": ("linear", (24, 8)),
    "visual.transformer.resblocks.0.attn.in_proj_bias": ("vector", (24,)),
    "visual.transformer.resblocks.0.attn.out_proj.weight": ("linear", (8, 8)),
    "transformer.resblocks.0.mlp.c_fc.weight": ("linear", (32, 8)),  # GPT-2's name, but a Linear
    "transformer.resblocks.0.mlp.c_fc.bias": ("vector", (32,)),
    "transformer.resblocks.0.mlp.c_proj.weight": ("linear", (8, 32)),
    "transformer.resblocks.0.mlp.c_proj.bias": ("vector", (8,)),
    "ln_final.weight": ("vector", (8,)),
    "logit_scale": ("vector", ()),
}
RESNET = {
    "conv1.weight": ("conv", (4, 3, 7, 7)),
    "bn1.weight": ("vector", (4,)),
    "bn1.running_mean": ("other", (4,)),
    "bn1.running_var": ("other", (4,)),
    "bn1.num_batches_tracked": ("other", (), "int64"),
    "layer1.0.conv2.weight": ("conv", (4, 4, 3, 3)),
    "layer1.0.downsample.0.weight": ("conv", (8, 4, 1, 1)),
    "features.1.dw.weight": ("vector", (8, 1, 3, 3)),  # depthwise
    "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": ("conv", (2, 4, 3, 3)),
    "classifier.1.weight": ("head", (2, 8)),
}
LINEAR_BIG_CODE = {
    "transformer.wte.weight": ("table", (12, 8)),
    "transformer.h.0.attn.c_attn.weight": ("linear", (16, 8)),
    "transformer.h.0.attn.c_attn.bias": ("vector", (16,)),
    "transformer.h.0.attn.c_proj.weight": ("linear", (8, 8)),  # square: only the config tells
    "transformer.h.0.attn.c_proj.bias": ("vector", (8,)),
    "transformer.h.0.mlp.c_fc.weight": ("linear", (16, 8)),
    "transformer.h.0.mlp.c_fc.bias": ("vector", (16,)),
    "lm_head.weight": ("table", (12, 8)),
}
FAMILIES = {
    "llama": ({**LLAMA, "lm_head.weight": ("table", (12, 8))}, {"model_type": "llama"}),
    "mistral": (LLAMA, {"model_type": "mistral"}),
    "llama, no config": (LLAMA, None),
    "qwen2": (
        {**LLAMA, "model.layers.0.self_attn.q_proj.bias": ("vector", (8,))},
        {"model_type": "qwen2"},
    ),
    "gemma": (
        {**LLAMA, "model.layers.0.pre_feedforward_layernorm.weight": ("vector", (8,))},
        {"model_type": "gemma2"},
    ),
    "gpt2": (gpt2("transformer.") | {"lm_head.weight": ("table", (12, 8))}, {"model_type": "gpt2"}),
    "gpt2, bare, no config": (gpt2("", "uint8"), None),
    "gpt_bigcode": (LINEAR_BIG_CODE, {"model_type": "gpt_bigcode"}),
    "bert": (
        {
            **{f"bert.{name}": row for name, row in BERT.items()},
            "cls.predictions.transform.dense.weight": ("head", (8, 8)),
            "cls.predictions.decoder.weight": ("head", (12, 8)),
            "cls.predictions.bias": ("head bias", (12,)),
            "cls.seq_relationship.weight": ("head", (2, 8)),
        },
        {"model_type": "bert"},
    ),
    "roberta": (
        {
            **{f"roberta.{name}": row for name, row in BERT.items()},
            "classifier.dense.weight": ("head", (8, 8)),
            "classifier.out_proj.weight": ("head", (2, 8)),
            "classifier.out_proj.bias": ("head bias", (2,)),
        },
        {"model_type": "roberta"},
    ),
    "minilm": (BERT, {"model_type": "bert"}),
    "t5": (T5, {"model_type": "t5"}),
    "vit": (VIT, {"model_type": "vit"}),
    "timm": (TIMM, {"architecture": "vit_base_patch16_224"}),
    "clip": (CLIP, {"model_type": "clip"}),
    "openclip": (OPENCLIP, None),
    "resnet": (RESNET, None),
}


def headers(rows: dict[str, Row]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (row[1], row[2] if len(row) > 2 else "float32") for name, row in rows.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    rows, config = FAMILIES[family]
    found = {name: (p.kind, p.layout) for name, p in classify(headers(rows), config).items()}
    assert found == {name: WORDS[row[0]] for name, row in rows.items()}


def test_conv1d_is_in_by_out():
    """Only what is stored as Conv1D is; a rule `layout: oi` for it gives what published code does."""
    found = {name for name, p in classify(headers(gpt2(""))).items() if p.layout == "io"}
    assert found == {name for name, row in gpt2("").items() if row[0] == "kernel"}
    big_code = classify(headers(LINEAR_BIG_CODE), {"model_type": "gpt_bigcode"})
    assert not any(p.layout == "io" for p in big_code.values())
    open_clip = classify(headers(OPENCLIP))
    assert not any(p.layout == "io" for name, p in open_clip.items() if ".c_fc." in name or ".c_proj." in name)


def test_conv1d_bias_decides_where_the_config_is_missing():
    shapes = headers(LINEAR_BIG_CODE)
    found = classify(shapes)
    assert found["transformer.h.0.attn.c_attn.weight"].layout == "oi"
    assert found["transformer.h.0.mlp.c_fc.weight"].layout == "oi"


def test_conv1d_that_fits_no_bias_is_refused():
    name = "h.0.attn.c_attn."
    shapes = {name + "weight": ((8, 24), "float32"), name + "bias": ((23,), "float32")}
    with pytest.raises(CfmergeError, match=r"neither \(in, out\) nor \(out, in\)"):
        classify(shapes)
    with pytest.raises(CfmergeError, match="two axes"):
        classify({name + "weight": ((8, 2, 12), "float32")})


def test_a_token_or_a_probe_is_no_matrix_that_was_not_solved():
    found = classify({"vision_model.head.probe": ((1, 1, 8), "float32"), "mixer": ((2, 1, 8), "float32")})
    assert [found[name].kind for name in found] == [Kind.VECTOR, Kind.VECTOR]
    assert not found["vision_model.head.probe"].note
    assert "axes are not known" in found["mixer"].note


def test_a_tensor_without_a_name_changes_no_other():
    found = classify({"": ((4,), "float32"), "a.weight": ((4, 4), "float32")})
    assert found["a.weight"].kind is Kind.MATRIX


def test_only_a_mask_is_taken_for_a_mask():
    """A bias that happens to be called `attn.bias` is merged."""
    shapes = {
        "a.attn.bias": ((2, 4), "float32"),
        "b.attn.bias": ((8,), "float32"),
        "c.attn.bias": ((1, 1, 5, 5), "bool"),
    }
    assert [p.kind for p in classify(shapes).values()] == [Kind.VECTOR, Kind.VECTOR, Kind.OTHER]


FLAX = {  # name: shape, kind, layout; L = 3 stacked layers
    "params/Dense_0/kernel": ((4, 6), Kind.MATRIX, "io"),
    "params/Dense_0/bias": ((6,), Kind.VECTOR, ""),
    "params/Conv_0/kernel": ((3, 3, 2, 6), Kind.CONVOLUTION, "iiio"),
    "params/Conv_1/kernel": ((5, 2, 6), Kind.CONVOLUTION, "iio"),
    "params/shortcut/kernel": ((1, 1, 2, 6), Kind.CONVOLUTION, "iiio"),
    "params/depthwise_conv/kernel": ((3, 3, 1, 6), Kind.VECTOR, ""),
    "params/Embed_0/embedding": ((5, 8), Kind.EMBEDDING, "oi"),
    "params/embedding/kernel": ((4, 4, 3, 8), Kind.EMBEDDING, ""),  # ViT's patches
    "image_embedding.kernel": ((784, 256), Kind.EMBEDDING, "io"),  # the demo's: its last module is an embedding
    "image_embedding.bias": ((256,), Kind.VECTOR, ""),
    "params/patch_embedding/kernel": ((48, 64), Kind.EMBEDDING, "io"),
    "params/time_embedding/linear_1/kernel": ((8, 16), Kind.MATRIX, "io"),
    "params/x_embedder/kernel": ((8, 16), Kind.MATRIX, "io"),
    "params/LayerNorm_0/scale": ((6,), Kind.VECTOR, ""),
    "params/attention/query/kernel": ((8, 2, 3), Kind.MATRIX, "ioo"),
    "params/attention/query/bias": ((2, 3), Kind.VECTOR, ""),
    "params/attention/out/kernel": ((2, 3, 8), Kind.MATRIX, "iio"),
    "params/attention/out/bias": ((8,), Kind.VECTOR, ""),
    "params/general/kernel": ((4, 2, 3), Kind.MATRIX, "ioo"),
    "params/general/bias": ((2, 3), Kind.VECTOR, ""),
    "params/scanned/kernel": ((3, 4, 6), Kind.MATRIX, "bio"),
    "params/scanned/bias": ((3, 6), Kind.VECTOR, ""),
    "params/layers/norm/scale": ((3, 8), Kind.VECTOR, ""),
    "params/layers/up/kernel": ((3, 8, 6), Kind.MATRIX, "bio"),
    "params/layers/attention/query/kernel": ((3, 8, 2, 4), Kind.MATRIX, "bioo"),
    "params/layers/attention/query/bias": ((3, 2, 4), Kind.VECTOR, ""),
    "params/layers/attention/out/kernel": ((3, 2, 4, 8), Kind.MATRIX, "biio"),
    "params/layers/Conv_0/kernel": ((3, 3, 3, 2, 6), Kind.CONVOLUTION, "biiio"),
    "params/layers/depthwise_conv/kernel": ((3, 5, 1, 6), Kind.VECTOR, ""),
    "params/head/kernel": ((8, 2), Kind.HEAD, "io"),
    "params/mlp/wi": ((8, 6), Kind.VECTOR, ""),  # unknown role: noted
    "batch_stats/BatchNorm_0/mean": ((6,), Kind.OTHER, ""),
    "batch_stats/BatchNorm_0/var": ((6,), Kind.OTHER, ""),
    "bn/mean": ((6,), Kind.OTHER, ""),  # nnx
    "bn/var": ((6,), Kind.OTHER, ""),
    "pooling/mean": ((6,), Kind.VECTOR, ""),
}


def test_flax():
    found = classify({name: (row[0], "float32") for name, row in FLAX.items()})
    assert {name: (p.shape, p.kind, p.layout) for name, p in found.items()} == FLAX
    noted = {name for name, p in found.items() if p.note}
    assert noted == {"params/mlp/wi", "params/depthwise_conv/kernel", "params/layers/depthwise_conv/kernel"}


def test_a_tree_that_is_stacked_as_a_whole():
    shapes = {
        "norm/scale": (3, 8), "query/kernel": (3, 8, 2, 4), "query/bias": (3, 2, 4),
        "out/kernel": (3, 2, 4, 8), "up/kernel": (3, 8, 6),
    }  # fmt: skip
    found = classify({name: (shape, "float32") for name, shape in shapes.items()})
    assert [p.layout for p in found.values()] == ["", "bioo", "", "biio", "bio"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder/mlp/wi/kernel", (64, 4, 128)),  # layers on axis 1, as MaxText stores them
        ("decoder/attention/query/kernel", (64, 4, 2, 8)),
        ("decoder/attention/out/kernel", (2, 4, 8, 64)),
        ("dense/kernel", (3, 8, 6)),  # stacked, and nothing says so
    ],
)
def test_kernels_that_are_left_open_are_noted_not_guessed(name, shape):
    parameter = classify({name: (shape, "float32")})[name]
    assert (parameter.layout, parameter.kind) == ("", Kind.VECTOR)
    assert "give a rule with a layout" in parameter.note


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *[(dtype, True) for dtype in ("float32", "bfloat16", "float8_e4m3fn")],
        *[(dtype, False) for dtype in ("int64", "bool", "key<fry>")],
    ],
)
def test_is_float(dtype, expected):
    assert is_float(dtype) == expected
    assert (classify({"layer.weight": ((4, 4), dtype)})["layer.weight"].kind is Kind.MATRIX) == expected


def test_canonical_sizes_and_description():
    parameter = Parameter("x", (3, 8, 2, 4), "float32", Kind.MATRIX, "bioo")
    assert parameter.canonical == (3, 8, 8)
    assert parameter.size == 192
    assert parameter.describe_layout() == "(stack, in, out, out)"
    with pytest.raises(CfmergeError, match="one letter per axis"):
        _ = dataclasses.replace(parameter, layout="").canonical


# --- canonical views --------------------------------------------------------------------------------------------

LAYOUTS = st.lists(st.sampled_from("boi"), min_size=0, max_size=3).flatmap(
    lambda rest: st.permutations(["o", "i", *rest]).map("".join)
)


@st.composite
def stored(draw):
    layout = draw(LAYOUTS)
    shape = tuple(draw(st.integers(1, 4)) for _ in layout)
    return layout, np.arange(np.prod(shape)).reshape(shape)


@given(stored())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_round_trip(case):
    layout, tensor = case
    canonical = to_canonical(tensor, layout)
    assert canonical.shape == Parameter("x", tensor.shape, "f", Kind.MATRIX, layout).canonical
    np.testing.assert_array_equal(from_canonical(canonical, layout, tensor.shape), tensor)


@given(stored(), st.randoms())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_an_entry_goes_where_its_indices_say(case, random):
    """Axes of one letter count as one, the first the slowest."""
    layout, tensor = case
    index = tuple(random.randrange(size) for size in tensor.shape)
    place = []
    for letter in "boi":
        position = 0
        for at, size, axis in zip(layout, tensor.shape, index, strict=True):
            position = position * size + axis if at == letter else position
        place.append(position)
    assert to_canonical(tensor, layout)[tuple(place)] == tensor[index]


def test_layouts_act_as_the_layers_do():
    """`W x` of the canonical view is what a Flax or torch layer computes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 8))
    query = rng.standard_normal((8, 2, 3))
    (canonical,) = to_canonical(query, "ioo")
    np.testing.assert_allclose(x @ canonical.T, np.einsum("bi,ihd->bhd", x, query).reshape(5, 6))
    out, heads = rng.standard_normal((2, 4, 7)), x.reshape(5, 2, 4)
    (canonical,) = to_canonical(out, "iio")
    np.testing.assert_allclose(x @ canonical.T, np.einsum("bhd,hdo->bo", heads, out))


@pytest.mark.parametrize("layout", ["", "o", "oii", "oo", "bo", "ox", "OI"])
def test_bad_layouts(layout):
    with pytest.raises(CfmergeError, match=r"'w' of shape \(4, 6\) cannot have layout"):
        check_layout("w", (4, 6), layout)
