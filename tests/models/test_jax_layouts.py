"""Layouts of JAX families: each tensor is solved as the `(out, in)` matrices of the same model, unstacked.

A family is a tree in its own layout, and `plain` takes each of its tensors apart by einsum-like code written out here:
the matrices that act as the layers do.
"""

import warnings

import jax
import numpy as np
import pytest

import cfmerge
from cfmerge.models import Kind, classify
from cfmerge.planning.assign import assign
from cfmerge.planning.depth import depths_of

D, N, H, K, F, V, L, E = (
    6,
    2,
    4,
    1,
    5,
    11,
    3,
    2,
)  # embedding, heads, head, key heads, hidden, vocabulary, layers, experts

# layout of one axis order: how a tensor without stacked axes becomes (out, in)
BY_HAND = {
    "oi": lambda w: w,
    "io": lambda w: w.T,
    "oio": lambda w: np.concatenate([head.T for head in w]),  # (heads, in, head_dim)
    "ioo": lambda w: w.reshape(len(w), -1).T,  # (in, heads, head_dim)
    "iio": lambda w: w.reshape(-1, w.shape[-1]).T,  # (heads, head_dim, out)
}


def by_hand(tensor, layout):
    """The `(out, in)` matrices of a stored tensor, its stacked axes taken one index at a time."""
    axes = [axis for axis, letter in enumerate(layout) if letter == "b"]
    inner = BY_HAND[layout.replace("b", "")]
    stacked = np.ndindex(*(tensor.shape[axis] for axis in axes))
    return [inner(np.moveaxis(tensor, axes, range(len(axes)))[index]) for index in stacked]


GEMMA = {  # name: shape, layout
    "attn/q_einsum/w": ((N, D, H), "oio"),
    "attn/kv_einsum/w": ((2, K, D, H), "boio"),
    "attn/attn_vec_einsum/w": ((N, H, D), "iio"),
    "mlp/gating_einsum/w": ((2, F, D), "boi"),
    "mlp/linear/w": ((F, D), "io"),
    "pre_attention_norm/scale": ((D,), ""),
}
OLDER_GEMMA = {**GEMMA, "mlp/gating_einsum": ((2, D, F), "bio"), "mlp/linear": ((F, D), "io")}
del OLDER_GEMMA["mlp/gating_einsum/w"], OLDER_GEMMA["mlp/linear/w"]
GEMMA_ONE_HEAD_EACH = {**GEMMA, "attn/qkv_einsum/w": ((3, N, D, H), "boio")}
TUNIX = {
    "attn/q_proj/w": ((D, N, H), "ioo"),
    "attn/k_proj/w": ((D, K, H), "ioo"),
    "attn/o_proj/w": ((N, H, D), "iio"),
    "attn/q_norm/w": ((H,), ""),
    "mlp/gate_proj/kernel": ((D, F), "io"),
    "mlp/down_proj/kernel": ((F, D), "io"),
}
MAXTEXT = {
    "self_attention/query/kernel": ((D, L, N, H), "iboo"),
    "self_attention/out/kernel": ((N, L, H, D), "ibio"),
    "mlp/wi_0/kernel": ((D, L, F), "ibo"),
    "mlp/wi_1/kernel": ((D, L, F), "ibo"),
    "mlp/wo/kernel": ((F, L, D), "ibo"),
    "pre_self_attention_layer_norm/scale": ((D, L), ""),
    "mlp/wi_0/bias": ((F, L), ""),
}
MAXTEXT_EXPERTS = {
    "MoeBlock_0/gate/kernel": ((D, L, E), "ibo"),
    "MoeBlock_0/wi_0": ((E, L, D, F), "bbio"),
    "MoeBlock_0/wo": ((E, L, F, D), "bbio"),
    "pre_self_attention_layer_norm/scale": ((D, L), ""),
}
FLAX_GPT2 = {
    "attn/c_attn/kernel": ((3 * D, D), "oi"),
    "attn/c_attn/bias": ((3 * D,), ""),
    "attn/c_proj/kernel": ((D, D), "oi"),  # square: the others tell
    "attn/c_proj/bias": ((D,), ""),
    "mlp/c_fc/kernel": ((4 * D, D), "oi"),
    "mlp/c_fc/bias": ((4 * D,), ""),
    "mlp/c_proj/kernel": ((D, 4 * D), "oi"),
    "mlp/c_proj/bias": ((D,), ""),
}
NNX_GPT = {  # the same names, of Flax's own dense layers
    "attn/c_attn/kernel": ((D, 3 * D), "io"),
    "attn/c_attn/bias": ((3 * D,), ""),
    "attn/c_proj/kernel": ((D, D), "io"),
}


def below(prefix, rows, first=()):
    return {prefix + name: ((*first, *shape), "b" * len(first) + layout if layout else "")
            for name, (shape, layout) in rows.items()}  # fmt: skip


