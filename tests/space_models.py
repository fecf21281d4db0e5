"""Tiny transformers models with random parameters, on disk, and what they compute."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

TEXT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip


def saved(path: Path, kind: str, config: str | None = None, **settings) -> Path:
    """The directory of a model of a class of transformers, whose parameters are all random."""
    config = config or kind.partition("For")[0].removesuffix("Model").removesuffix("LMHead") + "Config"
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * noise)
        for name, buffer in model.named_buffers():  # BatchNorm's
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    model.save_pretrained(path)
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


def headers_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors_of(path).items()}


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def with_tensors(path: Path, to: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(path, to, dirs_exist_ok=True)
    # a column-major array would be written as it lies
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, to / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return to


def outputs(path: Path, kind: str) -> np.ndarray:
    """What a model computes, of one batch: its logits, or else its states. All tensors must be the class's."""
    more = {"experts_implementation": "eager"} if "num_experts_per_tok" in config_of(path) else {}  # in float64
    load = getattr(transformers, kind).from_pretrained
    model, info = load(path, dtype=torch.float64, output_loading_info=True, **more)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (2, 7), generator=generator)
    pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    asked = {"input_ids": ids, "pixel_values": pixels}
    if kind != "CLIPModel":
        asked = {model.main_input_name: asked[model.main_input_name]}
    with torch.no_grad():
        out = model.eval()(**asked)
    parts = [value.flatten().numpy() for key, value in out.items() if "logits" in key]
    return np.concatenate(parts) if parts else out.last_hidden_state.numpy()
