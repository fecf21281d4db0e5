"""Converted weights in Flax NNX compute what transformers computes; and the way back gives the same bytes."""

import importlib
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as t

import cfmerge
from cfmerge.formats import open_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 16,
    "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 1, "head_dim": 6}
VISION = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 16,
    "n_positions": 12,
    "bos_token_id": 0,
    "eos_token_id": 3,
}
T5 = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 16, "num_decoder_layers": 1}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 15, 6, 10, 3]])
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

MODELS = {  # {name: (family, model, example, class)}
    "bert": ("bert", lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)), "nnx_bert", "make"),
    "roberta": ("roberta", lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SMALL)), "nnx_bert", "make"),
    "gpt2": ("gpt2", lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), "nnx_gpt2", "GPT2"),
    "vit": ("vit", lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)), "nnx_vit", "ViT"),
    "clip": (
        "clip",
        lambda: t.CLIPModel(t.CLIPConfig(text_config=SMALL, vision_config=VISION, projection_dim=6)),
        "nnx_clip",
        "CLIP",
    ),
    "t5": ("t5", lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), "nnx_t5", "T5"),
    "t5, gated": ("t5", lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, **GATED)), "nnx_t5", "T5"),
    "llama3": ("llama3", lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), "nnx_llama", "Llama"),
    "qwen2, tied": (
        "qwen2",
        lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER | {"head_dim": 4}, tie_word_embeddings=True)),
        "nnx_llama",
        "Llama",
    ),
    "qwen3": ("qwen3", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER)), "nnx_llama", "Llama"),
}


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def inputs(name):
    if name == "vit":
        return {"pixel_values": IMAGES}
    if name == "clip":
        return {"pixel_values": IMAGES, "input_ids": TOKENS}
    return {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS[:, :4]} if name.startswith("t5") else {})}


def as_arrays(asked):
    """The inputs of a model in Flax: images have their channels last."""
    arrays = {key: jnp.asarray(value.numpy()) for key, value in asked.items()}
    return [array.transpose(0, 2, 3, 1) if key == "pixel_values" else array for key, array in arrays.items()]


def printed(module, directory, name, monkeypatch, capsys):
    """What the example prints about the first of the inputs."""
    words = [str(token) for token in TOKENS[0].tolist()] if name != "vit" else []
    if name in {"vit", "clip"}:
        np.save(directory / "image.npy", IMAGES[0].numpy().transpose(1, 2, 0))
        words = [str(directory / "image.npy"), *words]
    words += ["--most", "2"] if name.startswith("t5") else []
    monkeypatch.setattr(sys, "argv", ["example", str(directory), *words])
    module.main()
    return capsys.readouterr().out.split()


def wanted(name, expected, model):
    if name.startswith("t5"):
        said = [0]
        while len(said) <= 2 and said[-1] != 1:
            logits = model(input_ids=TOKENS[:1], decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
        return ["generates:", *map(str, said[1:])]
    if name == "clip":
        return ["alike:", f"{float(expected[0, 0]):.4f}"]
    if name == "vit":
        return ["class:", str(int(expected[0].argmax()))]
    return ["most", "likely:", *map(str, expected[0].argmax(-1).tolist())]


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_transformers_computes(name, tmp_path, monkeypatch, capsys):
    family, make, example, made = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.8)
        asked = inputs(name)
        output = model(**asked)
    expected = output.logits_per_image if name == "clip" else output.logits
    model.save_pretrained(tmp_path / "torch")
    cfmerge.convert(tmp_path / "torch", tmp_path / "flax", names=family)
    module = importlib.import_module(example)
    found = module.load(getattr(module, made), tmp_path / "flax")(*as_arrays(asked))
    assert float(expected.std()) > 0.02
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-4 * float(expected.abs().max()), rtol=0)

    assert printed(module, tmp_path / "flax", name, monkeypatch, capsys) == wanted(name, expected, model)

    cfmerge.convert(tmp_path / "flax", tmp_path / "back", names=family, format="safetensors")
    start, back = open_checkpoint(tmp_path / "torch"), open_checkpoint(tmp_path / "back")
    assert {n: i.shape for n, i in start.tensors.items()} == {n: i.shape for n, i in back.tensors.items()}
    assert all(start.read(name).tobytes() == back.read(name).tobytes() for name in start.tensors)
