"""Collects joint feature moments of two torch models by forward hooks, and reads off how their neurons correspond.

    python examples/zipit_torch.py [MOMENTS.safetensors]

The second model is the first one with its neurons in another order, which only its activations tell. Both run on the
same unlabelled batches. What the layers that read a space are given are its features: behind ReLU and pooling, of a
convolution every place is a token. The file is the one that `collect_joint_linen` writes for Flax models.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from cfmerge import align

# Which axes are the same neurons: conv writes `c`, hidden reads it (flattened, 4 places a channel) and writes `h`.
TABLE = {
    "conv.weight": "c, in -, -, -", "conv.bias": "c", "hidden.weight": "h, in c 4", "hidden.bias": "h",
    "out.weight": "-, in h", "out.bias": "-",
}  # fmt: skip


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.MaxPool2d(4)
        self.hidden, self.out = torch.nn.Linear(24, 16), torch.nn.Linear(16, 10)

    def forward(self, images):
        places = self.pool(torch.relu(self.conv(images)))
        return self.out(torch.relu(self.hidden(places.flatten(1))))


def features(inputs, layer):
    """`{space: (tokens, features)}` of a layer's inputs."""
    if layer == "hidden":
        return {"c": inputs.unflatten(1, (6, 4)).movedim(1, -1).flatten(0, 1)}
    return {"h": inputs}


def collect(models, batches):
    """Joint moments of the models, which see the same batches."""
    moments, seen = align.Moments(models), {name: {} for name in models}

    def hook(name, layer):
        return lambda module, inputs: seen[name].update(features(inputs[0], layer))

    handles = [
        model.get_submodule(layer).register_forward_pre_hook(hook(name, layer))
        for name, model in models.items()
        for layer in ("hidden", "out")
    ]
    with torch.inference_mode():
        for batch in batches:
            for model in models.values():
                model(batch)
            for space in ("c", "h"):
                moments.add(space, [seen[name][space].cpu() for name in models])
    for handle in handles:
        handle.remove()
    return moments


def with_weights(weights):
    model = Model().eval()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()})
    return model


def main(path):
    torch.manual_seed(0)
    first = Model().eval()
    weights = {name: tensor.numpy() for name, tensor in first.state_dict().items()}
    spaces = align.parse_spaces(TABLE, {name: array.shape for name, array in weights.items()})
    permutations = align.random_permutations(spaces, seed=1)
    second = with_weights(align.permute(spaces, weights, permutations))
    batches = torch.randn(8, 32, 1, 8, 8)
    with torch.inference_mode():
        print(f"the models differ by    {(first(batches[0]) - second(batches[0])).abs().max().item():.6f}")

    collect({"first": first, "second": second}, batches).save(path)
    moments = align.Moments.load(path)
    for space in moments.spaces:
        own, other = moments.slices(space)
        block = moments.correlation(space)[other, own]  # the second model's features by the first's
        found = block.argmax(axis=1)
        right = np.mean(found == permutations[space])
        print(f"{space}: {moments.of(space).count} tokens, found    {right:.2f}")
