"""Runs a SMILE composition that cfmerge wrote in a transformers model, with safetensors and json alone.

    python examples/smile_torch.py COMPOSITION MODEL        a directory of each; MODEL is the base
    python examples/smile_torch.py                          on a tiny GPT-2 and three experts that it makes

In a program of your own: `upscale(model, "COMPOSITION")` on the base, of whatever class you use, and run it as before.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D


class SmileLinear(torch.nn.Module):
    """A linear layer, and the experts that each token chooses among by the norms of its routers."""

    def __init__(self, base, up, down, router, bias, top_k):
        super().__init__()
        self.base, self.top_k = base, top_k
        for name, array in {"up": up, "down": down, "shift": bias}.items():
            self.register_buffer(name, None if array is None else array.to(base.weight))
        self.register_buffer("router", router.to(base.weight.device, torch.float32))

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        norms = torch.einsum("...n,ign->...ig", x.to(self.router.dtype), self.router).norm(dim=-1)
        chosen = norms.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]  # of equal ones the first
        weights = torch.zeros_like(norms).scatter(-1, chosen, norms.gather(-1, chosen).softmax(-1)).to(x.dtype)
        inner = x[..., None, :] if self.down is None else torch.einsum("...n,ikn->...ik", x, self.down)
        out = self.base(x) + torch.einsum("...ik,imk->...m", inner * weights[..., None], self.up)
        return out if self.shift is None else out + weights @ self.shift


def read(directory):
    """`(composition.json, {name: tensor})` of a composition."""
    told = json.loads((directory / "composition.json").read_text())
    if [told.get(key) for key in ("format", "version", "system")] != ["cfmerge-composition", 1, "smile"]:
        raise SystemExit(f"{directory}: is not a SMILE composition, version 1, of cfmerge")
    return told, {key: value for file in directory.glob("model*.safetensors") for key, value in load_file(file).items()}


def upscale(model, directory):
    """Gives the model's linear layers the experts of a composition, in place; returns the layers' names."""
    told, arrays = read(Path(directory))
    prefix = model.base_model_prefix + "."

    def find(name):  # a model with a head has a prefix that one without lacks
        return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), name)

    modules = dict(model.named_modules())
    weights = [name for name, tensor in told["tensors"].items() if "up" in tensor["parts"]]
    for name in weights:
        module, tensor = find(name.rpartition(".")[0]), told["tensors"][name]
        base = modules.get(module)
        if not isinstance(base, torch.nn.Linear | Conv1D) or list(base.weight.shape) != tensor["shape"]:
            raise SystemExit(f"{name}: a Linear or Conv1D of shape {tensor['shape']} is needed, found {base}")
        parts = [arrays.pop(f"{part}/{name}", None) for part in ("up", "down", "router")]
        bias = arrays.pop(f"bias/{name.removesuffix('weight')}bias", None)
        model.set_submodule(module, SmileLinear(base, *parts, bias, told["parameters"]["top_k"]))
    for name in [name for name in arrays if name.startswith("mean/")]:  # what else is the mean of the experts
        module, own = name.removeprefix("mean/").rsplit(".", 1)
        getattr(modules[find(module)], own).data += arrays.pop(name)
    if arrays:
        raise SystemExit(f"{directory}: not for a layer of the model: {', '.join(sorted(arrays)[:4])}")
    return weights


def report(model, directory):
    """The model with its experts; prints what it holds."""
    before, layers = sum(p.numel() for p in model.parameters()), upscale(model, directory)
    after = before + sum(b.numel() for m in model.modules() if isinstance(m, SmileLinear) for b in m.buffers(False))
    print(f"{len(layers)} layers have experts: {after:,} parameters, {after / before:.2f} times the base's")
    return model


def make(directory, base, experts, rank):
    """A composition of some models, as `cfmerge compose smile` makes it of their directories."""
    from cfmerge import compose

    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(directory / name)
    tasks = {name: directory / name for name in experts}
    compose.build(directory / "base", tasks, f"smile(rank={rank}, gate=2)", output=directory / f"rank-{rank}")
    return directory / f"rank-{rank}"


def demonstrate(directory):
    """Of three experts, and of one with all of its rank: alone in a composition, it is that model itself."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2Model(GPT2Config(**small)).eval().requires_grad_(False)
    experts = {name: copy.deepcopy(base) for name in ("math", "code", "law")}
    for expert in experts.values():
        for parameter in (p for name, p in expert.named_parameters() if ".c_" in name):
            parameter += 0.1 * torch.randn_like(parameter)
    report(copy.deepcopy(base), make(directory, base, experts, rank=4))
    model = report(copy.deepcopy(base), make(directory, base, {"math": experts["math"]}, rank=16))
    expected, before, found = (one(torch.arange(16)[None])[0] for one in (experts["math"], base, model))
    print(f"the base, off by  {(before - expected).abs().max():.7f}")
    print(f"one expert of all of its rank, off by  {(found - expected).abs().max():.7f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        report(AutoModel.from_pretrained(sys.argv[2]), sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            demonstrate(Path(folder))
