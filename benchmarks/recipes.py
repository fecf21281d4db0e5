"""Recipe files for the models of make_llama.py, with all that a method needs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from same_results import EXPERTS, MOMENTS, first_known


def recipe(models: Path, method: str, experts: int, folder: Path | None = None) -> Path:
    """A recipe that merges the base and some experts in `models`; it and what it needs are written to `folder`."""
    folder = folder or models
    count, kind = first_known(method, EXPERTS, experts), first_known(method, MOMENTS, "")
    given = [
        {
            "path": str(models / f"expert_{number}"),
            **({"moments": str(moments(models, number, kind, folder))} if kind else {}),
        }
        for number in range(count)
    ]
    content = {"base": str(models / "base"), "experts": given, "method": method, "allow": ["one-expert"]}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def moments(models: Path, expert: int, kind: str, folder: Path) -> Path:
    """A file of diagonal Fishers or input Grams for an expert, made when it is first asked for."""
    file = folder / f"{kind}_{expert}.safetensors"
    if not file.exists():
        rng, measured = np.random.default_rng(expert), {}
        for name, shape in shapes(models / "base" / "model.safetensors").items():
            if kind == "fisher":
                measured[name] = rng.random(shape, np.float32) + np.float32(0.01)
            elif len(shape) == 2 and ".layers." in name:
                samples = rng.standard_normal((2 * shape[1], shape[1]), np.float32)
                measured[name] = samples.T @ samples / len(samples)
        save_file(measured, file)
    return file


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, from its header."""
    with safe_open(file, "numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def chosen_methods(words: Sequence[str]) -> list[str]:
    """The methods that are named; all that are registered here for `all`."""
    if list(words) != ["all"]:
        return list(words)
    import cfmerge

    return [name for name, entry in cfmerge.methods.registry().items() if entry.kind == "method"]
