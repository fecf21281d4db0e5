"""Builders of training runs: steps of random tensors, in the formats and under the names of several trainers."""

from pathlib import Path

import numpy as np
from laid import laid

import cfmerge


def tensors(step: int, dtype: object = np.float32) -> dict[str, np.ndarray]:
    """The parameters of a step, and a count of updates, which is the step."""
    random = np.random.default_rng(step)
    return {
        "layer.weight": random.standard_normal((5, 3)).astype(dtype),
        "layer.bias": random.standard_normal(5).astype(dtype),
        "updates": np.array([step], np.int64),
    }


def hugging_face(run: Path, steps: tuple[int, ...], dtype: object = np.float32) -> Path:
    for step in steps:
        state = {"optimizer.pt": b"no tensors", "trainer_state.json": {"global_step": step}}
        laid(run / f"checkpoint-{step}", {"model.safetensors": tensors(step, dtype), "config.json": {}, **state})
    return run


def lightning(run: Path, steps: tuple[int, ...]) -> Path:
    import torch

    run.mkdir(parents=True)
    for epoch, step in enumerate(steps):
        state = {name: torch.from_numpy(array) for name, array in tensors(step).items()}
        content = {"epoch": epoch, "global_step": step, "state_dict": state, "optimizer_states": [{"lr": 0.1}]}
        torch.save(content, run / f"epoch={epoch}-step={step}.ckpt")
    return run


def distributed(run: Path, steps: tuple[int, ...], name: str) -> Path:
    """Steps of torchtitan or Megatron, as torch saves them, with an object that is no tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    for step in steps:
        state = {name: torch.from_numpy(array) for name, array in tensors(step).items()}
        state["layer._extra_state"] = {"scale": step}
        dcp.save({"model": state, "step": step}, checkpoint_id=run / name.format(step), no_dist=True)
    return run


def orbax(run: Path, steps: tuple[int, ...]) -> Path:
    for step in steps:
        cfmerge.save(tensors(step), run / str(step), "orbax")
    return run


def mean_of(steps: tuple[int, ...], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The weighted sum of the parameters, in float64."""
    return {
        name: sum(c * tensors(step)[name].astype(np.float64) for step, c in zip(steps, weights, strict=True))
        for name in ("layer.weight", "layer.bias")
    }


def assert_mean(found: dict, steps: tuple[int, ...], weights: np.ndarray, prefix: str = "") -> None:
    for name, expected in mean_of(steps, weights).items():
        np.testing.assert_allclose(np.asarray(found[prefix + name], np.float64), expected, rtol=0, atol=5e-7)
