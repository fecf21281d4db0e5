"""Models of several parts, and single files of other libraries: merged part by part, and loaded by their own client."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer import modules

import cfmerge


def moved(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model, its parameters a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def mean_of(models: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    states = [model.state_dict() for model in models]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def assert_close(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


# --- diffusers ---------------------------------------------------------------------------------------------------


def pipeline(path: Path, seed: int, how: dict) -> object:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = diffusers.VQModel(block_out_channels=[8], norm_num_groups=4, latent_channels=3, num_vq_embeddings=8)
    model = diffusers.LDMPipeline(vqvae=moved(vqvae, seed), unet=moved(unet, seed), scheduler=diffusers.DDIMScheduler())
    model.save_pretrained(path, **how)
    return model


@pytest.mark.parametrize("how", [{}, {"safe_serialization": False}])
def test_a_diffusers_pipeline(tmp_path, how):
    base, *experts = [pipeline(tmp_path / name, seed, how) for seed, name in enumerate("bcd")]
    out = tmp_path / "out"
    cfmerge.merge(tmp_path / "b", [tmp_path / "c", tmp_path / "d"], "average", output=out)
    suffix = "bin" if how else "safetensors"
    assert {file.name for file in (out / "unet").iterdir()} == {
        "config.json", f"diffusion_pytorch_model.{suffix}"
    }  # fmt: skip
    merged = diffusers.LDMPipeline.from_pretrained(out)
    assert_close(merged.unet, mean_of([one.unet for one in experts]))
    assert_close(merged.vqvae, mean_of([one.vqvae for one in experts]))

    chosen = cfmerge.merge(
        tmp_path / "b", [tmp_path / "c", tmp_path / "d"], "average", output=tmp_path / "one", components=["unet"]
    )
    merged = diffusers.LDMPipeline.from_pretrained(tmp_path / "one")
    assert_close(merged.unet, mean_of([one.unet for one in experts]))
    assert_close(merged.vqvae, base.vqvae.state_dict())
    assert any("vqvae/: copied from the base, not merged" in note for note in chosen.notes)
    with pytest.raises(cfmerge.CfmergeError, match="no folder 'vae' with weights; it has unet, vqvae"):
        cfmerge.plan(tmp_path / "b", [tmp_path / "c", tmp_path / "d"], components=["vae"])


# --- sentence-transformers ---------------------------------------------------------------------------------------


def sentence_model(path: Path, seed: int) -> object:
    """A BERT, pooling, and a dense layer in 2_Dense/."""
    inner = path.with_name(path.name + "-bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    moved(transformers.BertModel(config), seed).save_pretrained(inner)
    (inner / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    transformers.BertTokenizer(str(inner / "vocab.txt")).save_pretrained(inner)
    words = modules.Transformer(str(inner), max_seq_length=16)
    pooling = modules.Pooling(8)
    dense = moved(modules.Dense(8, 4), seed)
    model = sentence_transformers.SentenceTransformer(modules=[words, pooling, dense], device="cpu")
    model.save(str(path))
    return model


def test_a_sentence_transformer_with_a_dense_module(tmp_path):
    _, *experts = [sentence_model(tmp_path / name, seed) for seed, name in enumerate("bcd")]
    cfmerge.merge(tmp_path / "b", [tmp_path / "c", tmp_path / "d"], "average", output=tmp_path / "out")
    merged = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_close(merged, mean_of(experts))
    assert merged.encode(["a b c"]).shape == (1, 4)


# --- single files ------------------------------------------------------------------------------------------------

SINGLE = {  # a file's name: names of tensors as that library writes them, and its metadata
    "sd_xl.safetensors": (
        {
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (4, 6),
            "model.diffusion_model.time_embed.0.weight": (6, 4),
            "first_stage_model.decoder.conv_in.weight": (4, 2, 3, 3),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (6, 4),
        },
        {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "base"},
    ),
    "open_clip_model.safetensors": (
        {
            "visual.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
            "transformer.resblocks.0.mlp.c_fc.weight": (8, 4),
            "visual.proj": (4, 3),
            "logit_scale": (),
        },
        {},
    ),
}


@pytest.mark.parametrize("file", SINGLE)
def test_a_single_file_keeps_its_names_and_metadata(tmp_path, file):
    shapes, metadata = SINGLE[file]
    paths = [tmp_path / name / file for name in "bcd"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        generator = torch.Generator().manual_seed(seed)
        save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path, metadata)
    cfmerge.merge(paths[0], paths[1:], "average", output=tmp_path / "out.safetensors")
    found, experts = load_file(tmp_path / "out.safetensors"), [load_file(path) for path in paths[1:]]
    assert set(found) == set(shapes)
    for name in shapes:
        np.testing.assert_allclose(found[name], (experts[0][name] + experts[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert metadata.items() <= cfmerge.open_checkpoint(tmp_path / "out.safetensors").metadata.items()
    cfmerge.merge(paths[0].parent, [path.parent for path in paths[1:]], "average", output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file, "README.md"}


def test_dense_layers_called_embed_are_matrices(tmp_path):
    shapes, _ = SINGLE["sd_xl.safetensors"]
    path = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    other = tmp_path / "n.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, other)
    plan = cfmerge.plan(path, [other], allow=["one-expert"])
    assert {job.name for job in plan.jobs if job.parameter.kind == "matrix"} >= {
        "model.diffusion_model.time_embed.0.weight", "model.diffusion_model.input_blocks.1.1.proj_in.weight",
    }  # fmt: skip