FAMILIES = {
    "gemma, flat keys": {
        **below("transformer/layer_0/", GEMMA), **below("transformer/layer_1/", GEMMA),
        "transformer/embedder/input_embedding": ((V, D), "oi"),
        "transformer/embedder/mm_input_projection/w": ((F, D), "io"),
        "transformer/final_norm/scale": ((D,), ""),
    },
    "gemma, nested": below("layer_0.", GEMMA),
    "gemma, input first": below("layer_0/", OLDER_GEMMA),
    "gemma, as many keys as heads": below("layer_0/", GEMMA_ONE_HEAD_EACH),
    "gemma, layers stacked": {
        **below("transformer/stacked_layers/attention_type_0/", GEMMA, (L,)),
        **below("transformer/stacked_layers/attention_type_1/", GEMMA, (L,)),
        "transformer/embedder/input_embedding": ((V, D), "oi"),
    },
    "gemma, experts": below("layer_0/", {
        "mlp/gating_einsum": ((E, 2, F, D), "bboi"), "mlp/linear": ((E, F, D), "bio"),
        "mlp/router_logits": ((D, E), "io"),
    }),
    "tunix": {
        **below("layers/0/", TUNIX), "embedder/input_embedding": ((V, D), "oi"), "lm_head/w": ((D, V), "io"),
        "final_norm/w": ((D,), ""),
    },
    "tunix, experts": below("layers/0/mlp/", {
        "gate_proj": ((E, D, F), "bio"), "up_proj": ((E, D, F), "bio"), "down_proj": ((E, F, D), "bio"),
        "router/kernel": ((D, E), "io"),
    }),
    "maxtext, linen": {
        **below("params/params/decoder/layers/", MAXTEXT),
        "params/params/decoder/decoder_norm/scale": ((D,), ""),
        "params/params/decoder/logits_dense/kernel": ((D, V), "io"),
        "params/params/token_embedder/embedding": ((V, D), "oi"),
    },
    "maxtext, nnx": {f"base.decoder.layers.{name.replace('/', '.')}.value": row for name, row in MAXTEXT.items()},
    "maxtext, experts": below("params/decoder/moe_layers/", MAXTEXT_EXPERTS),
    "maxtext, layers apart": below("params/params/decoder/layers_0/", {
        "self_attention/query/kernel": ((D, N, H), "ioo"), "self_attention/out/kernel": ((N, H, D), "iio"),
        "mlp/wi_0/kernel": ((D, F), "io"), "pre_self_attention_layer_norm/scale": ((D,), ""),
    }),
    "hf flax gpt2": below("transformer/h/0/", FLAX_GPT2),
    "nnx gpt": below("h/0/", NNX_GPT),
}  # fmt: skip


def tree(rows, number=0):
    """A tree of a family: the base for 0, experts for 1, 2, ..."""
    common, own = np.random.default_rng(3), np.random.default_rng(100 + number)
    scale = 0.3 if number else 0.0
    return {
        name: (common.standard_normal(shape) + scale * own.standard_normal(shape)).astype(np.float32)
        for name, (shape, _) in rows.items()
    }


def plain(leaves, rows):
    """The same model with each matrix in a tensor of its own, as torch has it."""
    found = {}
    for name, leaf in leaves.items():
        layout, key = rows[name][1], name.replace("/", "_").replace(".", "_")
        for number, matrix in enumerate(by_hand(leaf, layout)) if layout else ():
            found[f"{key}_{number}.weight"] = np.ascontiguousarray(matrix)
    return found


EMBEDDINGS = ("input_embedding", "lm_head/w", "logits_dense/kernel", "token_embedder/embedding")


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_of_families(family):
    rows = FAMILIES[family]
    found = classify({name: (shape, "float32") for name, (shape, _) in rows.items()})
    assert {name: p.layout for name, p in found.items()} == {name: layout for name, (_, layout) in rows.items()}
    assert {name: p.kind for name, p in found.items()} == {
        name: Kind.EMBEDDING if name.endswith(EMBEDDINGS) else Kind.MATRIX if layout else Kind.VECTOR
        for name, (_, layout) in rows.items()
    }
    assert not any(p.note for p in found.values())
    assert {name: p.shape for name, p in found.items()} == {name: shape for name, (shape, _) in rows.items()}


GOLDEN = {  # every layout once, and the modules beside that tell it
    **{f"gemma/{name}": row for name, row in GEMMA.items()},
    **below("older/", {name: OLDER_GEMMA[name] for name in ("mlp/gating_einsum", "mlp/linear")}),
    **below("tunix/", {name: TUNIX[name] for name in ("attn/q_proj/w",)}),
    **below("decoder/layers/", {name: row for name, row in MAXTEXT.items() if "wi_" not in name}),
    **below("decoder/moe_layers/", {name: row for name, row in MAXTEXT_EXPERTS.items() if "gate" not in name}),
    **below("gpt2/", {name: row for name, row in FLAX_GPT2.items() if "c_attn" in name}),
}


@pytest.mark.parametrize(
    ("method", "among"), [("ace", ""), ("tsv_m", "self_attention"), ("task_arithmetic", "self_attention")]
)
def test_a_family_is_merged_as_its_matrices_are(method, among):
    rows = {name: row for name, row in GOLDEN.items() if among in name}
    base, *experts = [tree(rows, number) for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = cfmerge.merge_params(base, experts, method)
        apart = cfmerge.merge_params(plain(base, rows), [plain(expert, rows) for expert in experts], method)
    found = plain(jax.tree.map(np.asarray, merged), rows)
    assert len(found) >= 6
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix, apart[name], rtol=0, atol=2e-6, err_msg=name)


