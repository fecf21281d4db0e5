"""Small torch models, their adapters by peft, and what peft's `merge_and_unload` makes of both."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """The experts of a mixture, in packed parameters; `turned`: stored (in, out), as gpt-oss has them."""

    def __init__(self, count: int, wide: int, narrow: int, turned: bool = False):
        super().__init__()
        up, down = (2 * wide, narrow), (narrow, wide)
        self.is_transposed = turned
        self.gate_up_proj = nn.Parameter(torch.randn(count, *(up[::-1] if turned else up)))
        self.down_proj = nn.Parameter(torch.randn(count, *(down[::-1] if turned else down)))

    def forward(self, x):
        return x


class Tiny(nn.Module):
    """One module of every kind that LoRA takes."""

    def __init__(self, turned: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 10)
        self.square = nn.Linear(6, 6)
        self.plain = nn.Linear(10, 6, bias=False)
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.point = nn.Conv2d(5, 4, 1)
        self.conv_line = nn.Conv1d(4, 7, 3)
        self.norm = nn.LayerNorm(6)
        self.post_norm = nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2)
        self.mlp = nn.Module()
        self.mlp.c_fc = Conv1D(8, 6)
        self.mlp.c_proj = Conv1D(6, 6)
        self.mlp.experts = Experts(3, 5, 6, turned)
        self.score = nn.Linear(6, 2)

    def forward(self, x):
        return x


def tiny(seed: int = 0, turned: bool = False) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny(turned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def saved(model: nn.Module, path: Path, config: dict | None = None) -> Path:
    """A model's directory."""
    path.mkdir(parents=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def adapter(model: nn.Module, path: Path, seed: int = 1, change=None, **config) -> dict[str, np.ndarray]:
    """Saves an adapter with random factors over a copy of the model; what peft makes of both, by name.

    Args:
        change: called with the peft model, to train what lies beside the factors.
        **config: of `LoraConfig`.
    """
    torch.manual_seed(seed)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
                if "magnitude" in name:
                    parameter.abs_()
    if change:
        change(tuned)
    tuned.save_pretrained(path)
    merged = tuned.merge_and_unload()
    return {name: tensor.detach().float().numpy().copy() for name, tensor in merged.state_dict().items()}
