"""LoRA files in diffusers' and kohya's names, over pipelines, components and single files."""

import json

import numpy as np
import pytest
from laid import laid
from safetensors.numpy import save_file

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.adapters import AdapterSource, is_adapter

RNG = np.random.default_rng(0)
Q, OUT = "down_blocks.0.attentions.0.attn1.to_q", "down_blocks.0.attentions.0.attn1.to_out.0"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
CONV = "conv_in"


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


UNET = {
    f"{Q}.weight": draw(6, 6),
    f"{OUT}.weight": draw(6, 4),
    f"{OUT}.bias": draw(6),
    f"{CONV}.weight": draw(5, 4, 3, 3),
}
TEXT = {f"{CLIP}.weight": draw(6, 6)}
A, B = draw(2, 6), draw(6, 2)


@pytest.fixture
def pipeline(tmp_path):
    return laid(
        tmp_path / "pipe",
        {
            "model_index.json": {"_class_name": "StableDiffusionPipeline"},
            "unet/config.json": {},
            "unet/diffusion_pytorch_model.safetensors": UNET,
            "text_encoder/config.json": {},
            "text_encoder/model.safetensors": TEXT,
        },
    )


def lora(path, tensors, metadata=None, name="pytorch_lora_weights.safetensors"):
    path.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, path / name, metadata=metadata)
    return path / name


def product(source, name):
    return source.delta(name).product


STYLES = {
    "peft": (
        f"unet.{Q}.lora_A.weight",
        f"unet.{Q}.lora_B.weight",
        f"text_encoder.{CLIP}.lora_A.weight",
        f"text_encoder.{CLIP}.lora_B.weight",
    ),
    "down": (
        f"unet.{Q}.lora.down.weight",
        f"unet.{Q}.lora.up.weight",
        f"text_encoder.{CLIP}.lora_linear_layer.down.weight",
        f"text_encoder.{CLIP}.lora_linear_layer.up.weight",
    ),
    "processor": (
        f"unet.{Q.replace('to_q', 'processor.to_q_lora')}.down.weight",
        f"unet.{Q.replace('to_q', 'processor.to_q_lora')}.up.weight",
        f"text_encoder.{CLIP.replace('q_proj', 'to_q_lora')}.down.weight",
        f"text_encoder.{CLIP.replace('q_proj', 'to_q_lora')}.up.weight",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_diffusers_names_over_a_pipeline(pipeline, tmp_path, style):
    down, up, text_down, text_up = STYLES[style]
    file = lora(tmp_path / "ad", {down: A, up: B, text_down: 2 * A, text_up: B})
    base = open_checkpoint(pipeline)
    for path in (file, file.parent):
        assert is_adapter(path)
        source = AdapterSource(path, base)
        np.testing.assert_allclose(product(source, f"unet/{Q}.weight"), B @ A, rtol=1e-6)  # alpha = r
        np.testing.assert_allclose(product(source, f"text_encoder/{CLIP}.weight"), 2 * B @ A, rtol=1e-6)
        assert source.rank(f"unet/{OUT}.weight") == 0


def test_the_output_of_an_attention_in_old_names(pipeline, tmp_path):
    old = f"unet.{OUT.replace('to_out.0', 'processor.to_out_lora')}"
    file = lora(tmp_path / "ad", {f"{old}.down.weight": draw(2, 4), f"{old}.up.weight": B})
    assert AdapterSource(file, open_checkpoint(pipeline)).rank(f"unet/{OUT}.weight") == 2


def test_rank_and_alpha_of_the_metadata(pipeline, tmp_path):
    told = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {OUT: 1}, "unet.use_rslora": False}
    tensors = {
        f"unet.{Q}.lora_A.weight": A,
        f"unet.{Q}.lora_B.weight": B,
        f"unet.{OUT}.lora_A.weight": A[:, :4],
        f"unet.{OUT}.lora_B.weight": B,
    }
    file = lora(tmp_path / "ad", tensors, {"lora_adapter_metadata": json.dumps(told)})
    source = AdapterSource(file, open_checkpoint(pipeline))
    np.testing.assert_allclose(product(source, f"unet/{Q}.weight"), 3 * B @ A, rtol=1e-6)
    np.testing.assert_allclose(product(source, f"unet/{OUT}.weight"), 0.5 * B @ A[:, :4], rtol=1e-6)
    file = lora(tmp_path / "ad", tensors, {"lora_adapter_metadata": json.dumps(told | {"unet.r": 4})})
    with pytest.raises(CfmergeError, match=r"expected rank 4.*found 2"):
        AdapterSource(file, open_checkpoint(pipeline))
    file = lora(tmp_path / "ad", tensors, {"lora_adapter_metadata": "{"})
    with pytest.raises(CfmergeError, match="not valid JSON"):
        AdapterSource(file, open_checkpoint(pipeline))


def test_an_adapter_of_a_component(pipeline, tmp_path):
    file = lora(tmp_path / "ad", {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B})
    source = AdapterSource(file, open_checkpoint(pipeline / "unet"))
    np.testing.assert_allclose(product(source, f"{Q}.weight"), B @ A, rtol=1e-6)


def kohya(module, part, **tensors):
    names = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "alpha": "alpha",
        "dora": "dora_scale",
        "mid": "lora_mid.weight",
    }
    return {f"lora_{part}_{module.replace('.', '_')}.{names[key]}": np.asarray(value) for key, value in tensors.items()}