# --- fused experts ----------------------------------------------------------------------------------------------------

FUSED = {  # config and the shapes of gate_up_proj and down_proj: the layout
    "gpt-oss": ({"model_type": "gpt_oss", "hidden_size": D}, (E, D, 2 * F), (E, F, D), "bio"),
    "llama4": ({"model_type": "llama4", "text_config": {"hidden_size": D}}, (E, D, 2 * F), (E, F, D), "bio"),
    "mixtral": ({"model_type": "mixtral", "hidden_size": D}, (E, 2 * F, D), (E, D, F), "boi"),
    "qwen3_moe": ({"model_type": "qwen3_moe", "hidden_size": D}, (E, 2 * F, D), (E, D, F), "boi"),
    "deepseek_v3, hidden as wide": ({"model_type": "deepseek_v3", "hidden_size": D}, (E, 2 * D, D), (E, D, D), "boi"),
    "gpt-oss, hidden as wide": ({"model_type": "gpt_oss", "hidden_size": D}, (E, D, 2 * D), (E, D, D), "bio"),
    "no config, in memory": (None, (E, 2 * F, D), (E, D, F), "boi"),
    "no config, gpt-oss": (None, (E, D, 2 * F), (E, F, D), "bio"),
}


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("separator", [".", "/"])
def test_fused_experts(family, separator):
    config, up, down, layout = FUSED[family]
    where = separator.join(["model", "layers", "0", "mlp", "experts", ""])
    shapes = {where + "gate_up_proj": (up, "float32"), where + "down_proj": (down, "float32"),
              where + "gate_up_proj_bias": ((E, 2 * F), "float32")}  # fmt: skip
    found = classify(shapes, config)
    assert [p.layout for p in found.values()] == [layout, layout, ""]
    assert not any(p.note for p in found.values())


# --- what is left open, and depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "beside"),
    [
        ("layer_0/mlp/gating_einsum/w", (2, F, D), {}),  # no `linear`
        ("layer_0/mlp/gating_einsum/w", (2, D, D), {"layer_0/mlp/linear/w": (D, D)}),  # both ways fit
        ("layer_0/attn/q_einsum/w", (N, D), {}),
        ("mlp/wi_0/kernel", (D, L, F), {}),  # no norm shows the layers
    ],
)
def test_tensors_that_nothing_tells_are_noted(name, shape, beside):
    found = classify({key: (own, "float32") for key, own in {name: shape, **beside}.items()})[name]
    assert found.kind is Kind.VECTOR
    assert "give a rule with a layout" in found.note


def test_a_bias_tells_which_axis_of_a_kernel_is_out():
    shapes = {
        "a/kernel": (8, 4),
        "a/bias": (8,),
        "b/kernel": (8, 4),
        "b/bias": (4,),
        "c/kernel": (4, 4),
        "c/bias": (4,),
    }
    found = classify({name: (shape, "float32") for name, shape in shapes.items()})
    assert [found[f"{module}/kernel"].layout for module in "abc"] == ["oi", "io", "io"]


def depth(rows):
    found = classify({name: (shape, "float32") for name, (shape, _) in rows.items()})
    return depths_of(assign(found, cfmerge.methods.ace()))


def test_depth_of_stacked_layers_is_no_number_in_their_names():
    found = depth(FAMILIES["gemma, layers stacked"]) | depth(FAMILIES["maxtext, linen"])
    assert set(found.values()) == {None}


def test_depth_of_layers_apart():
    rows = {**below("transformer/layer_0/", GEMMA), **below("transformer/layer_10/", GEMMA)}
    found = depth(rows)
    assert {found[name] for name in rows if "layer_10" in name} == {1}
    assert {found[name] for name in rows if "layer_0/" in name} == {0}


def test_a_gradient_over_stacked_layers_is_told():
    rows = FAMILIES["maxtext, linen"]
    base, *experts = [tree(rows, number) for number in range(3)]
    method = cfmerge.methods.ace() >> cfmerge.methods.scale({"gradient": [1.0, 0.5]})
    with pytest.warns(UserWarning, match="layers stacked in one tensor cannot have different numbers"):
        cfmerge.merge_params(base, experts, method)


def test_dense_layers_called_embed():
    """Of diffusion models: what the last module is decides, not a wrapper that is called `embedding`."""
    names = ["time_embedding.linear_1", "add_embedding.linear_2", "model.diffusion_model.time_embed.0", "x_embedder",
             "context_embedder", "time_text_embed.timestep_embedder.linear_1", "label_emb.0.2"]  # fmt: skip
    shapes = {f"{name}.{leaf}": (shape, "float32") for name in names
              for leaf, shape in {"weight": (F, D), "bias": (F,)}.items()}  # fmt: skip
    found = classify(shapes)
    assert {p.kind for name, p in found.items() if name.endswith("weight")} == {Kind.MATRIX}
