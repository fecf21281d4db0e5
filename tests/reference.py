"""Merging written a second time, in plain NumPy float64, to check cfmerge against. It shares no code with it.

`ace` is specs/ace.md section 2 read literally: an explicit covariance for every expert, an explicit rank-one
prior `1 c`, the general inverse of the non-symmetric `A`, a thin SVD. Slow, and easy to compare with the paper.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray
State = Mapping[str, Array]

# What happens to a tensor. Stored as (out, in), as (in, out), or as a convolution (out, in, height, width):
LINEAR, CONV1D, CONVOLUTION = "linear", "conv1d", "convolution"
MEAN = "mean"  # base plus the mean of the deltas, whatever the method
BUFFER = "buffer"  # a running statistic: averaged by every method
BASE = "base"  # the base's own


def ace(
    deltas: Sequence[Array],
    *,
    eps: float | None = None,
    eps_rel: float = 0.07,
    tau: float = 0.3,
    k_frac: float = 0.3,
    told: dict[str, Any] | None = None,
) -> Array:
    """The merged delta of one canonical (out, in) weight. `told` receives the gate and the branch."""
    deltas = [np.asarray(delta, np.float64) for delta in deltas]
    m, n = deltas[0].shape
    deltas = [d for d in deltas if np.sum((d - d.mean(axis=0)) ** 2) > 1e-7 * np.sum(d**2)]
    if not deltas:
        return np.zeros((m, n))
    count = len(deltas)

    energies = [float(np.sum(d * d)) for d in deltas]
    logs = [math.log(energy + 1e-12) for energy in energies]
    mean_log = sum(logs) / count
    variance = sum((log - mean_log) ** 2 for log in logs) / (count - 1) if count > 1 else 0.0
    gate = variance / (mean_log**2 + 1e-12)
    heterogeneous = gate > tau
    mean_energy = sum(energies) / count
    if told is not None:
        told.update(gate=gate, heterogeneous=heterogeneous, counted=count)

    centred = [d - d.mean(axis=0, keepdims=True) for d in deltas]
    covariances = [w.T @ w for w in centred]
    traces = [float(np.trace(c)) + 1e-12 for c in covariances]
    if heterogeneous:
        s = [c / trace for c, trace in zip(covariances, traces, strict=True)]
        ridges = [eps_rel / n if eps is None else eps / trace for trace in traces]
    else:
        s = covariances
        absolute = eps_rel * float(np.trace(sum(covariances))) / (count * n) if eps is None else eps
        ridges = [absolute] * count
    r = [s_t + e_t * np.eye(n) for s_t, e_t in zip(s, ridges, strict=True)]

    c = np.ones((1, n)) @ sum(s) / n
    if heterogeneous:
        c = c / (mean_energy + 1e-12)
    a = sum(r) + np.ones((n, 1)) @ c
    b = sum(w @ r_t for w, r_t in zip(centred, r, strict=True))
    x = b @ np.linalg.inv(a)

    if heterogeneous:
        mean_r = sum(r) / count
        residual = sum(d @ (s_t - mean_r) for d, s_t in zip(deltas, s, strict=True))
        u, values, vt = np.linalg.svd(x + residual, full_matrices=False)
        k = min(int(Fraction(str(k_frac)) * min(m, n)), int(np.sum(values > 1e-6 * values[0])))
        if k:
            x = x + values[:k].mean() * u[:, :k] @ vt[:k]
    return x


def average(deltas: Sequence[Array]) -> Array:
    return sum(np.asarray(delta, np.float64) for delta in deltas) / len(deltas)


def kinds_of(names: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    """The kind of every name from a table of glob patterns; each name must match one and only one of them."""
    kinds = {}
    used = set()
    for name in names:
        matching = [pattern for pattern in table if fnmatch.fnmatchcase(name, pattern)]
        assert len(matching) == 1, f"{name!r} matches {matching}"
        used.add(matching[0])
        kinds[name] = table[matching[0]]
    assert used == set(table), f"patterns that match nothing: {sorted(set(table) - used)}"
    return kinds


def merge_state(
    base: State,
    experts: Sequence[State],
    kinds: Mapping[str, str],
    merge_matrix: Callable[[Sequence[Array]], Array] = ace,
    merge_rest: Callable[[Sequence[Array]], Array] = average,
) -> dict[str, Array]:
    """A whole state dict, `base + merged delta` in float64: matrices by `merge_matrix`, buffers by the mean."""
    merged = {}
    for name, kind in kinds.items():
        tensor = np.asarray(base[name])
        if kind == BASE:
            merged[name] = tensor
            continue
        wide = tensor.astype(np.float64)
        deltas = [np.asarray(expert[name]).astype(np.float64) - wide for expert in experts]
        if kind in {LINEAR, CONV1D, CONVOLUTION}:
            delta = from_canonical(merge_matrix([to_canonical(d, kind) for d in deltas]), kind, wide.shape)
        else:
            delta = average(deltas) if kind == BUFFER else merge_rest(deltas)
        merged[name] = wide + delta
    return merged


def to_canonical(stored: Array, kind: str) -> Array:
    if kind == CONV1D:
        return stored.T
    return stored.reshape(stored.shape[0], -1) if kind == CONVOLUTION else stored


def from_canonical(canonical: Array, kind: str, shape: tuple[int, ...]) -> Array:
    return canonical.T if kind == CONV1D else canonical.reshape(shape)
