"""Small networks of random weights with their tables of spaces, and what they compute: for all tests of `align`."""

import numpy as np

from cfmerge.align import parse_spaces

MLP = {
    "fc0.weight": ((12, 6), "a, in -"), "fc0.bias": ((12,), "a"),
    "fc1.weight": ((9, 12), "b, in a"), "fc1.bias": ((9,), "b"),
    "fc2.weight": ((11, 9), "c, in b"), "fc2.bias": ((11,), "c"),
    "fc3.weight": ((4, 11), "-, in c"), "fc3.bias": ((4,), "-"),
}  # fmt: skip
CONV = {  # a residual block between two convolutions, and a dense layer that reads flattened images of 2 x 2
    "stem": ((8, 3, 3, 3), "c, in -, -, -"), "norm": ((8,), "c"),
    "block.conv1": ((6, 8, 3, 3), "i, in c, -, -"), "block.conv2": ((8, 6, 3, 3), "c, in i, -, -"),
    "last": ((5, 8, 1, 1), "d, in c, -, -"), "bias": ((5,), "d"),
    "fc": ((7, 20), "f, in d 4"), "head": ((3, 7), "-, in f"),
}  # fmt: skip
ATTENTION = {  # three heads of 4; queries and keys keep their order within a head, values do not
    "embed": ((13, 10), "-, h"), "norm": ((10,), "h"),
    "qk": ((24, 10), "2 heads 4, in h"), "v": ((12, 10), "heads heads.v, in h"), "o": ((10, 12), "h, in heads heads.v"),
    "up": ((14, 10), "m, in h"), "down": ((10, 14), "h, in m"), "unembed": ((13, 10), "-, in h"),
}  # fmt: skip
GROUPED = {  # two groups of three query heads of 4, in one fused projection
    "embed": ((13, 10), "-, h"), "qkv": ((40, 10), "kv kv.q 4 + kv 4 + kv kv.v, in h"),
    "o": ((10, 24), "h, in kv kv.q kv.v"), "scale": ((), ""),
}  # fmt: skip
RECURRENT = {"in": ((9, 5), "h, in -"), "step": ((9, 9), "h, in h"), "bias": ((9,), "h"), "out": ((2, 9), "-, in h")}
NETWORKS = {"MLP": MLP, "conv": CONV, "attention": ATTENTION, "grouped": GROUPED, "recurrent": RECURRENT}


def spaces_of(network):
    """The spaces of a network: a name, or a table like those above."""
    network = NETWORKS.get(network, network) if isinstance(network, str) else network
    table = {name: text for name, (_, text) in network.items()}
    return parse_spaces(table, {name: shape for name, (shape, _) in network.items()}, {"kv": 2, "kv.q": 3})


def model_of(network, seed=0, dtype=np.float64):
    """A model of random weights."""
    generator = np.random.default_rng(seed)
    shapes = {name: shape for name, (shape, _) in (NETWORKS[network] if isinstance(network, str) else network).items()}
    return {name: np.asarray(generator.normal(size=shape) / max(shape[-1:], default=1) ** 0.5, dtype)
            for name, shape in shapes.items()}  # fmt: skip


def mlp(model, x):
    """What an MLP whose layers are fc0, fc1, ... makes of inputs `(points, inputs)`."""
    layers = [name.removesuffix(".weight") for name in model if name.endswith(".weight")]
    for layer in layers:
        x = x @ model[f"{layer}.weight"].T + model[f"{layer}.bias"]
        x = np.maximum(x, 0) if layer != layers[-1] else x
    return x


class Lazy(dict):
    """A model that counts how often each tensor is read, and in which order."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)
