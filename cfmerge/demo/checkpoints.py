"""Where the demo's models lie on disk: `model.safetensors` and `config.json`, a directory each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cfmerge.demo.model import Params, Trunk, flatten, unflatten
from cfmerge.errors import CfmergeError

MODEL_TYPE = "cfmerge-demo"


def prepare_output(output: Path, *, overwrite: bool) -> None:
    """Makes the output directory.

    Raises:
        CfmergeError: something is there, and either `overwrite` is not set or it is not an earlier demo.
    """
    if output.exists() and not output.is_dir():
        raise CfmergeError(f"output {output}: is a file; name a directory")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise CfmergeError(f"output {output}: exists already; name another, or pass --overwrite")
        if not (output / "heads.safetensors").exists():
            raise CfmergeError(f"output {output}: exists and does not hold a demo; it is not overwritten")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CfmergeError(f"output {output}: cannot be made: {error}") from error


def save_heads(path: Path, heads: Mapping[str, np.ndarray]) -> None:
    """Writes the frozen heads, `(classes, dim)` each, under their tasks' names."""
    save_file(dict(heads), path)


def save_model(directory: Path, trunk: Trunk, params: Params) -> None:
    """Writes the trunk's parameters, named by their path, and the architecture."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in flatten(params).items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(trunk), indent=2) + "\n")


def config(trunk: Trunk) -> dict[str, Any]:
    """The architecture, as `config.json` holds it."""
    sizes = {"dim": trunk.dim, "hidden": trunk.hidden, "depth": trunk.depth, "image_size": 28}
    return {"model_type": MODEL_TYPE, "architectures": ["Trunk"], **sizes}


def load_model(directory: Path) -> Params:
    """The parameters in a directory that `save_model` or a merge has written."""
    return unflatten(load_file(directory / "model.safetensors"))
