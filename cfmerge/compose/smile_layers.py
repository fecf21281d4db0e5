"""The layers of SMILE beside a model: out of their parts, what all of them cost, whether one fits its weight."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cfmerge.compose.smile import Cost, Layer
from cfmerge.errors import CfmergeError

WEIGHT = re.compile(r"(weight|kernel)$")


def layers_of(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Layer]:
    """`{name of a weight: Layer}` out of `{tensor: {part: array}}`, as a composed result holds them.

    A weight has the parts `up`, `router` and perhaps `down`; the bias beside it, called `bias` where the weight is
    called `weight` or `kernel`, has the part `bias`. Parts of other names are no layers' and are passed over.

    Raises:
        CfmergeError: a bias whose weight has no experts.
    """
    layers = {name: Layer(own["up"], own.get("down"), own["router"]) for name, own in parts.items() if "up" in own}
    weights = {bias_of(name): name for name in layers}
    for name in (name for name, own in parts.items() if "bias" in own):
        if name not in weights:
            raise CfmergeError(f"smile: the bias {name!r} has experts, and the weight beside it has none")
        up, bias = layers[weights[name]].up, parts[name]["bias"]
        if up.ndim == 3:
            bias = bias.reshape(*up.shape[:2])
        else:  # stacked layers come first
            bias = bias.reshape(up.shape[1], up.shape[0], up.shape[2]).swapaxes(0, 1)
        layers[weights[name]] = layers[weights[name]]._replace(bias=bias)
    return layers


def bias_of(name: str) -> str:
    """The name that the bias of the layer with this weight has."""
    return WEIGHT.sub("bias", name)


class Costs(NamedTuple):
    """What a composed model holds, in parameters, and what it computes for one token, in floating-point operations."""

    parameters: Cost
    flops: Cost


def cost(layers: Mapping[str, Layer], params: Any = None) -> Costs:
    """What a model of these layers costs: `cost.parameters.total / cost.parameters.base` is how many times the base's.

    Arrays are counted by their shapes; `jax.ShapeDtypeStruct` will do. The operations are those of the layers alone,
    without attention and the like, and all experts are computed, as in `added`.

    Args:
        params: the base's parameters, a tree, so that all of them are counted; None: those of the layers alone.
    """
    base = experts = router = 0
    for layer in layers.values():
        m, n = layer.up.shape[-2], layer.router.shape[-1]
        stacked = layer.up.size // math.prod(layer.up.shape[-3:])
        base += stacked * (m * n + (layer.bias is not None) * m)
        experts += sum(part.size for part in (layer.up, layer.down, layer.bias) if part is not None)
        router += layer.router.size
    whole = base if params is None else sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return Costs(Cost(whole, experts, router), Cost(2 * base, 2 * experts, 2 * router))


def check_layer(
    name: str, layer: Layer, kernel: tuple[int, ...], m: int, n: int, stacked: tuple[int, ...] = ()
) -> None:
    """Raises an error unless the arrays of a layer fit a weight of `m` outputs and `n` inputs.

    Args:
        kernel: the weight's shape, to be told.
        stacked: axes in front of the layer's own, where layers are stacked.
    """
    experts, g = layer.router.shape[-3:-1] if layer.router.ndim > 2 else (0, 0)
    k = n if layer.down is None else layer.down.shape[-2]
    expected = {
        "up": (*stacked, experts, m, k), "down": (*stacked, experts, k, n),
        "router": (*stacked, experts, g, n), "bias": (*stacked, experts, m),
    }  # fmt: skip
    for part, array in layer._asdict().items():
        if array is not None and array.shape != expected[part]:
            raise CfmergeError(
                f"smile: {name!r}: the weight has shape {kernel}, so {part!r} must have shape {expected[part]}, "
                f"found {array.shape}; was it built for another model?"
            )
