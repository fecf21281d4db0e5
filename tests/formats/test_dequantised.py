"""Models in fp8 with scales are read as the bfloat16 models that they stand for, when that is asked for."""

import json

import ml_dtypes
import numpy as np
import pytest
from laid import laid

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.dequantised import Dequantised
from cfmerge.formats.shards import save

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
Q = "model.layers.0.self_attn.q_proj.weight"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [4, 4]}
SHAPE = (10, 7)


def numbers(seed: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(path, tensors, config=None):
    path.mkdir()
    save(path, tensors, {}, "model")
    return laid(path, {"config.json": config or {}})


def scaled(shape) -> dict:
    return {Q: numbers(1).astype(F8), f"{Q}_scale_inv": np.abs(numbers(2, shape)) + 0.1}


CASES = {  # the scales' shape, the config, and what each number is multiplied by
    "blocks": ((3, 2), BLOCKS, lambda s: s.repeat(4, 0)[:10].repeat(4, 1)[:, :7]),
    "blocks of the usual size": ((1, 1), {"quant_method": "fp8"}, lambda s: s),
    "rows": ((10, 1), {"quant_method": "fbgemm_fp8"}, lambda s: s),
    "rows, one axis": ((10,), {"quant_method": "compressed-tensors"}, lambda s: s[:, None]),
    "one": ((), {"quant_method": "modelopt"}, lambda s: s),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_times_its_scale(tmp_path, case):
    shape, told, spread = CASES[case]
    tensors = scaled(shape)
    source = Dequantised("base", open_checkpoint(model(tmp_path / "m", tensors, {"quantization_config": told})))
    expected = (tensors[Q].astype(np.float32) * spread(tensors[f"{Q}_scale_inv"])).astype(BF16)
    np.testing.assert_array_equal(source.read(Q), expected)
    np.testing.assert_array_equal(source.read(Q, 5, 17), expected.reshape(-1)[5:22])
    assert list(source.tensors) == [Q]
    assert source.tensors[Q].dtype == BF16
    assert "quantization_config" not in source.config


def test_scales_that_do_not_fit_are_told(tmp_path):
    source = open_checkpoint(model(tmp_path / "m", scaled((4, 2)), {"quantization_config": BLOCKS}))
    with pytest.raises(CfmergeError, match=r"'.*_scale_inv' has shape \(4, 2\), which gives no blocks of 4x4 of"):
        Dequantised("base", source)


@pytest.mark.parametrize(
    "others",
    [{"a.qweight": np.zeros((4, 4), np.int32)}, {"b.weight": numbers(3).astype(F8)}, {f"{Q}_scale_2": numbers(1, ())}],
)
def test_other_schemes_are_still_refused(tmp_path, others):
    source = open_checkpoint(model(tmp_path / "m", {**scaled((3, 2)), **others}, {"quantization_config": BLOCKS}))
    with pytest.raises(CfmergeError, match="is quantised"):
        Dequantised("base", source)


def test_an_fp8_base_and_experts_give_a_plain_model(tmp_path):
    config = {"quantization_config": BLOCKS, "torch_dtype": "float8_e4m3fn", "hidden_size": 7}
    other = {"norm.weight": np.ones(7, BF16), "q.input_scale": np.ones((), np.float32)}
    base = model(tmp_path / "base", {**scaled((3, 2)), **other}, config)
    plain = Dequantised("base", open_checkpoint(base)).read(Q).astype(np.float32)
    experts = [
        model(tmp_path / "a", {**scaled((3, 2)), Q: numbers(5).astype(F8), **other}, config),
        model(tmp_path / "b", {Q: (plain + numbers(6)).astype(BF16), "norm.weight": np.ones(7, BF16)}),
    ]
    with pytest.raises(CfmergeError, match=r"--dequantize reads it as bfloat16; recipe: 'dequantize: true'"):
        cfmerge.plan(base, experts, "average")
    result = cfmerge.merge(base, experts, "average", output=tmp_path / "out", dequantize=True)
    merged = open_checkpoint(tmp_path / "out")
    a = Dequantised("a", open_checkpoint(experts[0])).read(Q).astype(np.float32)
    b = open_checkpoint(experts[1]).read(Q).astype(np.float32)
    assert list(merged.tensors) == [Q, "norm.weight"]
    np.testing.assert_allclose(merged.read(Q).astype(np.float32), (a + b) / 2, rtol=2**-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16", "hidden_size": 7}
    assert any("1 weights are dequantised (fp8)" in note for note in result.notes)