def test_kohyas_names(pipeline, tmp_path):
    down, up = draw(2, 4, 3, 3), draw(5, 2, 1, 1)
    tensors = (
        kohya(Q, "unet", down=A, up=B, alpha=np.float32(1))
        | kohya(CLIP, "te", down=A, up=B)
        | kohya(CONV, "unet", down=down, up=up, alpha=np.float16(4))
        | kohya(OUT, "unet", down=A[:, :4, None, None], up=B[:, :, None, None])
    )
    file = lora(tmp_path / "ad", tensors, name="style.safetensors")
    assert is_adapter(file)
    source = AdapterSource(file, open_checkpoint(pipeline))
    np.testing.assert_allclose(product(source, f"unet/{Q}.weight"), 0.5 * B @ A, rtol=1e-6)
    np.testing.assert_allclose(product(source, f"text_encoder/{CLIP}.weight"), B @ A, rtol=1e-6)
    np.testing.assert_allclose(product(source, f"unet/{OUT}.weight"), B @ A[:, :4], rtol=1e-6)
    expected = 2 * np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    np.testing.assert_allclose(product(source, f"unet/{CONV}.weight").reshape(5, 4, 3, 3), expected, rtol=1e-5)


@pytest.mark.parametrize("inputs", [False, True])
def test_kohyas_dora_scales_outputs_or_inputs(pipeline, tmp_path, inputs):
    scale = np.abs(draw(*((1, 6) if inputs else (6, 1))))
    file = lora(tmp_path / "ad", kohya(Q, "unet", down=A, up=B, dora=scale), name="style.safetensors")
    base = open_checkpoint(pipeline)
    tensor = base.read(f"unet/{Q}.weight") + B @ A
    expected = scale * tensor / np.linalg.norm(tensor, axis=0 if inputs else 1, keepdims=True)
    np.testing.assert_allclose(AdapterSource(file, base).read(f"unet/{Q}.weight"), expected, rtol=1e-5, atol=1e-6)


def test_kohyas_names_over_a_single_file(tmp_path):
    block = "double_blocks.0.img_attn.qkv"
    weights = {f"model.diffusion_model.{block}.weight": draw(6, 6), f"model.diffusion_model.{block}.bias": draw(6)}
    base = open_checkpoint(laid(tmp_path, {"flux.safetensors": weights}) / "flux.safetensors")
    file = lora(tmp_path / "ad", kohya(block, "unet", down=A, up=B), name="style.safetensors")
    assert AdapterSource(file, base).rank(f"model.diffusion_model.{block}.weight") == 2


REFUSED = {
    "no such module": (
        kohya("up_blocks.9.to_q", "unet", down=A, up=B),
        ["1 modules", "lora_unet_up_blocks_9_to_q", "layout"],
    ),
    "a middle factor": (kohya(Q, "unet", down=A, up=B, mid=draw(2, 2)), ["lora_mid", "not known as parts of a LoRA"]),
    "loha": (kohya(Q, "unet", down=A, up=B) | {"lora_unet_x.hada_w1_a": A}, ["hada_w1_a", "LoHa"]),
    "lokr": (kohya(Q, "unet", down=A, up=B) | {"lora_unet_x.lokr_w1": A}, ["lokr_w1", "LoKr"]),
    "a whole difference": (kohya(Q, "unet", down=A, up=B) | {"lora_unet_x.diff": A}, ["lora_unet_x.diff"]),
    "no up": (kohya(Q, "unet", down=A), ["has no B (up)"]),
    "alpha of two numbers": (kohya(Q, "unet", down=A, up=B, alpha=draw(2)), ["alpha", "one number"]),
    "other shapes": (kohya(Q, "unet", down=draw(2, 5), up=B), [f"unet/{Q}.weight", "(6, 6) in the base, (6, 5)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(pipeline, tmp_path, case):
    tensors, words = REFUSED[case]
    file = lora(tmp_path / "ad", tensors, name="style.safetensors")
    with pytest.raises(CfmergeError) as error:
        AdapterSource(file, open_checkpoint(pipeline))
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_models_are_no_adapters(pipeline, tmp_path):
    assert not is_adapter(pipeline)
    assert not is_adapter(pipeline / "unet")
    assert not is_adapter(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert not is_adapter(tmp_path / "nothing")
