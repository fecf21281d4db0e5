"""Quantised models are known by what is stored, named by their scheme, and refused with the way out."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.quantised import notes, problem, quantised
from cfmerge.formats.shards import save

Q = "model.layers.0.self_attn.q_proj"
F8 = ml_dtypes.float8_e4m3fn


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


BNB = {f"{Q}.weight": zeros(np.uint8, 32, 1), f"{Q}.weight.absmax": zeros(np.float32, 4),
       f"{Q}.weight.quant_map": zeros(np.float32, 16)}  # fmt: skip
GPTQ = {f"{Q}.qweight": zeros(np.int32, 1, 8), f"{Q}.qzeros": zeros(np.int32, 1, 1),
        f"{Q}.scales": zeros(np.float16, 1, 8)}  # fmt: skip
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
# scheme: (tensors instead of the layer's weight, what the config says)
SCHEMES = {
    "bitsandbytes, 4 bits": (
        BNB, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    ),
    "bitsandbytes, 8 bits": ({f"{Q}.weight": zeros(np.int8, 8, 8), f"{Q}.SCB": zeros(np.float32, 8)}, {}),
    "GPTQ": ({**GPTQ, f"{Q}.g_idx": zeros(np.int32, 8)}, {}),
    "GPTQ, 4 bits": (GPTQ, {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}),
    "AWQ or GPTQ": (GPTQ, {}),
    "AWQ": (GPTQ, {"quantization_config": {"quant_method": "awq"}}),
    "fp8": ({f"{Q}.weight": zeros(F8, 8, 8), f"{Q}.weight_scale_inv": zeros(np.float32, 1, 1)}, {}),
    "fp8, without scales": ({f"{Q}.weight": zeros(ml_dtypes.float8_e5m2, 8, 8)}, {}),
    "compressed-tensors": (
        {f"{Q}.weight_packed": zeros(np.int32, 8, 1), f"{Q}.weight_scale": zeros(np.float32, 8, 1)}, {}
    ),
    "MXFP4": ({f"{EXPERTS}_blocks": zeros(np.uint8, 2, 8, 1, 4), f"{EXPERTS}_scales": zeros(np.uint8, 2, 8, 1)}, {}),
    "MLX, 4 bits": (
        {f"{Q}.weight": zeros(np.uint32, 8, 1), f"{Q}.scales": zeros(np.float16, 8, 1),
         f"{Q}.biases": zeros(np.float16, 8, 1)}, {"quantization": {"group_size": 64, "bits": 4}},
    ),
    "spqr": (
        {f"{Q}.dense_weights": zeros(np.int64, 8, 1), f"{Q}.row_offsets": zeros(np.int32, 9)},
        {"quantization_config": {"quant_method": "spqr"}},
    ),
    "NVFP4": ({f"{Q}.weight": zeros(np.uint8, 8, 4), f"{Q}.weight_scale": zeros(F8, 8, 1),
               f"{Q}.weight_scale_2": zeros(np.float32)}, {}),
    "Quanto": ({f"{Q}.weight._data": zeros(np.int8, 8, 8), f"{Q}.weight._scale": zeros(np.float32, 8, 1)}, {}),
    "torchao": ({f"{Q}.weight_qdata": zeros(np.int8, 8, 8), f"{Q}.weight_scale": zeros(np.float32, 8, 1)}, {}),
    "packed int8": ({f"{Q}.weight": zeros(np.int8, 8, 8)}, {}),
}  # fmt: skip


def packed(path, llama, config, tensors):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    rest = {name: tensor for name, tensor in llama.items() if name != f"{Q}.weight"}
    save(path, {**rest, **tensors}, {}, "model")
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_known(tmp_path, llama, llama_config, scheme):
    tensors, config = SCHEMES[scheme]
    source = open_checkpoint(packed(tmp_path / "m", llama(), llama_config | config, tensors))
    found = quantised(source)
    assert found is not None
    assert found.scheme == scheme
    assert notes(source, {}) == []


def test_buffers_and_plain_scales_are_not_taken_for_packed_weights(tmp_path, llama, llama_config):
    plain = {
        f"{Q}.weight": llama()[f"{Q}.weight"], "h.0.attn.bias": zeros(np.uint8, 1, 1, 4, 4),
        "position_ids": zeros(np.int64, 1, 4), "bn.num_batches_tracked": zeros(np.int64),
        "attn.relative_position_index": zeros(np.int32, 4, 4), "attn.scale": zeros(np.float32, 4),
        "norm.weight_scale": zeros(np.float32, 4),
    }  # fmt: skip
    assert quantised(open_checkpoint(packed(tmp_path / "m", llama(), llama_config, plain))) is None


def test_a_config_over_plain_floats_is_told_and_merged(family, make_model, tmp_path, llama, llama_config):
    config = llama_config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    left = make_model(tmp_path / "left", llama(5), config)
    plan = cfmerge.make_plan(cfmerge.Recipe(str(family.base), [str(family.experts[0]), str(left)], "average"))
    assert any("expert 'left'" in note and "quantised (bitsandbytes, 8 bits)" in note for note in plan.notes)


def test_all_quantised_models_are_named_at_once(family, refused, tmp_path, llama, llama_config):
    base = packed(tmp_path / "b", llama(), llama_config, BNB)
    bad = packed(tmp_path / "bad", llama(1), llama_config, {f"{Q}.weight": zeros(F8, 8, 8)})
    message = refused(
        [f"base ({base}) is quantised (bitsandbytes, 4 bits)", "expert 'bad'", "fp8, without scales", ".dequantize()"],
        base, [family.experts[0], bad],
    )  # fmt: skip
    assert len(message.split("\n")) == 2
    for advice in ("keep-base", "method skip"):
        assert advice not in message


def test_the_way_out_fits_the_model(tmp_path):
    """Floats of 8 bits are dequantised here, with scales or without."""
    for name, more, word in (
        ("plain", {}, "--dequantize"),
        ("scaled", {"w.weight_scale": zeros(np.float32)}, "--dequantize"),
    ):
        save(tmp_path, {"w.weight": zeros(F8, 4, 4), **more}, {}, name)
        source = open_checkpoint(tmp_path / f"{name}.safetensors")
        message = problem("base", source, quantised(source))
        assert word in message
        assert "from_pretrained" not in message


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3B11"])
def test_floats_of_few_bits_that_cannot_be_read(tmp_path, dtype):
    entry = {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(entry).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    with pytest.raises(CfmergeError, match="the model is quantised"):
        open_checkpoint(tmp_path / "m.safetensors")
