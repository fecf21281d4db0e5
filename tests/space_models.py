"""Tiny transformers models with random parameters, on disk, and what they compute."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

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
    randomise(model)
    model.save_pretrained(path)
    return path


def randomise(model: nn.Module) -> None:
    """Gives a model's parameters and BatchNorms random values, so that no two neurons are alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if re.search(r"(?i)norm|ln_|bn|downsample.1", name) and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * noise)
        for name, buffer in model.named_buffers():  # BatchNorm's
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))


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
    save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, to / "model.safetensors",
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
    with torch.no_grad():
        out = model.eval()(**_asked(kind, model))
    parts = [value.flatten().numpy() for key, value in out.items() if "logits" in key]
    return np.concatenate(parts) if parts else out.last_hidden_state.numpy()


def _asked(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 8)
    asked = {
        "input_ids": torch.randint(3, 20, (2, 7), generator=generator),
        "pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64),
    }
    if kind == "CLIPModel":
        return asked
    asked = {model.main_input_name: asked[model.main_input_name]}
    return asked | ({"decoder_input_ids": asked["input_ids"][:, :3]} if model.config.is_encoder_decoder else {})


class Block(nn.Module):
    """A block of torchvision's ResNets; `wide`: of three convolutions."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, wide: bool):
        super().__init__()
        ends = [inputs, width, width, outputs] if wide else [inputs, width, outputs]
        self.steps = len(ends) - 1
        for step, (before, after) in enumerate(pairwise(ends), 1):
            size = 1 if wide and step != 2 else 3
            jump = stride if step == (2 if wide else 1) else 1
            self.add_module(f"conv{step}", nn.Conv2d(before, after, size, jump, size // 2, bias=False))
            self.add_module(f"bn{step}", nn.BatchNorm2d(after))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for step in range(1, self.steps + 1):
            y = getattr(self, f"bn{step}")(getattr(self, f"conv{step}")(y))
            y = y.relu() if step < self.steps else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchvisionResNet(nn.Module):
    """A small ResNet with the names of torchvision's: resnet18's blocks, or resnet50's."""

    def __init__(self, wide: bool):
        super().__init__()
        growth = 2 if wide else 1
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6)
        before = 6
        for stage, width in enumerate((6, 8, 10, 12), 1):
            blocks = [Block(before if block == 0 else width * growth, width, width * growth,
                            2 if block == 0 and stage > 1 else 1, wide) for block in range(2)]  # fmt: skip
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            before = width * growth
        self.fc = nn.Linear(before, 3)
        randomise(self.double().eval())

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))
