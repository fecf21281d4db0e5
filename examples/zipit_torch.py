"""Zips two torch models into one trunk with two heads, by features that forward hooks collect (ZipIt!).

    python examples/zipit_torch.py [MOMENTS.safetensors]

The second model has the first one's features in another order, and an output layer of its own, as for another task.
Both run on the same unlabelled batches. The features of a space are what the layers that read it are given, behind ReLU
and pooling; every place of an image is a token. Their joint moments are one file, as of the Flax models that
`cfmerge.activations.collect_joint_linen` runs.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from cfmerge import align

TABLE = {  # `conv` writes the space c; `hidden` reads it, 4 places a channel, and writes h, which `out` reads
    "conv.weight": "c, in -, -, -",
    "conv.bias": "c",
    "hidden.weight": "h, in c 4",
    "hidden.bias": "h",
    "out.weight": "-, in h",
    "out.bias": "-",
}
FEATURES = {  # of the layers that read a space: its name, and `(tokens, features)` of their inputs
    "hidden": ("c", lambda inputs: inputs.unflatten(1, (6, 4)).movedim(1, -1).flatten(0, 1)),
    "out": ("h", lambda inputs: inputs),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.MaxPool2d(4)
        self.hidden, self.out = torch.nn.Linear(24, 16), torch.nn.Linear(16, 10)

    def forward(self, images):
        channels = self.pool(torch.relu(self.conv(images)))
        return self.out(torch.tanh(self.hidden(channels.flatten(1))))


def collect(models, batches):
    """The joint moments of the models, which see the same batches."""
    moments, seen = align.Moments(models), {}

    def hook(name, space, features):
        return lambda module, inputs: seen.update({(name, space): features(inputs[0]).cpu()})

    handles = [
        model.get_submodule(layer).register_forward_pre_hook(hook(name, space, features))
        for name, model in models.items()
        for layer, (space, features) in FEATURES.items()
    ]
    with torch.inference_mode():
        for batch in batches:
            for model in models.values():
                model(batch)
            for space, _ in FEATURES.values():
                moments.add(space, [seen[name, space] for name in models])
    for handle in handles:
        handle.remove()
    return moments


def weights_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def model_of(weights):
    model = Model().eval()
    model.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return model


def make_models():
    """Two models, their spaces, and the order of the second one's neurons, which nothing below is told."""
    torch.manual_seed(0)
    first, other = Model().eval(), Model()
    weights = weights_of(first)
    spaces = align.parse_spaces(TABLE, {name: weight.shape for name, weight in weights.items()})
    order = align.random_permutations(spaces, seed=1)
    output = {name: weight for name, weight in weights_of(other).items() if name.startswith("out.")}
    return first, model_of({**align.permute(spaces, weights, order), **output}), spaces, order


def main(path):
    first, second, spaces, order = make_models()
    models = {"first": first, "second": second}
    batches = torch.randn(8, 32, 1, 8, 8)
    collect(models, batches).save(path)

    moments = align.Moments.load(path)
    for space in moments.spaces:
        own, others = moments.slices(space)
        found = moments.correlation(space)[others, own].argmax(axis=1)  # the first model's nearest to the second's
        print(f"neurons of {space} that are found  {np.mean(found == order[space]):.2f}")

    weights = {name: weights_of(model) for name, model in models.items()}
    zipped = align.zip_models(spaces, weights, moments)
    average = {name: (weights["first"][name] + weights["second"][name]) / 2 for name in TABLE}
    trunk = {name: average[name] for name in zipped.trunk}
    with torch.inference_mode():
        for name, model in models.items():
            expected = model(batches[0])
            for how, merged in (("zipped", zipped.model(name)), ("averaged", {**weights[name], **trunk})):
                error = (model_of(merged)(batches[0]) - expected).abs().max().item()
                print(f"{name}, {how}, off by  {error:.6f}")
    held = [sum(np.size(w) for w in own.values()) for own in (*weights.values(), zipped.trunk, *zipped.heads.values())]
    print(f"numbers of both models  {held[0] + held[1]}")
    print(f"numbers of the zip  {sum(held[2:])}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "moments.safetensors")
