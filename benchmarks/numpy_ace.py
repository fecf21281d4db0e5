"""ACE with NumPy alone, as one would write it for a script: a yardstick of `benchmarks/peers.py`.

    python benchmarks/numpy_ace.py BASE EXPERT [EXPERT ...] -o OUT

The same algorithm as cfmerge's (streamed sums of Gram, cross term and total; Cholesky and rank-one correction;
relative ridge; homogeneous branch), the same tensors by ACE and by averaging, one tensor after the other.
"""

import argparse
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy learns bfloat16)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


def ace(base: np.ndarray, experts: list, eps_rel: float = 0.07) -> np.ndarray:
    m, n = base.shape
    gram, cross, total = np.zeros((n, n), np.float32), np.zeros((m, n), np.float32), np.zeros((m, n), np.float32)
    for expert in experts:
        delta = expert().astype(np.float32) - base
        rows = delta - delta.mean(axis=0)
        covariance = rows.T @ rows
        gram += covariance
        cross += (delta @ rows.T) @ rows if 2 * m < n else delta @ covariance
        total += delta
    eps = eps_rel * np.trace(gram) / (len(experts) * n)
    lam = eps * len(experts)
    rhs = cross + eps * total
    rhs -= rhs.mean(axis=0)
    system = gram + lam * np.eye(n, dtype=np.float32)
    # numpy.linalg has no triangular solve: its general solve factorises once for all right-hand sides
    solution = np.linalg.solve(system, np.concatenate([rhs, np.ones((1, n), np.float32)]).T).T
    x_0, y = solution[:-1], solution[-1]
    row = (1 - lam * y) / n
    return x_0 - np.outer(x_0.sum(axis=1), row) / (1 + row.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    base, *experts = (safe_open(path / "model.safetensors", framework="numpy") for path in args.models)
    merged = {}
    for name in base.keys():  # noqa: SIM118
        weight = base.get_tensor(name)
        wide = weight.astype(np.float32)
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            delta = ace(wide, [lambda e=expert, n=name: e.get_tensor(n) for expert in experts])
        else:
            delta = sum(expert.get_tensor(name).astype(np.float32) - wide for expert in experts) / len(experts)
        merged[name] = (wide + delta).astype(weight.dtype)
    args.output.mkdir(parents=True)
    save_file(merged, args.output / "model.safetensors", {"format": "pt"})
    shutil.copy(args.models[0] / "config.json", args.output)


if __name__ == "__main__":
    main()
