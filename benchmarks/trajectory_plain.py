"""The plain way to a mean of checkpoints, for `trajectory.py`: all of them in memory, float32 sums, one file saved.

python benchmarks/trajectory_plain.py torch | numpy OUT CHECKPOINT ...
"""

import sys
from pathlib import Path


def with_torch(paths: list[Path], output: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    states = [load_file(path) for path in paths]
    merged = {}
    for name, first in states[0].items():
        total = torch.zeros_like(first, dtype=torch.float32)
        for state in states:
            total += state[name].float() / len(states)
        merged[name] = total.to(first.dtype)
    save_file(merged, output, metadata={"format": "pt"})


def with_numpy(paths: list[Path], output: Path) -> None:
    import ml_dtypes  # noqa: F401 (bfloat16)
    import numpy as np
    from safetensors.numpy import load_file, save_file

    states = [load_file(path) for path in paths]
    merged = {}
    for name, first in states[0].items():
        total = np.zeros(first.shape, np.float32)
        for state in states:
            total += state[name].astype(np.float32) / np.float32(len(states))
        merged[name] = total.astype(first.dtype)
    save_file(merged, output, metadata={"format": "pt"})


if __name__ == "__main__":
    library, target, *checkpoints = sys.argv[1:]
    ways = {"torch": with_torch, "numpy": with_numpy}
    ways[library]([Path(one) / "model.safetensors" for one in checkpoints], Path(target))
